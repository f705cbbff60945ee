"""A verifier on a server that fails in every way."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medrlvr_jax.config import load as configs
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model_rewards import endpoint
from medrlvr_jax.model_rewards.endpoint import Completion, Endpoint, yes_share
from medrlvr_jax.rewards.user import RewardError
from medrlvr_jax.rl import train
from medrlvr_jax.tools import replay

GOOD = {"choices": [{"text": " Yes", "logprobs": {"top_logprobs": [{" Yes": -0.1, " No": -2.4}]}}]}


class Server:
    """Answers each prompt by its own list of answers, one a request, the last for ever."""

    def __init__(self):
        self.answers, self.requests, self.models = {}, [], {"data": [{"id": "judge"}]}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body.get("prompt") or body["messages"][0]["content"]
                server.requests.append((self.path, dict(self.headers), body))
                answers = server.answers[prompt]
                self.answer(answers.pop(0) if len(answers) > 1 else answers[0])

            def do_GET(self):
                self.answer(server.models)

            def answer(self, answer):
                if callable(answer):
                    return answer(self)
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that left
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    yield served
    served.http.shutdown()
    served.http.server_close()


def hang(handler):
    time.sleep(1.5)


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(15):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


def garbage(handler):
    handler.wfile.write(b"\x00\x01 no HTTP\r\n\r\n")
    handler.close_connection = True


def elsewhere(handler):
    handler.send_response(302)
    handler.send_header("Location", "http://example.invalid/v1/completions")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def test_each_failure_costs_its_own_row(server):
    """Faults that pass are asked again; the others leave their reason."""
    server.answers = {
        "fine": [GOOD],
        "later": [(500, "boom"), (429, "slow down"), GOOD],
        "torn, then whole": [b'{"choices": [', GOOD],
        "cut, then whole": [cut, GOOD],
        "broken": [b"<html>"],
        "empty": [{"choices": []}],
        "no logprobs": [{"choices": [{"text": "x", "logprobs": None}]}],
        "list": [[1]],
        "gone": [(404, {"error": "no model secret-key"}), GOOD],
        "moved": [elsewhere],
        "garbage": [garbage],
    }
    asked = Endpoint(server.url, "judge", False, "secret-key", retries=3)
    got = dict(zip(server.answers, asked.complete(list(server.answers), 1, first=True), strict=True))
    good = Completion(" Yes", {" Yes": -0.1, " No": -2.4})
    assert [got.pop(name) for name in ("fine", "later", "torn, then whole", "cut, then whole")] == [good] * 4
    reasons = {
        "broken": "no JSON object: b'<html>'",
        "empty": 'no choices: {"choices": []}',
        "no logprobs": "no text, or no logprobs",
        "list": "no JSON object: b'[1]'",
        "gone": 'HTTP 404: {"error": "no model (key)"}',
        "moved": "HTTP 302",
        "garbage": "BadStatusLine",
    }
    assert got.keys() == reasons.keys() and all(reasons[name] in got[name] for name in reasons), got
    prompts = [body["prompt"] for _, _, body in server.requests]
    assert prompts.count("gone") == 1 and prompts.count("broken") == 4 and prompts.count("later") == 3
    path, headers, body = server.requests[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret-key"
    assert (body["temperature"], body["max_tokens"], body["logprobs"]) == (0, 1, 5)


def test_a_server_that_takes_too_long(server):
    server.answers = {"hangs": [hang], "drips": [drip]}
    asked = Endpoint(server.url, "judge", False, deadline=0.6, retries=1)
    began = time.monotonic()
    hanging, dripping = asked.complete(list(server.answers), 1, first=True)
    assert time.monotonic() - began < 1.4 and "no answer within 0." in hanging and "longer than" in dripping
    assert len(server.requests) == 4


def test_no_request_begins_after_the_deadline(server):
    server.answers = {str(i): [hang] for i in range(6)}
    asked = Endpoint(server.url, "judge", False, deadline=0.4, retries=0, concurrency=2)
    began = time.monotonic()
    got = asked.complete(list(server.answers), 1, first=False)
    assert time.monotonic() - began < 1.2 and got[2:] == ["there was no time left"] * 4


def test_a_chat_is_read_as_a_chat(server):
    server.answers = {"a": [{"choices": [{"message": {"content": "Final Decision: Yes"}}]}]}
    assert Endpoint(server.url, "judge", True).complete(["a"], 9, first=False) == [
        Completion("Final Decision: Yes", {})
    ]
    assert server.requests[0][0] == "/v1/chat/completions"


def test_shares_of_the_two_verdicts():
    assert yes_share({" Yes": -0.1, " No": -2.4}, (" Yes", " No")) == pytest.approx(
        1 / (1 + 2.718281828**-2.3)
    )
    assert (
        yes_share({"No": -0.5, "x": 0.0}, (" Yes", " No")) == 0 and yes_share({"x": 0.0}, ("a", "b")) is None
    )


def test_replies_are_kept_and_the_key_is_not(server, tmp_path):
    server.answers = {"a": [GOOD], "b": [(500, "secret-key")]}
    file = tmp_path / "run" / "0.jsonl"
    settings = {"key": "secret-key", "retries": 0, "folder": file.parent}
    first = Endpoint(server.url, "judge", False, **settings).complete(["a", "a", "b"], 1, True)
    assert len(server.requests) == 2 and first[0] == first[1] and first[2] == 'HTTP 500: "(key)"'
    file.write_text(file.read_text() + '\n{"request": "torn')
    again = Endpoint(server.url, "judge", False, **settings, process=1)
    assert again.complete(["a"], 1, True) == first[:1] and len(server.requests) == 2
    again.complete(["a"], 2, True)  # another request
    Endpoint(server.url, "judge", False, **settings).complete(["a"], 3, True)
    assert Endpoint(server.url, "judge", False, **settings).complete(["a"] * 3, 3, True) == first[:1] * 3
    assert len(server.requests) == 4 and "secret" not in file.read_text() + repr(first)


def test_what_can_be_refused_before_the_run(server, monkeypatch):
    asked = Endpoint(server.url, "judge", False, retries=0, deadline=2)
    asked.check("reward.v")
    server.models = {"data": [{"id": "other"}, {"id": "more"}]}
    with pytest.raises(
        ConfigError, match=r"reward\.v\.model: judge: the server at .* has other, more; give one"
    ):
        asked.check("reward.v")
    server.models = (401, {"error": "bad key"})
    with pytest.raises(ConfigError, match=r"reward\.v\.url: .*HTTP 401.*correct url and key"):
        asked.check("reward.v")
    server.models = (404, {})
    asked.check("reward.v")
    with pytest.raises(ConfigError, match=r"reward\.v\.url: http://127.0.0.1:9/v1: .*start the server"):
        Endpoint("http://127.0.0.1:9/v1", "judge", False, retries=0).check("reward.v")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"reward\.v\.key: NO_SUCH_KEY: no such environment variable"):
        endpoint.api_key("NO_SUCH_KEY", "reward.v")


class Alive(dict):
    """Answers each prompt by its length, until the server dies after `left` more."""

    left = 1000

    def __missing__(self, prompt):
        self.left -= 1
        share = {" Yes": -0.1 - len(prompt) % 7, " No": -1.0}
        return [{"choices": [{"text": "", "logprobs": {"top_logprobs": [share]}}]} if self.left >= 0 else cut]


def test_a_run_whose_verifier_is_a_server(server, tmp_path):
    """A step that is made again asks nothing; nor does its replay. A server that dies costs rows, then the run."""
    server.answers = Alive()
    verifier = {"kind": "verifier", "url": server.url, "model": "judge", "prompt": "{question} {answer}"}
    verifier |= {"when": "always", "retries": 0, "deadline": 20, "concurrency": 1}
    tree = {
        "name": "served",
        "runs": str(tmp_path),
        "steps": 2,
        "model": {"path": "embedded"},
        "data": {"path": "embedded:train", "limit": 64},
        "prompt": {"template": "none", "max_tokens": 96},
        "sample": {"questions": 8, "samples": 4, "max_new_tokens": 48},
        "reward": [verifier, {"kind": "format", "weight": 0.1}],
        "advantage": {"estimator": "group_mean"},
        "learn": {"minibatch": 8, "policy": {"lr": 1e-4}},
        "eval": {"batch": 8},
        "checkpoint": {"every": 1},
        "log": {"samples_every": 1, "samples": 8},
    }
    logged = lambda: [json.loads(line) for line in (tmp_path / "served" / "metrics.jsonl").open()]
    train.train(configs.from_tree(tree))
    first, asked = logged(), len(server.requests)
    assert asked > 10 and all(m["verifier_share"] > 0.2 and m["reward_failed"] == 0 for m in first)
    assert first[0]["reward/verifier"] != first[1]["reward/verifier"]
    shutil.rmtree(tmp_path / "served" / "checkpoints" / "2")
    server.answers.left = 3
    with pytest.raises(
        RewardError, match=r"verifier failed on all \d+ answers of a batch: its reply is no JSON"
    ):
        train.train(configs.from_tree(tree | {"steps": 4}))
    again = logged()
    names = [name for name in first[0] if name.startswith(("reward", "verifier", "policy"))]
    assert [[m[k] for k in names] for m in again[:2]] == [[m[k] for k in names] for m in first]
    assert len(again) == 3 and 0 < again[2]["reward_failed"] < 1 and again[2]["unlearned"] > 0
    asked = len(server.requests)
    result = replay.replay(tmp_path / "served", 1, 4, [])
    assert (result["differ"], len(server.requests)) == ([], asked) and "reward" in result["logged"]
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConfigError, match=r"reward\.components\.verifier\.url: .*start the server"):
        replay.replay(tmp_path / "served", 1, 4, [])

"""Get completions from a server with OpenAI's HTTP interface, such as vLLM or SGLang.

    POST {url}/completions, or with `chat` {url}/chat/completions

At most `concurrency` requests are open at a time. A request is sent again, up to `retries` times and after a
pause that doubles, if the server refuses it for now (408, 429, 5xx), does not answer in time, or answers with
something else than a completion. A batch has `deadline` seconds in all; unanswered requests then fail.

Completions are kept in files by a digest of their requests. So equal requests are sent once, and a resumed
run gets the same completions. The API key is in no file and in no message.
"""

import hashlib
import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from medrlvr_jax.host.errors import ConfigError

PAUSE = 0.5  # seconds before the second request; each further pause is twice as long
MAX_BYTES = 2**20  # of a reply
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
TOP_LOGPROBS = 5  # most probable first tokens that are requested


class Completion(NamedTuple):
    """A server's completion of one prompt."""

    text: str
    first: dict[str, float]  # log-probs of the most probable first tokens; {} if they were not requested


class RequestFailed(Exception):
    """A request has no usable reply."""

    def __init__(self, reason: str, retry: bool):
        super().__init__(reason)
        self.retry = retry


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that the key goes to no other server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


@dataclass
class Endpoint:
    """One model on one server."""

    url: str  # up to and including the version, such as http://localhost:8000/v1
    model: str
    chat: bool
    key: str | None = None  # the API key itself
    deadline: float = 300.0  # seconds for a batch
    retries: int = 3
    concurrency: int = 16
    folder: Path | None = None  # of completions, one file for each process
    process: int = 0
    _known: dict[str, Completion] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _opener: Any = field(default_factory=lambda: urllib.request.build_opener(_NoRedirect), repr=False)

    def __post_init__(self) -> None:
        files = sorted(self.folder.glob("*.jsonl")) if self.folder else []
        for line in chain.from_iterable(file.read_text("utf-8").splitlines() for file in files):
            try:
                row = json.loads(line)
                self._known[row["request"]] = Completion(row["text"], row["first"])
            except (ValueError, KeyError, TypeError):  # a line that a killed run was writing
                continue

    def check(self, name: str) -> None:
        """Raise `ConfigError` if the server cannot be reached, refuses the key, or lacks the model.

        `name` is the component for the error message.
        """
        seconds = self.deadline / (self.retries + 1)
        try:
            models = self._send("models", None, seconds).get("data")
        except RequestFailed as e:
            if "HTTP 404" in str(e) or "HTTP 405" in str(e):  # the server does not list models
                return
            remedy = "start the server, or correct url and key"
            raise ConfigError(f"{name}.url: {self.url}: {e}; {remedy}") from None
        listed = [m.get("id") for m in models if isinstance(m, dict)] if isinstance(models, list) else []
        if listed and self.model not in listed:
            known = f"the server at {self.url} has {', '.join(map(str, listed[:8]))}"
            raise ConfigError(f"{name}.model: {self.model}: {known}; give one of these")

    def complete(self, prompts: Sequence[str], new_tokens: int, first: bool) -> list[Completion | str]:
        """Return a greedy completion of at most `new_tokens` for each prompt, or a str that says why not.

        `first` requests the log-probs of the most probable first tokens. A chat does not have them.
        """
        end = time.monotonic() + self.deadline
        distinct = list(dict.fromkeys(prompts))
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = pool.map(lambda prompt: self._complete(prompt, new_tokens, first, end), distinct)
            by_prompt = dict(zip(distinct, replies, strict=True))
        return [by_prompt[prompt] for prompt in prompts]

    def _complete(self, prompt: str, new_tokens: int, first: bool, end: float) -> Completion | str:
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": new_tokens}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        body |= {"logprobs": TOP_LOGPROBS} if first else {}
        digest = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        if digest in self._known:
            return self._known[digest]
        reason, pause = "there was no time left", PAUSE
        for _ in range(self.retries + 1):
            if (left := end - time.monotonic()) <= 0:
                break
            try:
                path = "chat/completions" if self.chat else "completions"
                sent = self._send(path, body, min(left, self.deadline / (self.retries + 1)))
                reply = _read(sent, self.chat, first)
            except RequestFailed as e:
                reason = str(e)
                if not e.retry:
                    break
                time.sleep(max(0.0, min(pause, end - time.monotonic())))
                pause *= 2
            else:
                self._keep(digest, reply)
                return reply
        return reason

    def _send(self, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Return the JSON object that the server answers within so many seconds."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        end = time.monotonic() + seconds
        try:
            with self._opener.open(request, timeout=seconds) as response:
                content = b""
                while chunk := response.read1(65536):
                    content += chunk
                    if time.monotonic() > end or len(content) > MAX_BYTES:
                        raise RequestFailed(
                            f"its reply was longer than {MAX_BYTES} bytes or {seconds:.3g} s", True
                        )
        except urllib.error.HTTPError as e:
            detail = self._without_key(e.read(300).decode("utf-8", "replace"))
            raise RequestFailed(
                f"HTTP {e.code}: {' '.join(detail.split())}", e.code in RETRY_STATUS
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as e:  # URLError and time-outs among them
            reason = getattr(e, "reason", e)
            late = isinstance(reason, TimeoutError)
            text = f"no answer within {seconds:.3g} s" if late else f"{type(e).__name__}: {reason}"
            raise RequestFailed(self._without_key(text), True) from None
        try:
            tree = json.loads(content)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise RequestFailed(f"its reply is no JSON object: {self._without_key(repr(content[:80]))}", True)
        return tree

    def _keep(self, digest: str, reply: Completion) -> None:
        with self._lock:
            self._known[digest] = reply
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{self.process}.jsonl", "a", encoding="utf-8") as file:
                    # The line break comes first, because a killed run may have left an unfinished line.
                    file.write("\n" + json.dumps({"request": digest, **reply._asdict()}))

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "(key)") if self.key else text


def api_key(variable: str | None, name: str) -> str | None:
    """Return the value of the environment variable that the component `name` gives."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigError(f"{name}.key: {variable}: no such environment variable; set it to the API key")
    return key


def _read(tree: dict[str, Any], chat: bool, first: bool) -> Completion:
    """Return the completion in an answer of /completions or /chat/completions."""
    choices = tree.get("choices")
    if not isinstance(choices, list) or not choices:
        raise RequestFailed(f"its reply has no choices: {json.dumps(tree)[:80]}", True)
    try:
        text = choices[0]["message"]["content"] or "" if chat else choices[0]["text"]
        logprobs = choices[0]["logprobs"]["top_logprobs"][0] if first else {}
        return Completion(str(text), {str(token): float(value) for token, value in logprobs.items()})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        shown = json.dumps(choices[0])[:80]
        raise RequestFailed(f"its reply has no text, or no logprobs: {shown}", True) from None


def yes_share(first: dict[str, float], verdicts: tuple[str, str]) -> float | None:
    """Return the probability of Yes among the two verdicts, from the log-probs of a first token.

    White space around tokens is ignored. A verdict that is not among them has probability 0. Returns None if
    neither is.
    """
    yes, no = (
        sum(math.exp(value) for token, value in first.items() if token.strip() == verdict.strip())
        for verdict in verdicts
    )
    return yes / (yes + no) if yes + no > 0 else None

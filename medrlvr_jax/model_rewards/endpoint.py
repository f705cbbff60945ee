"""Completions from a server with OpenAI's HTTP interface, such as vLLM or SGLang: for a verifier that runs
elsewhere.

    POST {url}/completions, or with `chat` {url}/chat/completions

Requests go out at most `concurrency` at a time. A request that the server refuses for now (408, 429, 5xx),
does not answer in time, or answers with something else than a completion, is sent again, up to `retries`
times, after a pause that doubles. A batch has `deadline` seconds in all; what is not answered by then fails.

Replies are kept in files, each under a digest of its request: a resumed run reads them there, so that it is
the same run, and equal requests are sent once. The API key is in no file, message or reply.
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
LARGEST = 2**20  # bytes of a reply that are read
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
NEAREST = 5  # most probable first tokens that are asked for


class Completion(NamedTuple):
    """What a server says to one prompt."""

    text: str
    first: dict[str, float]  # log-probs of the most probable first tokens; {} where they were not asked for


class Refused(Exception):
    """A request that has no usable reply; `again`: whether to send it once more."""

    def __init__(self, reason: str, again: bool):
        super().__init__(reason)
        self.again = again


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that was named, and to no other."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


@dataclass
class Endpoint:
    """One model of one server."""

    url: str  # up to and including the version, such as http://localhost:8000/v1
    model: str
    chat: bool
    key: str | None = None  # the API key itself
    deadline: float = 300.0  # seconds for a batch
    retries: int = 3
    concurrency: int = 16
    folder: Path | None = None  # of replies, one file for each process
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
            except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
                continue

    def check(self, name: str) -> None:
        """Refuse a server that is not there, a key that it does not take, a model that it does not have.

        `name`: the component, for error messages.
        """
        seconds = self.deadline / (self.retries + 1)
        try:
            models = self._send("models", None, seconds).get("data")
        except Refused as e:
            if "HTTP 404" in str(e) or "HTTP 405" in str(e):  # a server that lists no models
                return
            remedy = "start the server, or correct url and key"
            raise ConfigError(f"{name}.url: {self.url}: {e}; {remedy}") from None
        listed = [m.get("id") for m in models if isinstance(m, dict)] if isinstance(models, list) else []
        if listed and self.model not in listed:
            known = f"the server at {self.url} has {', '.join(map(str, listed[:8]))}"
            raise ConfigError(f"{name}.model: {self.model}: {known}; give one of these")

    def complete(self, prompts: Sequence[str], new_tokens: int, first: bool) -> list[Completion | str]:
        """A greedy reply of at most `new_tokens` to each prompt; where there is none, the reason, as a str.

        `first`: ask for the log-probs of the first token's most probable values; not in a chat.
        """
        ends = time.monotonic() + self.deadline
        distinct = list(dict.fromkeys(prompts))
        with ThreadPoolExecutor(self.concurrency) as pool:
            replies = pool.map(lambda prompt: self._reply(prompt, new_tokens, first, ends), distinct)
            by_prompt = dict(zip(distinct, replies, strict=True))
        return [by_prompt[prompt] for prompt in prompts]

    def _reply(self, prompt: str, new_tokens: int, first: bool, ends: float) -> Completion | str:
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": new_tokens}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        body |= {"logprobs": NEAREST} if first else {}
        digest = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        if digest in self._known:
            return self._known[digest]
        reason, pause = "there was no time left", PAUSE
        for _ in range(self.retries + 1):
            if (left := ends - time.monotonic()) <= 0:
                break
            try:
                path = "chat/completions" if self.chat else "completions"
                sent = self._send(path, body, min(left, self.deadline / (self.retries + 1)))
                reply = _read(sent, self.chat, first)
            except Refused as e:
                reason = str(e)
                if not e.again:
                    break
                time.sleep(max(0.0, min(pause, ends - time.monotonic())))
                pause *= 2
            else:
                self._keep(digest, reply)
                return reply
        return reason

    def _send(self, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """The JSON object that the server answers with, within so many seconds."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        ends = time.monotonic() + seconds
        try:
            with self._opener.open(request, timeout=seconds) as response:
                content = b""
                while chunk := response.read1(65536):
                    content += chunk
                    if time.monotonic() > ends or len(content) > LARGEST:
                        raise Refused(f"its reply was longer than {LARGEST} bytes or {seconds:.3g} s", True)
        except urllib.error.HTTPError as e:
            detail = self._without_key(e.read(300).decode("utf-8", "replace"))
            raise Refused(f"HTTP {e.code}: {' '.join(detail.split())}", e.code in TRY_AGAIN) from None
        except (OSError, ValueError, http.client.HTTPException) as e:  # URLError and time-outs among them
            reason = getattr(e, "reason", e)
            late = isinstance(reason, TimeoutError)
            text = f"no answer within {seconds:.3g} s" if late else f"{type(e).__name__}: {reason}"
            raise Refused(self._without_key(text), True) from None
        try:
            tree = json.loads(content)
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise Refused(f"its reply is no JSON object: {self._without_key(repr(content[:80]))}", True)
        return tree

    def _keep(self, digest: str, reply: Completion) -> None:
        with self._lock:
            self._known[digest] = reply
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(self.folder / f"{self.process}.jsonl", "a", encoding="utf-8") as file:
                    # the line break first: the last line may be one that a killed run left
                    file.write("\n" + json.dumps({"request": digest, **reply._asdict()}))

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "(key)") if self.key else text


def api_key(variable: str | None, name: str) -> str | None:
    """The value of the environment variable that the component `name` names."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigError(f"{name}.key: {variable}: no such environment variable; set it to the API key")
    return key


def _read(tree: dict[str, Any], chat: bool, first: bool) -> Completion:
    """What /completions or /chat/completions answers."""
    choices = tree.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Refused(f"its reply has no choices: {json.dumps(tree)[:80]}", True)
    try:
        text = choices[0]["message"]["content"] or "" if chat else choices[0]["text"]
        nearest = choices[0]["logprobs"]["top_logprobs"][0] if first else {}
        return Completion(str(text), {str(token): float(value) for token, value in nearest.items()})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        shown = json.dumps(choices[0])[:80]
        raise Refused(f"its reply has no text, or no logprobs: {shown}", True) from None


def yes_share(first: dict[str, float], verdicts: tuple[str, str]) -> float | None:
    """The probability of Yes among the two verdicts, from log-probs of a first token; white space around it
    does not count. A verdict that is not among them has probability 0; None where neither is.
    """
    yes, no = (
        sum(math.exp(value) for token, value in first.items() if token.strip() == verdict.strip())
        for verdict in verdicts
    )
    return yes / (yes + no) if yes + no > 0 else None

"""A user's own reward: `reward.fn: package.module:function`, called in a worker process, with a deadline.

    def reward(completions, keys, options, questions):
        \"\"\"N texts, N letters of the right options, N lists of options, N questions' texts → N finite floats.\"\"\"

Training alone calls it: evaluations report the rule's verdicts. Each completion is scored by one process.

The N values may be in any iterable that has an order: a list, an array of shape [N], a generator. True is 1 and False is 0. The worker
is spawned, not forked (JAX has threads); it sees JAX on the CPU alone. Each training starts its own, which imports the module anew.
What goes wrong with a completion costs its row, not the run:

- A value is no number (a text, None, a list) or no finite float32: its row fails.
- It raises; returns another number of values, or something without an order (a dict, a set, a text); ends its process; takes longer
  than `reward.deadline`: the batch is halved, again and again, until what fails is alone. Those rows fail, all others are scored. A part
  of n of N rows has n / N of the deadline, at least 1/16; when it has had three deadlines in all, what is not yet scored fails.

What is wrong with the function itself ends the run (`RewardError`):

- It returns another number of values for several completions, and each of these alone is well: `[mean]` whatever the batch, or a dict's
  values where two completions are equal. Then no value can be said to be a row's.
- It fails on every row of a step's batch, in all processes.
- It cannot be imported: refused before any device work (`ConfigError`).

A failed row is not learned from. A reward of 0 instead would be one to strive for, or to avoid: completions that break the function
would pay more than unformatted ones. Where samples of one question are compared (`group`, `group_mean`, `rloo`,
`reinforce_pp_baseline`) the whole question is left out, since a mean over the samples that did not fail is a biased baseline.
Metrics: `reward_failed` and `unlearned`, the shares of completions that failed and that were left out; samples.jsonl has the former,
each with its `reward_error`. A minibatch in which nothing is left moves by its optimiser's momentum alone.

A resumed or replayed run is the same run only if the function is one: no clock, no randomness of its own, no service that changes.
"""

import hashlib
import importlib
import importlib.machinery
import json
import math
import multiprocessing
import os
import reprlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.host.errors import ConfigError

START = 120  # seconds that importing the function may take
LEAST = 16  # a part has at least 1 / LEAST of the deadline
PATIENCE = 3  # deadlines that a batch may take in all, however many of its rows fail
LARGEST = float.fromhex("0x1.fffffep127")  # of a float32

Row = tuple[str, str, Sequence[str], str]  # completion, key, options, question


class RewardError(RuntimeError):
    """A user's function that failed on every row, or that does not return one value for each."""


def started(config: RewardConfig) -> AbstractContextManager["UserReward | None"]:
    """The function of `reward.fn` in a worker that lives as long as the context; None where the rule pays."""
    return UserReward(config) if config.fn else nullcontext()


class UserReward:
    """The function of `reward.fn` in its worker, which is started here, and again whenever it had to be ended.

    Python would wait for it at its own end: use it as a context manager, or `close` it. Raises `ConfigError` if the function cannot be
    imported.
    """

    def __init__(self, config: RewardConfig):
        self.name, self._deadline = str(config.fn), config.deadline
        self._start()

    def __enter__(self) -> "UserReward":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def score(self, rows: Sequence[Row]) -> tuple[list[float], dict[int, str]]:
        """Rewards of all rows, NaN where one failed; and the reasons of those, by row. All processes call it together, each with its own
        rows of a batch, which may be none."""
        from medrlvr_jax.host.processes import gather  # the worker imports this module too, and must not wait for JAX

        rewards, failed, miscounts = [math.nan] * len(rows), {}, []
        left = PATIENCE * self._deadline

        def take(part: range) -> None:
            nonlocal left
            share = min(max(len(part) / len(rows), 1 / LEAST) * self._deadline, left)
            answer, took = self._call([rows[i] for i in part], share) if left > 0 else ({"error": "there was no time left"}, 0.0)
            left -= took
            if "values" in answer:
                for i, value in zip(part, answer["values"], strict=True):
                    if isinstance(value, str):
                        failed[i] = value
                    else:
                        rewards[i] = value
            elif len(part) > 1 and left > 0:
                half, miscounted = len(part) // 2, answer.get("miscounted", False)
                miscounts.extend([answer["error"]] if miscounted else [])
                take(part[:half])
                take(part[half:])
                if miscounted and not any(i in failed for i in part):
                    alone = f"though it scores {len(part)} of them one by one: it must return one number for each, in their order"
                    raise RewardError(f"reward.fn: {self.name}: {miscounts[0]}, {alone}")
            else:
                failed.update(dict.fromkeys(part, answer["error"]))

        if rows:
            take(range(len(rows)))
        total, broken = map(sum, zip(*gather([len(rows), len(failed)]), strict=True))
        if total and broken == total:
            first = f": {failed[0]}; the first completion is {rows[0][0][:200]!r}" if rows else ""
            raise RewardError(f"reward.fn: {self.name} failed on all {total} completions of a batch{first}")
        return rewards, failed

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(self.name, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        if reason := self._answer(START).get("error"):
            self.close()
            raise ConfigError(f"reward.fn: {self.name}: {reason}; it is looked for where Python looks, and in the current folder")

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """What `_answer` says; and the seconds that it took, those of starting a worker not among them."""
        if not self._process.is_alive():
            self._start()
        try:
            self._pipe.send_bytes(json.dumps(rows).encode())
        except OSError:
            self._start()  # it ended just now, of its own
            self._pipe.send_bytes(json.dumps(rows).encode())
        began = time.monotonic()
        return self._answer(seconds), time.monotonic() - began

    def _answer(self, seconds: float) -> dict[str, Any]:
        """What the worker says within so many seconds, as `_values` has it; one that is silent is ended."""
        try:
            if self._pipe.poll(seconds):
                return json.loads(self._pipe.recv_bytes())
            reason = f"it took longer than {seconds:.3g} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"its process ended with status {self._process.exitcode}"
        self.close()
        return {"error": reason}


def source_digest(name: str) -> dict[str, str] | None:
    """`{"file", "sha256"}` of the file that holds the function's module, found as Python would and not run; None if no file does."""
    folders: Any = [os.getcwd(), *sys.path]
    spec, module = None, ""
    for part in name.partition(":")[0].split("."):
        module = f"{module}.{part}".lstrip(".")
        spec = importlib.machinery.PathFinder.find_spec(module, folders) if folders is not None else None
        folders = spec.submodule_search_locations if spec else None
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        return None
    with open(spec.origin, "rb") as file:
        return {"file": spec.origin, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _work(name: str, pipe: Any, parent: int) -> None:
    """The worker: one line of JSON in, one out; no pickles. It outlives neither its parent nor the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these go to a whole job; the run ends its worker itself
        signal.signal(number, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is the run's
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    sys.path.insert(0, os.getcwd())
    try:
        function = _find(name)
        pipe.send_bytes(json.dumps({}).encode())
    except BaseException as e:
        pipe.send_bytes(json.dumps({"error": f"{type(e).__name__}: {e}"}).encode())
        return
    while True:
        try:
            rows = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = _values(function(*(list(column) for column in zip(*rows, strict=True))), len(rows))
        except BaseException as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            answer = {"error": f"{type(e).__name__}: {e} ({os.path.basename(where.filename)}, line {where.lineno})"[:500]}
        pipe.send_bytes(json.dumps(answer).encode())


def _values(result: Any, n: int) -> dict[str, Any]:
    """`values`: a float for each of the n completions, or in words what is wrong with its value; or `error`: why there are none.
    `miscounted` goes with an error of their number."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | Set):
        return {"error": f"it returned {reprlib.repr(result)}, which is not one number for each completion, in their order"}
    values = list(result)
    if len(values) != n:
        return {"error": f"it returned {len(values)} value{'s' * (len(values) != 1)} for {n} completions", "miscounted": True}
    return {"values": [_number(value) for value in values]}


def _number(value: Any) -> float | str:
    try:
        if isinstance(value, str | bytes) or getattr(value, "shape", ()) != ():
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return f"it returned {reprlib.repr(value)}, which is not a number"
    return number if abs(number) <= LARGEST else f"it returned {number}"


def _find(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not callable(found):
        raise TypeError(f"{attribute} is {type(found).__name__}, not a function")
    return found


def _watch(parent: int) -> None:
    """A function that hangs hears nothing of the pipe: end with the parent, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

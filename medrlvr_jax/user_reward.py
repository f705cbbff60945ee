"""A user's own reward: `reward.fn: package.module:function`, called in a worker process, with a deadline.

    def reward(completions, keys, options, questions):
        \"\"\"N texts, N letters of the right options, N lists of options, N questions' texts → N finite floats.\"\"\"

The worker is spawned, not forked (JAX has threads); it sees JAX on the CPU alone. What goes wrong costs rows, not the run:

- It returns NaN or ±inf: those rows fail.
- It raises; returns another number of values, or something else than numbers; ends its process; takes longer than `reward.deadline`:
  the batch is halved, again and again, until what fails is alone. Those rows fail, all others are scored. A part of n of N rows has
  n / N of the deadline, at least 1/16; when it has had three deadlines in all, what is not yet scored fails.
- It fails on every row of a batch: the run ends (`RewardError`), for that is no matter of single completions.
- It cannot be imported: refused before any device work.

A failed row is not learned from. A reward of 0 instead would be one to strive for, or to avoid: completions that break the function
would pay more than unformatted ones. Where samples of one question are compared (`group`, `group_mean`, `rloo`,
`reinforce_pp_baseline`) the whole question is left out, since a mean over the samples that did not fail is a biased baseline.
Metrics: `reward_failed` and `unlearned`, the shares of completions that failed and that were left out; samples.jsonl has the former,
each with its `reward_error`. A minibatch in which nothing is left moves by its optimiser's momentum alone.

A resumed or replayed run is the same run only if the function is one: no clock, no randomness of its own, no service that changes.
"""

import atexit
import functools
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from medrlvr_jax.config import ConfigError, RewardConfig

START = 120  # seconds that importing the function may take
LEAST = 16  # a part has at least 1 / LEAST of the deadline
PATIENCE = 3  # deadlines that a batch may take in all, however many of its rows fail

Row = tuple[str, str, Sequence[str], str]  # completion, key, options, question


class RewardError(RuntimeError):
    """A user's function that failed on every row it was given."""


class UserReward:
    """The function of `reward.fn` in its worker, which is started here, and again whenever it had to be ended.

    Raises `ConfigError` if the function cannot be imported.
    """

    def __init__(self, config: RewardConfig):
        self.name, self._deadline = str(config.fn), config.deadline
        self._start()
        atexit.register(self.close)  # multiprocessing's own end is a SIGTERM, which the worker does not hear

    def score(self, rows: Sequence[Row]) -> tuple[list[float], dict[int, str]]:
        """Rewards of all rows, NaN where one failed; and the reasons of those, by row."""
        rewards, failed = [math.nan] * len(rows), {}
        left = PATIENCE * self._deadline
        parts = [range(len(rows))] if rows else []
        while parts:
            part = parts.pop()
            share = min(max(len(part) / len(rows), 1 / LEAST) * self._deadline, left)
            values, reason, took = self._call([rows[i] for i in part], share) if left > 0 else ([], "there was no time left", 0.0)
            left -= took
            if reason and len(part) > 1 and left > 0:
                half = len(part) // 2
                parts += [part[half:], part[:half]]  # the first half is taken first
            elif reason:
                failed |= dict.fromkeys(part, reason)
            else:
                for i, value in zip(part, values, strict=True):
                    rewards[i] = value
                    if not math.isfinite(value):
                        rewards[i], failed[i] = math.nan, f"it returned {value}"
        if rows and len(failed) == len(rows):
            first = f"{failed[0]}; the first completion is {rows[0][0][:200]!r}"
            raise RewardError(f"reward.fn: {self.name} failed on all {len(rows)} completions of a batch: {first}")
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
        reason = self._answer(START)[1]
        if reason:
            self.close()
            raise ConfigError(f"reward.fn: {self.name}: {reason}; it is looked for where Python looks, and in the current folder")

    def _call(self, rows: list[Row], seconds: float) -> tuple[list[float], str, float]:
        """The values, or why there are none; and the seconds that it took, those of starting a worker not among them."""
        if not self._process.is_alive():
            self._start()
        try:
            self._pipe.send_bytes(json.dumps(rows).encode())
        except OSError:
            self._start()  # it ended just now, of its own
            self._pipe.send_bytes(json.dumps(rows).encode())
        began = time.monotonic()
        values, reason = self._answer(seconds)
        if not reason and len(values) != len(rows):
            reason = f"it returned {len(values)} values for {len(rows)} completions"
        return values, reason, time.monotonic() - began

    def _answer(self, seconds: float) -> tuple[list[float], str]:
        """What the worker says within so many seconds; one that is silent is ended."""
        try:
            if self._pipe.poll(seconds):
                found = json.loads(self._pipe.recv_bytes())
                return found.get("values", []), found.get("error", "")
            reason = f"it took longer than {seconds:.3g} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"its process ended with status {self._process.exitcode}"
        self.close()
        return [], reason


@functools.cache
def worker(config: RewardConfig) -> UserReward | None:
    """The one worker of this process for these settings, started at the first call; None where there is no `reward.fn`."""
    return UserReward(config) if config.fn else None


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
            values = [float(value) for value in function(*(list(column) for column in zip(*rows, strict=True)))]
            said = {"values": values}
        except BaseException as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            said = {"error": f"{type(e).__name__}: {e} ({os.path.basename(where.filename)}, line {where.lineno})"[:500]}
        pipe.send_bytes(json.dumps(said).encode())


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

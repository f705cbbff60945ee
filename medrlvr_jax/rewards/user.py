"""Rewards by a user's functions: `train(config, rewards=…)`, or `reward.fn: package.module:function`.

    def reward(completions, keys, options, questions):
        \"\"\"N texts, N right letters, N lists of options, N questions' texts → N finite floats.\"\"\"

    async def reward(completion, key, options, question):
        \"\"\"One float; called once for each completion, at most `concurrency` calls at a time.\"\"\"

`LocalFunction` calls a callable of this process, without a deadline, by keyword with the arguments that its
signature names. `WorkerFunction` runs a function in a worker process with a deadline. The worker is spawned,
not forked, because JAX has threads, and it sees JAX on the CPU alone. Only training calls the functions.
docs/pages/howto/reward.md describes all of this for users.

A failure on a completion fails its row, not the run. If a call fails as a whole (the function raises, ends
its process, exceeds its deadline, or returns a wrong number of values), the batch is halved until the failing
rows are found. Failed rows are not learned from. With a reward of 0 instead, the policy would learn to break
the function, because that would be worth more than a broken format. If the estimator compares samples of a
question (schema.GROUP_ESTIMATORS), the whole question is left out: the mean over the samples that did not
fail is a biased baseline.

An error of the function itself ends the run:

- `RewardError` if it returns a wrong number of values for several completions, but the right number for each
  alone (`[mean]`, or the values of a dict by completion): no value then belongs to a row.
- `RewardError` if it fails on every row of a step's batch, in all processes.
- `ConfigError`, before any device work, if it cannot be imported or needs another argument.
"""

import asyncio
import functools
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from medrlvr_jax.config.reward import FunctionConfig
from medrlvr_jax.host.errors import ConfigError, MedrlvrError
from medrlvr_jax.rewards.components import ComponentValues
from medrlvr_jax.rewards.graders import Graded
from medrlvr_jax.rewards.worker import (
    ARGUMENTS,
    COROUTINE_ARGUMENTS,
    Function,
    Row,
    accepted_arguments,
    call_coroutine,
    check_values,
    describe_error,
    function_name,
    is_coroutine,
    run_worker,
)

IMPORT_SECONDS = 120  # for a worker to start and to import the function
MIN_SHARE = 1 / 16  # of the deadline, for the smallest part of a batch
GRACE_SECONDS = 1  # from the deadline until a worker that runs coroutines is ended
CONCURRENCY = 16  # open calls of a coroutine function in this process
MAX_DEADLINES = 3  # that a batch may take in all, however many of its rows fail


class RewardError(MedrlvrError, RuntimeError):
    """A user's function failed on every row, or does not return one value for each."""


class UserFunction:
    """A user's function. The subclasses differ in where it runs."""

    name: str
    field = "rewards"  # the setting or argument that named the function
    _deadline = math.inf  # seconds

    def score(self, rows: Sequence[Row]) -> tuple[list[float], dict[int, str]]:
        """Return the rewards of N rows, NaN for failed ones, and the reason for each failed row.

        All processes call it together, each with its own rows of a batch, which may be none.
        """
        # Imported here because the worker imports this module, and JAX would slow its start.
        from medrlvr_jax.host.processes import gather

        rewards, failed, miscounts = [math.nan] * len(rows), {}, []
        seconds_left = MAX_DEADLINES * self._deadline

        def score_part(part: range) -> None:
            nonlocal seconds_left
            reply, seconds = {"error": "there was no time left"}, 0.0
            if seconds_left > 0:
                limit = max(len(part) / len(rows), MIN_SHARE) * self._deadline
                reply, seconds = self._call([rows[i] for i in part], min(limit, seconds_left))
            seconds_left -= seconds
            if "values" in reply:
                for i, value in zip(part, reply["values"], strict=True):
                    if isinstance(value, str):
                        failed[i] = value
                    else:
                        rewards[i] = value
            elif len(part) > 1 and seconds_left > 0:
                half, miscounted = len(part) // 2, reply.get("miscounted", False)
                miscounts.extend([reply["error"]] if miscounted else [])
                score_part(part[:half])
                score_part(part[half:])
                if miscounted and not any(i in failed for i in part):
                    singly = f"though it scores {len(part)} of them one by one"
                    remedy = "it must return one number for each, in their order"
                    raise RewardError(f"{self.field}: {self.name}: {miscounts[0]}, {singly}: {remedy}")
            else:
                failed.update(dict.fromkeys(part, reply["error"]))

        if rows:
            score_part(range(len(rows)))
        total, broken = map(sum, zip(*gather([len(rows), len(failed)]), strict=True))
        if total and broken == total:
            first = f": {failed[0]}; the first completion is {rows[0][0][:200]!r}" if rows else ""
            raise RewardError(
                f"{self.field}: {self.name} failed on all {total} completions of a batch{first}"
            )
        return rewards, failed

    def compute(self, graded: Graded) -> ComponentValues:
        questions = graded.questions
        keys, options = [q.reference for q in questions], [q.options for q in questions]
        texts = [q.question for q in questions]
        return ComponentValues(*self.score(list(zip(graded.completions, keys, options, texts, strict=True))))

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """Call the function. Return its result as `check_values` does, and the seconds that it took."""
        raise NotImplementedError


class LocalFunction(UserFunction):
    """A callable of this process."""

    def __init__(self, function: Function):
        self.name, self.callable = function_name(function), function
        self._coroutine = is_coroutine(function)
        self._arguments = accepted_arguments(function, COROUTINE_ARGUMENTS if self._coroutine else ARGUMENTS)

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        if self._coroutine:
            calls = call_coroutine(self.callable, self._arguments, rows, seconds, CONCURRENCY)
            with ThreadPoolExecutor(1) as thread:  # in a notebook this thread has a running event loop
                return thread.submit(asyncio.run, calls).result(), 0.0
        columns: dict[str, list[Any]] = dict(zip(ARGUMENTS, map(list, zip(*rows, strict=True)), strict=True))
        columns["options"] = list(map(list, columns["options"]))
        try:
            result = self.callable(**{name: columns[name] for name in self._arguments})
            return check_values(result, len(rows)), 0.0
        except Exception as e:
            return {"error": describe_error(e)}, 0.0


class WorkerFunction(UserFunction):
    """A function of `reward.fn` in a worker process, which is started again after it ended.

    `close` it, since Python waits for the worker at exit. Raises `ConfigError` if the import fails.
    """

    field = "reward.fn"

    def __init__(self, config: FunctionConfig):
        self.name, self._deadline, self._concurrency = config.fn, config.deadline, config.concurrency
        self._grace = 0
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, pipe = spawn.Pipe()
        self._process = spawn.Process(target=run_worker, args=(self.name, pipe, os.getpid()), daemon=True)
        self._process.start()
        pipe.close()
        reply = self._receive(IMPORT_SECONDS)
        if "error" in reply:
            self.close()
            searched = "it is searched on Python's path and in the current folder"
            raise ConfigError(f"reward.fn: {self.name}: {reply['error']}; {searched}")
        self._grace = GRACE_SECONDS if reply["coroutine"] else 0

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """The seconds do not include those of starting a worker."""
        if not self._process.is_alive():
            self._start()
        request = json.dumps([rows, seconds, self._concurrency]).encode()
        try:
            self._pipe.send_bytes(request)
        except OSError:  # the worker ended just now
            self._start()
            self._pipe.send_bytes(request)
        start = time.monotonic()
        return self._receive(seconds + self._grace), time.monotonic() - start

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Return the worker's reply. End a worker that does not reply within so many seconds."""
        try:
            if self._pipe.poll(seconds):
                return json.loads(self._pipe.recv_bytes())
            reason = f"it took longer than {seconds:.3g} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"its process ended with status {self._process.exitcode}"
        self.close()
        return {"error": reason}


def source_digest(function: Any) -> str | None:
    """Return the SHA-256 of a callable's source text, or None if Python has no text of it.

    The values that a closure holds are not part of the text.
    """
    if isinstance(function, functools.partial):
        return source_digest(function.func)
    try:
        has_source = inspect.isroutine(function) or inspect.isclass(function)
        text = inspect.getsource(function if has_source else type(function))
    except (OSError, TypeError):  # built in, or typed into a plain interpreter
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def module_digest(name: str) -> dict[str, str] | None:
    """Return `{"file", "sha256"}` of a function's module, or None if it has no file.

    The module is found as Python would find it, and is not imported.
    """
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

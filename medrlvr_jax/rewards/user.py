"""A user's rewards in place of the rule: `train(config, rewards=…)`, or `reward.fn: package.module:function`.

    def reward(completions, keys, options, questions):
        \"\"\"N texts, N right letters, N lists of options, N questions' texts → N finite floats.\"\"\"

Training alone calls it; evaluations report the rule's verdicts. The values may be any ordered iterable: a
list, an array [N], a generator; True is 1, False 0. Each completion is scored by one process.

- `rewards=…`: callables of this process, closures too, without a deadline. Each is called by keyword with the
  arguments that its signature names. The reward is the sum of their values, each times its weight.
- `{kind: function, fn: …}` or `reward.fn`: a function in a worker process with a deadline. The worker is
  spawned, not forked, because JAX has threads; it sees JAX on the CPU alone. Each training starts its own,
  which imports the module anew.
- Either may be a coroutine function, for a judge that answers over a network. It is called once for each
  completion, by keyword with those of `completion`, `key`, `options` and `question` that its signature names,
  and returns one number; `concurrency` calls wait at a time:

    async def reward(completion, question): …

What fails on a completion costs its row, not the run:

- A coroutine raises, or has not ended at `deadline`: its row fails.
- A value is not a number (a text, None, a list), or not a finite float32: its row fails.
- The function raises; returns another number of values, or something unordered (a dict, a set) or a text;
  ends its process; takes longer than `deadline`: the batch is halved until what fails is alone. A
  part of n of N rows has n / N of the deadline, at least 1/16; after three deadlines, unscored rows fail.

A failed row is not learned from. A reward of 0 instead would be a target: completions that break the function
would pay more than unformatted ones. If samples of a question are compared (schema.GROUP_ESTIMATORS), the
whole question is left out: a mean over the samples that did not fail is a biased baseline.

What is wrong with the function itself ends the run:

- `RewardError`: it returns another number of values for several completions, but the right number for each
  alone (`[mean]`, or a dict's values where completions are equal), so that no value belongs to a row; or it
  fails on every row of a step's batch, in all processes.
- `ConfigError`, before any device work: it cannot be imported, or needs another argument.

A resumed or replayed run is the same run only if the functions depend on their arguments alone.
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
from medrlvr_jax.rewards.components import Graded, Judged
from medrlvr_jax.rewards.worker import (
    ARGUMENTS,
    ARGUMENTS_OF_ONE,
    Function,
    Row,
    awaited,
    is_coroutine,
    name_of,
    parameters_of,
    reason_of,
    values_of,
    work,
)

START = 120  # seconds that importing the function may take
LEAST = 16  # a part has at least 1 / LEAST of the deadline
GRACE = 1  # seconds after the deadline until a worker of coroutines is ended
CONCURRENCY = 16  # calls of a coroutine function of this process that wait at a time
PATIENCE = 3  # deadlines that a batch may take in all, however many of its rows fail


class RewardError(MedrlvrError, RuntimeError):
    """A user's function that failed on every row, or that does not return one value for each."""


class Scorer:
    """A user's function; `_call` is how it is called."""

    name: str
    field = "rewards"  # the setting or argument that named the function
    _deadline = math.inf  # seconds

    def score(self, rows: Sequence[Row]) -> tuple[list[float], dict[int, str]]:
        """Rewards of N rows, NaN where one failed; and why, by row.

        All processes call it together, each with its own rows of a batch, which may be none.
        """
        # Not above: the worker imports this module too, and JAX would slow its start.
        from medrlvr_jax.host.processes import gather

        rewards, failed, miscounts = [math.nan] * len(rows), {}, []
        left = PATIENCE * self._deadline

        def take(part: range) -> None:
            nonlocal left
            answer, seconds = {"error": "there was no time left"}, 0.0
            if left > 0:
                share = max(len(part) / len(rows), 1 / LEAST) * self._deadline
                answer, seconds = self._call([rows[i] for i in part], min(share, left))
            left -= seconds
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
                    singly = f"though it scores {len(part)} of them one by one"
                    remedy = "it must return one number for each, in their order"
                    raise RewardError(f"{self.field}: {self.name}: {miscounts[0]}, {singly}: {remedy}")
            else:
                failed.update(dict.fromkeys(part, answer["error"]))

        if rows:
            take(range(len(rows)))
        total, broken = map(sum, zip(*gather([len(rows), len(failed)]), strict=True))
        if total and broken == total:
            first = f": {failed[0]}; the first completion is {rows[0][0][:200]!r}" if rows else ""
            raise RewardError(
                f"{self.field}: {self.name} failed on all {total} completions of a batch{first}"
            )
        return rewards, failed

    def judge(self, graded: Graded) -> Judged:
        """`score`, as `components.Judge` has it."""
        questions = graded.questions
        keys, options = [q.reference for q in questions], [q.options for q in questions]
        texts = [q.question for q in questions]
        return Judged(*self.score(list(zip(graded.completions, keys, options, texts, strict=True))))

    def close(self) -> None:
        """End what runs for it."""

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """What `values_of` makes of the function's result, or `error`; and the seconds it took."""
        raise NotImplementedError


class InProcess(Scorer):
    """A callable of this process."""

    def __init__(self, function: Function):
        self.name, self.function = name_of(function), function
        self._coroutine = is_coroutine(function)
        self._parameters = parameters_of(function, ARGUMENTS_OF_ONE if self._coroutine else ARGUMENTS)

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        if self._coroutine:
            waited = awaited(self.function, self._parameters, rows, seconds, CONCURRENCY)
            with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop of its own in this one
                return thread.submit(asyncio.run, waited).result(), 0.0
        columns: dict[str, list[Any]] = dict(zip(ARGUMENTS, map(list, zip(*rows, strict=True)), strict=True))
        columns["options"] = list(map(list, columns["options"]))
        try:
            result = self.function(**{name: list(columns[name]) for name in self._parameters})
            return values_of(result, len(rows)), 0.0
        except Exception as e:
            return {"error": reason_of(e)}, 0.0


def source_of(function: Any) -> str | None:
    """SHA-256 of a callable's source text, without what a closure holds; None if Python has no text of it."""
    if isinstance(function, functools.partial):
        return source_of(function.func)
    try:
        has_source = inspect.isroutine(function) or inspect.isclass(function)
        text = inspect.getsource(function if has_source else type(function))
    except (OSError, TypeError):  # built in, or typed into a plain interpreter
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class UserReward(Scorer):
    """The function of `reward.fn` in its worker, which is started here, and again after it had to be ended.

    Python would wait for it at its exit: `close` it. Raises `ConfigError` if the function cannot be imported.
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
        self._process = spawn.Process(target=work, args=(self.name, pipe, os.getpid()), daemon=True)
        self._process.start()
        pipe.close()
        answer = self._answer(START)
        if "error" in answer:
            self.close()
            where = "it is searched on Python's path and in the current folder"
            raise ConfigError(f"reward.fn: {self.name}: {answer['error']}; {where}")
        self._grace = GRACE if answer["coroutine"] else 0

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """What `_answer` says; and the seconds that it took, those of starting a worker not among them."""
        if not self._process.is_alive():
            self._start()
        request = json.dumps([rows, seconds, self._concurrency]).encode()
        try:
            self._pipe.send_bytes(request)
        except OSError:
            self._start()  # it ended just now, of its own
            self._pipe.send_bytes(request)
        began = time.monotonic()
        return self._answer(seconds + self._grace), time.monotonic() - began

    def _answer(self, seconds: float) -> dict[str, Any]:
        """What the worker says within so many seconds, as `values_of` has it; one that is silent is ended."""
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
    """`{"file", "sha256"}` of the function's module, found as Python would, not run; None without a file."""
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

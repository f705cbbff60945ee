"""A user's rewards in place of the rule: `train(config, rewards=…)`, or `reward.fn: package.module:function`.

    def reward(completions, keys, options, questions):
        \"\"\"N texts, N right letters, N lists of options, N questions' texts → N finite floats.\"\"\"

Training alone calls it; evaluations report the rule's verdicts. The values may be any ordered iterable: a
list, an array [N], a generator; True is 1, False 0. Each completion is scored by one process.

- `rewards=…`: callables of this process, closures too, without a deadline. Each is called by keyword with the
  arguments that its signature names. The reward is the sum of their values, each times its weight.
- `reward.fn`: a function in a worker process with a deadline. The worker is spawned, not forked, because JAX
  has threads; it sees JAX on the CPU alone. Each training starts its own, which imports the module anew.

What fails on a completion costs its row, not the run:

- A value is not a number (a text, None, a list), or not a finite float32: its row fails.
- The function raises; returns another number of values, or something unordered (a dict, a set) or a text;
  ends its process; takes longer than `reward.deadline`: the batch is halved until what fails is alone. A
  part of n of N rows has n / N of the deadline, at least 1/16; after three deadlines, unscored rows fail.

A failed row is not learned from. A reward of 0 instead would be a target: completions that break the function
would pay more than unformatted ones. If samples of a question are compared (config.schema.COMPARING), the
whole question is left out: a mean over the samples that did not fail is a biased baseline.

What is wrong with the function itself ends the run:

- `RewardError`: it returns another number of values for several completions, but the right number for each
  alone (`[mean]`, or a dict's values where completions are equal), so that no value belongs to a row; or it
  fails on every row of a step's batch, in all processes.
- `ConfigError`, before any device work: it cannot be imported, or needs another argument.

A resumed or replayed run is the same run only if the functions depend on their arguments alone.
"""

import functools
import hashlib
import importlib
import importlib.machinery
import inspect
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
from typing import Any

from medrlvr_jax.config.reward import FunctionConfig
from medrlvr_jax.host.errors import ConfigError, MedrlvrError

START = 120  # seconds that importing the function may take
LEAST = 16  # a part has at least 1 / LEAST of the deadline
PATIENCE = 3  # deadlines that a batch may take in all, however many of its rows fail
LARGEST = float.fromhex("0x1.fffffep127")  # of a float32

Row = tuple[str, str, Sequence[str], str]  # completion, key, options, question
ARGUMENTS = ("completions", "keys", "options", "questions")  # of every reward function, in this order
Function = Callable[..., Iterable[float]]


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

    def judge(self, graded: Any) -> tuple[list[float], dict[int, str]]:
        """`score`, as `components.Judge` has it; `graded` is a `components.Graded`."""
        questions = graded.questions
        keys, options = [q.reference for q in questions], [q.options for q in questions]
        texts = [q.question for q in questions]
        return self.score(list(zip(graded.completions, keys, options, texts, strict=True)))

    def close(self) -> None:
        """End what runs for it."""

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """What `_values` makes of the function's result, or `error`; and the seconds it took."""
        raise NotImplementedError


class InProcess(Scorer):
    """A callable of this process."""

    def __init__(self, function: Function):
        self.name, self.function = name_of(function), function
        self._parameters = _parameters(function)

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        columns: dict[str, list[Any]] = dict(zip(ARGUMENTS, map(list, zip(*rows, strict=True)), strict=True))
        columns["options"] = list(map(list, columns["options"]))
        try:
            result = self.function(**{name: list(columns[name]) for name in self._parameters})
            return _values(result, len(rows)), 0.0
        except Exception as e:
            return {"error": _reason(e)}, 0.0


def name_of(function: Function) -> str:
    """The name of a callable as its source has it; of an object, that of its class."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _parameters(function: Function) -> list[str]:
    """Those of `ARGUMENTS` that the callable takes by keyword."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = set(ARGUMENTS)
    else:
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unknown := [name for name in needed if name not in ARGUMENTS]:
        remedy = f"there are {', '.join(ARGUMENTS)}; rename it, or give it a default"
        raise ConfigError(
            f"rewards: {name_of(function)} needs an argument {unknown[0]!r}, which it never gets; {remedy}"
        )
    return [name for name in ARGUMENTS if name in known]


def source_of(function: Any) -> str | None:
    """SHA-256 of a callable's source text, without what a closure holds; None if Python has no text of it."""
    if isinstance(function, functools.partial):
        return source_of(function.func)
    try:
        text = inspect.getsource(
            function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
        )
    except (OSError, TypeError):  # built in, or typed into a plain interpreter
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class UserReward(Scorer):
    """The function of `reward.fn` in its worker, which is started here, and again after it had to be ended.

    Python would wait for it at its exit: `close` it. Raises `ConfigError` if
    the function cannot be imported.
    """

    field = "reward.fn"

    def __init__(self, config: FunctionConfig):
        self.name, self._deadline = config.fn, config.deadline
        self._start()

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
            raise ConfigError(
                f"reward.fn: {self.name}: {reason}; it is searched on Python's path and in the current folder"
            )

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
            answer = {"error": _reason(e)}
        pipe.send_bytes(json.dumps(answer).encode())


def _reason(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})"[:500]


def _values(result: Any, n: int) -> dict[str, Any]:
    """`values`: for each of n completions a float, or a str that says what is wrong with its value. Or
    `error`: why there are none, with `miscounted` if their number is wrong."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | Set):
        shown = reprlib.repr(result)
        return {"error": f"it returned {shown}, which is not one number for each completion, in their order"}
    values = list(result)
    if len(values) != n:
        return {
            "error": f"it returned {len(values)} value{'s' * (len(values) != 1)} for {n} completions",
            "miscounted": True,
        }
    return {"values": [number_of(value) for value in values]}


def number_of(value: Any) -> float | str:
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

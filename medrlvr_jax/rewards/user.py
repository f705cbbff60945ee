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

`train(config, rewards=…)` takes callables instead, closures too (`Rewards`). They run in this process, without a deadline, and are called
by keyword with those of the four arguments that their signatures name. All other rules above hold for them.
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
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.host.errors import ConfigError

START = 120  # seconds that importing the function may take
LEAST = 16  # a part has at least 1 / LEAST of the deadline
PATIENCE = 3  # deadlines that a batch may take in all, however many of its rows fail
LARGEST = float.fromhex("0x1.fffffep127")  # of a float32

Row = tuple[str, str, Sequence[str], str]  # completion, key, options, question
ARGUMENTS = ("completions", "keys", "options", "questions")  # of every reward function, in this order
Function = Callable[..., Iterable[float]]


class RewardError(RuntimeError):
    """A user's function that failed on every row, or that does not return one value for each."""


def started(config: RewardConfig, rewards: "Rewards | None" = None) -> AbstractContextManager["Judge | None"]:
    """`rewards`, or the function of `reward.fn` in a worker that lives as long as the context; None where the rule pays."""
    if rewards is None:
        return UserReward(config) if config.fn else nullcontext()
    if other := [name for name in ("fn", "random", "leak_penalty", "before_penalty") if getattr(config, name)]:
        raise ConfigError(f"reward.{other[0]}: {getattr(config, other[0])}: rewards=[…] alone say what is paid; take one of the two out")
    return nullcontext(rewards)


class Judge(Protocol):
    """What pays in place of the rule."""

    def score(self, rows: Sequence[Row]) -> tuple[list[float], dict[int, str]]:
        """See `Scorer.score`."""
        ...


class Scorer:
    """A function of a user that scores completions, called in whatever way `_call` does."""

    name: str
    field = "rewards"  # what named the function
    _deadline = math.inf  # seconds

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
                    raise RewardError(f"{self.field}: {self.name}: {miscounts[0]}, {alone}")
            else:
                failed.update(dict.fromkeys(part, answer["error"]))

        if rows:
            take(range(len(rows)))
        total, broken = map(sum, zip(*gather([len(rows), len(failed)]), strict=True))
        if total and broken == total:
            first = f": {failed[0]}; the first completion is {rows[0][0][:200]!r}" if rows else ""
            raise RewardError(f"{self.field}: {self.name} failed on all {total} completions of a batch{first}")
        return rewards, failed

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        """What `_values` makes of the function's result, or `error`; and the seconds that the function took."""
        raise NotImplementedError


class InProcess(Scorer):
    """A callable of this process."""

    def __init__(self, function: Function):
        self.name, self._function = name_of(function), function
        self._parameters = _parameters(function)

    def _call(self, rows: list[Row], seconds: float) -> tuple[dict[str, Any], float]:
        columns = dict(zip(ARGUMENTS, zip(*rows, strict=True), strict=True)) | {"options": [list(row[2]) for row in rows]}
        try:
            return _values(self._function(**{name: list(columns[name]) for name in self._parameters}), len(rows)), 0.0
        except Exception as e:
            return {"error": _reason(e)}, 0.0


class Rewards:
    """Callables of this process: the reward of a completion is the sum of what they return, each times its weight.

    `rewards`: one callable, or a sequence of callables and of pairs (callable, weight). Raises `ConfigError` for anything else, and for a
    callable that needs an argument which is none of `ARGUMENTS`.
    """

    def __init__(self, rewards: Function | Sequence[Function | tuple[Function, float]]):
        items = [rewards] if callable(rewards) else list(rewards)
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in items]
        for pair in pairs:
            if len(pair) != 2 or not callable(pair[0]) or not isinstance(_number(pair[1]), float):
                remedy = "give a callable, or a pair of a callable and its weight, such as (reward, 0.5)"
                raise ConfigError(f"rewards: {reprlib.repr(pair[0] if len(pair) == 2 and pair[1] == 1.0 else pair)}: {remedy}")
        if not pairs:
            raise ConfigError("rewards: [] pays nothing; give a callable, or leave rewards out: then the rule of `reward` pays")
        self._weighted = [(InProcess(function), float(weight)) for function, weight in pairs]
        digests = [_source(function) for function, _ in pairs]
        self.record = [  # for inputs.json
            {"name": judge.name, "weight": weight, "sha256": digest}
            for (judge, weight), digest in zip(self._weighted, digests, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> tuple[list[float], dict[int, str]]:
        """As `Scorer.score`: a row fails where one of the callables fails on it."""
        total, failed = [0.0] * len(rows), {}
        for judge, weight in self._weighted:
            values, reasons = judge.score(rows)
            total = [sum_so_far + weight * value for sum_so_far, value in zip(total, values, strict=True)]
            failed = {row: f"{judge.name}: {reason}" for row, reason in reasons.items()} | failed
        return total, failed


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
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if unknown := [name for name in needed if name not in ARGUMENTS]:
        remedy = f"there are {', '.join(ARGUMENTS)}; rename it, or give it a default"
        raise ConfigError(f"rewards: {name_of(function)} needs an argument {unknown[0]!r}, which it is not called with; {remedy}")
    return [name for name in ARGUMENTS if name in known]


def _source(function: Any) -> str | None:
    """SHA-256 of a callable's source text, without what a closure holds; None where Python has no text of it."""
    if isinstance(function, functools.partial):
        return _source(function.func)
    try:
        text = inspect.getsource(function if inspect.isroutine(function) or inspect.isclass(function) else type(function))
    except (OSError, TypeError):  # built in, or typed into a plain interpreter
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class UserReward(Scorer):
    """The function of `reward.fn` in its worker, which is started here, and again whenever it had to be ended.

    Python would wait for it at its own end: use it as a context manager, or `close` it. Raises `ConfigError` if the function cannot be
    imported.
    """

    field = "reward.fn"

    def __init__(self, config: RewardConfig):
        self.name, self._deadline = str(config.fn), config.deadline
        self._start()

    def __enter__(self) -> "UserReward":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

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
            answer = {"error": _reason(e)}
        pipe.send_bytes(json.dumps(answer).encode())


def _reason(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})"[:500]


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

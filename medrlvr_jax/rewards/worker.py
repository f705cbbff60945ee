"""How a user's function is called, and the worker process that calls one: user.py says what follows."""

import asyncio
import functools
import importlib
import inspect
import json
import math
import os
import reprlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from medrlvr_jax.host.errors import ConfigError

LARGEST = float.fromhex("0x1.fffffep127")  # of a float32

Row = tuple[str, str, Sequence[str], str]  # completion, key, options, question
ARGUMENTS: tuple[str, ...] = (
    "completions",
    "keys",
    "options",
    "questions",
)  # of every reward function, in this order
ARGUMENTS_OF_ONE: tuple[str, ...] = ("completion", "key", "options", "question")  # of a coroutine function
Function = Callable[..., Iterable[float] | Awaitable[float]]


def name_of(function: Function) -> str:
    """The name of a callable as its source has it; of an object, that of its class."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__qualname__", type(function).__qualname__)


def is_coroutine(function: Any) -> bool:
    call = getattr(type(function), "__call__", None)  # noqa: B004  (of an object of a class)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


async def awaited(
    function: Any, names: Sequence[str], rows: Sequence[Row], seconds: float, concurrency: int
) -> dict[str, Any]:
    """`values_of` of a coroutine function's calls, one for each row."""
    gate = asyncio.Semaphore(concurrency)

    async def call(row: Row) -> float | str:
        async with gate:
            arguments: dict[str, Any] = dict(zip(ARGUMENTS_OF_ONE, row, strict=True))
            try:
                return number_of(await function(**{name: arguments[name] for name in names}))
            except Exception as e:
                return reason_of(e)

    calls = [asyncio.ensure_future(call(row)) for row in rows]
    done, waiting = await asyncio.wait(calls, timeout=None if seconds == math.inf else seconds)
    for task in waiting:
        task.cancel()
    late = f"it took longer than {seconds:.3g} s"
    return {"values": [task.result() if task in done else late for task in calls]}


def parameters_of(function: Function, arguments: Sequence[str]) -> list[str]:
    """Those of `arguments` that the callable takes by keyword."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = set(arguments)
    else:
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unknown := [name for name in needed if name not in arguments]:
        remedy = f"there are {', '.join(arguments)}; rename it, or give it a default"
        problem = f"{name_of(function)} needs an argument {unknown[0]!r}, which it never gets"
        raise ConfigError(f"rewards: {problem}; {remedy}")
    return [name for name in arguments if name in known]


def reason_of(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})"[:500]


def values_of(result: Any, n: int) -> dict[str, Any]:
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


def work(name: str, pipe: Any, parent: int) -> None:
    """The worker: one line of JSON in, one out; no pickles. It outlives neither its parent nor the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these go to a whole job; the run ends its worker itself
        signal.signal(number, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is the run's
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    sys.path.insert(0, os.getcwd())
    try:
        function = _find(name)
        coroutine = is_coroutine(function)
        names = parameters_of(function, ARGUMENTS_OF_ONE) if coroutine else ()
        pipe.send_bytes(json.dumps({"coroutine": coroutine}).encode())
    except BaseException as e:
        pipe.send_bytes(json.dumps({"error": f"{type(e).__name__}: {e}"}).encode())
        return
    while True:
        try:
            rows, seconds, concurrency = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if coroutine:
                answer = asyncio.run(awaited(function, names, rows, seconds, concurrency))
            else:
                columns = (list(column) for column in zip(*rows, strict=True))
                answer = values_of(function(*columns), len(rows))
        except BaseException as e:
            answer = {"error": reason_of(e)}
        pipe.send_bytes(json.dumps(answer).encode())


def _find(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
        raise TypeError(f"{attribute} is {type(function).__name__}, not a function")
    return function


def _watch(parent: int) -> None:
    """A function that hangs hears nothing of the pipe: end with the parent, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

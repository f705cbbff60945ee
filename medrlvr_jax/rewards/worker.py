"""Call a user's reward function, in this process or in a worker. user.py says what happens on failures."""

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
Function = Callable[..., Iterable[float] | Awaitable[float]]
ARGUMENTS = ("completions", "keys", "options", "questions")  # of a function of N rows, in this order
COROUTINE_ARGUMENTS = ("completion", "key", "options", "question")  # of a coroutine function of one row


def function_name(function: Function) -> str:
    """Return the name of a function as in its source, or the name of an object's class."""
    if isinstance(function, functools.partial):
        return function_name(function.func)
    return getattr(function, "__qualname__", type(function).__qualname__)


def is_coroutine(function: Any) -> bool:
    call = getattr(type(function), "__call__", None)  # noqa: B004  (an object may have an async __call__)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


async def call_coroutine(
    function: Any, names: Sequence[str], rows: Sequence[Row], seconds: float, concurrency: int
) -> dict[str, Any]:
    """Call a coroutine function once for each row, and return the results as `check_values` does."""
    gate = asyncio.Semaphore(concurrency)

    async def call(row: Row) -> float | str:
        async with gate:
            arguments: dict[str, Any] = dict(zip(COROUTINE_ARGUMENTS, row, strict=True))
            try:
                return to_number(await function(**{name: arguments[name] for name in names}))
            except Exception as e:
                return describe_error(e)

    calls = [asyncio.ensure_future(call(row)) for row in rows]
    done, unfinished = await asyncio.wait(calls, timeout=None if seconds == math.inf else seconds)
    for task in unfinished:
        task.cancel()
    late = f"it took longer than {seconds:.3g} s"
    return {"values": [task.result() if task in done else late for task in calls]}


def accepted_arguments(function: Function, arguments: Sequence[str]) -> list[str]:
    """Return those of `arguments` that the callable takes by keyword.

    Raises `ConfigError` if the callable needs any other argument.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = set(arguments)
    else:
        accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unknown := [name for name in needed if name not in arguments]:
        remedy = f"there are {', '.join(arguments)}; rename it, or give it a default"
        problem = f"{function_name(function)} needs an argument {unknown[0]!r}, which it never gets"
        raise ConfigError(f"rewards: {problem}; {remedy}")
    return [name for name in arguments if name in accepted]


def describe_error(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})"[:500]


def check_values(result: Any, n: int) -> dict[str, Any]:
    """Return what a function returned for n completions, as `{"values"}` or `{"error"}`.

    `values` has a float for each completion, or a str that says what is wrong with its value. `error` says
    why no value belongs to a completion; `miscounted` is there if their number is wrong.
    """
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | Set):
        shown = reprlib.repr(result)
        return {"error": f"it returned {shown}, which is not one number for each completion, in their order"}
    values = list(result)
    if len(values) != n:
        plural = "s" * (len(values) != 1)
        return {"error": f"it returned {len(values)} value{plural} for {n} completions", "miscounted": True}
    return {"values": [to_number(value) for value in values]}


def to_number(value: Any) -> float | str:
    """Return the value as a float, or a str that says why it is not a finite float32."""
    try:
        if isinstance(value, str | bytes) or getattr(value, "shape", ()) != ():
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return f"it returned {reprlib.repr(value)}, which is not a number"
    return number if abs(number) <= LARGEST else f"it returned {number}"


def run_worker(name: str, pipe: Any, parent: int) -> None:
    """Serve requests from the pipe until it is closed or the parent process has ended.

    Requests and replies are JSON (no pickles).
    """
    # A job's signals reach all of its processes. The run itself ends its worker.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator belongs to the run
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    sys.path.insert(0, os.getcwd())
    try:
        function = _import_function(name)
        coroutine = is_coroutine(function)
        names = accepted_arguments(function, COROUTINE_ARGUMENTS) if coroutine else ()
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
                reply = asyncio.run(call_coroutine(function, names, rows, seconds, concurrency))
            else:
                columns = (list(column) for column in zip(*rows, strict=True))
                reply = check_values(function(*columns), len(rows))
        except BaseException as e:
            reply = {"error": describe_error(e)}
        pipe.send_bytes(json.dumps(reply).encode())


def _import_function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
        raise TypeError(f"{attribute} is {type(function).__name__}, not a function")
    return function


def _exit_with_parent(parent: int) -> None:
    """End this process once the parent has ended. A function that hangs does not notice a closed pipe."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

"""Run several processes as one program with `jax.distributed`: connect, exchange small values, end together.

All processes run the same command; process 0 writes the files. Besides success, a run ends in three ways:
- A process fails. It sends its number and the reason to the others, which then stop: at once for a refused
  setting, else after `HEARTBEAT` + 10 seconds, since the death of a third process may have caused the error.
  In this case JAX names the third process (`abort`).
- A process disappears (killed, machine lost). After `HEARTBEAT` seconds JAX's coordination service names it
  by its number and ends all others. Process 0 is that service: if it disappears, the others end at once.
- A process receives a signal after training has begun. All processes stop after the same step (`log.Run`).
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental.multihost_utils import process_allgather

from medrlvr_jax.host.errors import ConfigError, MedrlvrError

JOIN = 300  # seconds to wait for the other processes at the start
HEARTBEAT = 30  # seconds of silence after which a process counts as dead
SHUTDOWN = 300  # seconds to wait for the others at the end
GRACE = 3  # seconds that a failing process, and process 0, wait so that the others receive the reason
FAILURE = "medrlvr/left"  # key of a failing process's number, host, exit status and reason


def initialize() -> None:
    """Connect to the other processes. Call this before any other function of JAX.

    Uses JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID if all three
    are set, else what JAX detects: Cloud TPU, GKE, SLURM, Open MPI. Under SLURM, JAX gives each task the GPU
    of its SLURM_LOCALID. Raises `ConfigError` if there is no cluster, or the address has no port.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, which log.Run handles
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = map(os.environ.get, names)
    if address and not address.rpartition(":")[2].isdigit():
        remedy = f"write it as host:port, such as {address.rstrip(':')}:1234"
        raise ConfigError(f"{names[0]}: {address}: the port that process 0 listens on is missing; {remedy}")
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
            cluster_detection_method="deactivate" if address and count and index else None,
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except ValueError as e:
        remedy = f"set {', '.join(names)} for each process"
        raise ConfigError(f"--distributed: JAX detects no cluster ({e}); {remedy}") from None
    threading.Thread(target=_watch_failures, daemon=True).start()
    devices = f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}"
    lines = gather(f"{socket.gethostname()}, pid {os.getpid()}, {devices}")
    if jax.process_index() == 0:
        print("\n".join(f"process {i}: {text}" for i, text in enumerate(lines)), file=sys.stderr, flush=True)


@contextmanager
def distributed_run() -> Iterator[None]:
    """Connect, run the block, and end all processes together: they wait for each other, or all abort."""
    initialize()
    try:
        yield
    except BaseException as e:
        abort(e)
    jax.distributed.shutdown()


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of the processes, on each of them.

    All must call it at the same point. `value` is anything that JSON can represent.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(data)))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few shapes to compile
    padded[: len(data)] = data
    rows = zip(process_allgather(padded), sizes, strict=True)
    return [json.loads(row[:size].tobytes()) for row, size in rows]


def gather_rows(rows: list[tuple[int, Any]]) -> list[Any]:
    """Return the rows of all processes, sorted by their numbers. All must call it at the same point."""
    return [row for _, row in sorted(chain.from_iterable(gather(rows)), key=lambda pair: pair[0])]


def from_leader(compute: Callable[[], Any]) -> Any:
    """Return process 0's result of `compute` on every process. All must call it at the same point.

    It is for decisions that depend on the disk, since network file systems show changes to other machines
    with a delay. The result is anything that JSON can represent.
    """
    return gather(compute() if jax.process_index() == 0 else None)[0]


def require_equal(compute: Callable[[], dict[str, Any]]) -> None:
    """Raise `ConfigError` if processes have read different values. All must call it at the same point.

    `compute` returns, by name, the settings, files and other inputs that each process reads itself and that
    become part of replicated arrays. JAX never compares the copies of such an array, so processes with
    different inputs would silently train different weights.
    """
    if jax.process_count() == 1:
        return
    hosts, values = zip(*gather([socket.gethostname(), compute()]), strict=True)
    for index, mine in enumerate(values):
        names = sorted(mine.keys() | values[0].keys())
        if name := next((name for name in names if mine.get(name) != values[0].get(name)), None):
            a, b = (f"{values[i].get(name)!r} in process {i} on {hosts[i]}" for i in (index, 0))
            raise ConfigError(f"{name}: {a}, {b}; give all processes the same command and the same files")


def abort(error: BaseException) -> NoReturn:
    """End this process and all others because of `error`. A `MedrlvrError` prints no traceback."""
    index, host = jax.process_index(), socket.gethostname()
    name = f"process {index} on {host}"
    if isinstance(error, MedrlvrError):
        print(f"medrlvr: {name}: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    if isinstance(error, Exception) and not isinstance(error, ConfigError):
        # Another process's death may have broken a collective. JAX then names that process and ends this one.
        wait = HEARTBEAT + 10
        waiting = f"waiting {wait} s for a report of which process failed"
        print(f"medrlvr: {name}: {waiting}", file=sys.stderr, flush=True)
        time.sleep(wait)
    status = 2 if isinstance(error, ConfigError) else 1
    failure = json.dumps([index, host, status, f"{type(error).__name__}: {error}"])
    try:
        _client().key_value_set(FAILURE, failure)
        time.sleep(GRACE)
    except jax.errors.JaxRuntimeError:  # another process has failed first, and sent its own reason
        time.sleep(GRACE if index == 0 else 0)
    _exit(status)


def _watch_failures() -> None:
    while True:
        try:
            failure = _client().blocking_key_value_get(FAILURE, 3_600_000)
            break
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                return  # the run is over
    index, host, status, reason = json.loads(failure)
    if index != (me := jax.process_index()):
        stopped = f"process {index} on {host} stopped, so process {me} stops, too"
        print(f"medrlvr: {stopped}: {reason}", file=sys.stderr)
        time.sleep(GRACE if me == 0 else 0)
        _exit(status)


def _exit(status: int) -> NoReturn:
    """Exit without Python's own shutdown, which would wait for processes that have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _client() -> Any:
    """Return the coordination service's key-value store. JAX has no public name for it."""
    return distributed.global_state.client

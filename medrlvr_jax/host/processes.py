"""Several processes as one program, by `jax.distributed` alone: how they find each other, share small facts, and end together.

All run the same command; process 0 writes what is written once. Three ways to an end:
- a process that fails says so to the others, which stop, naming it and its reason: at once for a refused setting, else after
  `HEARTBEAT` + 10 seconds, since the error may come of the death of a third process, which is to be named instead (`abort`);
- a process that vanishes (killed, machine lost) is named by its number by JAX's coordination service once it has been silent for
  `HEARTBEAT` seconds, and the service then ends all others; if it was process 0, which is that service, they end at once;
- a signal to any of them, once steps are made, stops all after the same one (`log.Run`).
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
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental.multihost_utils import process_allgather

from medrlvr_jax.host.errors import ConfigError

JOIN = 300  # seconds that a process waits for the others at the start
HEARTBEAT = 30  # seconds of silence after which a process counts as dead
SHUTDOWN = 300  # seconds that a process which is done waits for the others
GRACE = 3  # seconds that a failing process, and process 0, stay so that all can hear why
LEFT = "medrlvr/left"  # the key under which a failing process leaves its number, exit status and reason


def initialize() -> None:
    """Find the other processes; call it before anything else of JAX.

    By JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID where all three are set, else by what
    JAX itself knows: Cloud TPU, GKE, SLURM, Open MPI. Under SLURM, JAX then gives each task one GPU, that of its SLURM_LOCALID.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is log.Run's
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
        raise ConfigError(f"--distributed: no cluster that JAX knows was found ({e}); set {', '.join(names)} for each process") from None
    threading.Thread(target=_listen, daemon=True).start()
    who = gather(f"{socket.gethostname()}, pid {os.getpid()}, {jax.local_device_count()} × {jax.local_devices()[0].device_kind}")
    if jax.process_index() == 0:
        print("\n".join(f"process {i}: {text}" for i, text in enumerate(who)), file=sys.stderr, flush=True)


@contextmanager
def distributed_run(expected: tuple[type[BaseException], ...]) -> Iterator[None]:
    """`initialize`, and an end in common: in good order, where each waits for the others, or by `abort`."""
    initialize()
    try:
        yield
    except BaseException as e:
        abort(e, expected)
    jax.distributed.shutdown()


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order, on each of them: anything that JSON holds. All must call it at the same point."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(data)))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # a power of two, so that few shapes are compiled
    padded[: len(data)] = data
    return [json.loads(row[:size].tobytes()) for row, size in zip(process_allgather(padded), sizes, strict=True)]


def from_leader(look: Callable[[], Any]) -> Any:
    """What process 0 finds, on every process: anything that JSON holds. All must call it at the same point.

    For all that is decided by the state of a disk: network file systems show a change to other machines only after a while.
    """
    return gather(look() if jax.process_index() == 0 else None)[0]


def require_equal(look: Callable[[], dict[str, Any]]) -> None:
    """Refuse what is not the same everywhere: `look` says, by name, what this process has read. All must call it at the same point.

    For settings, files and all else that each process reads for itself and that becomes part of arrays which several hold: JAX never
    compares their copies, so a run whose processes read different files would go on, with other weights in each.
    """
    if jax.process_count() == 1:
        return
    hosts, views = zip(*gather([socket.gethostname(), look()]), strict=True)
    for index, view in enumerate(views):
        if other := [name for name in sorted(view.keys() | views[0].keys()) if view.get(name) != views[0].get(name)]:
            here, first = (f"{v.get(other[0])!r} in process {i} on {hosts[i]}" for i, v in ((index, view), (0, views[0])))
            raise ConfigError(f"{other[0]}: {here}, {first}; give all processes the same command and the same files")


def abort(error: BaseException, expected: tuple[type[BaseException], ...]) -> NoReturn:
    """End this process because of `error`, and all others with it. The `expected` ones say enough without a traceback."""
    me = f"process {jax.process_index()} on {socket.gethostname()}"
    if isinstance(error, expected):
        print(f"medrlvr: {me}: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    if isinstance(error, Exception) and not isinstance(error, ConfigError):
        # Perhaps it comes of a collective that broke because another process died: then the service names that one, and ends this one.
        print(f"medrlvr: {me}: waiting {HEARTBEAT + 10} s for word of which process failed", file=sys.stderr, flush=True)
        time.sleep(HEARTBEAT + 10)
    status = 2 if isinstance(error, ConfigError) else 1
    try:
        _client().key_value_set(LEFT, json.dumps([jax.process_index(), socket.gethostname(), status, f"{type(error).__name__}: {error}"]))
        time.sleep(GRACE)
    except jax.errors.JaxRuntimeError:
        time.sleep(GRACE if jax.process_index() == 0 else 0)  # another has left before, for a reason of its own
    _end(status)


def _listen() -> None:
    while True:
        try:
            said = _client().blocking_key_value_get(LEFT, 3_600_000)
            break
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                return  # the run is over
    index, host, status, reason = json.loads(said)
    if index != jax.process_index():
        print(f"medrlvr: process {index} on {host} stopped, so this one, process {jax.process_index()}, does: {reason}", file=sys.stderr)
        time.sleep(GRACE if jax.process_index() == 0 else 0)
        _end(status)


def _end(status: int) -> NoReturn:
    """Without Python's own end, which would wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _client() -> Any:
    """The coordination service's key-value store, for which JAX has no public name (Orbax takes it from here too)."""
    return distributed.global_state.client

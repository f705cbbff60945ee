"""What a run writes beside its checkpoints: its folder and lock, JSON lines, progress, trackers, the summary.

    runs/<name>/config.yaml     the resolved settings, after a line that names the command
                inputs.json     digests of what the settings point to (inputs.py)
                metrics.jsonl   one object a step; step 0 is the evaluation before training
                samples.jsonl   some completions, every few steps
                summary.json    at the end
                checkpoints/    checkpoint.py

Process 0 alone writes these. Each step stands exactly once in the two logs, whatever kills the run, because of one order:
the records of step k are on the disk before checkpoint k is begun (`Run.record`, then `Checkpoints.save`), and a run that goes on
from checkpoint k first drops the records after k (`Run.resume`). Record k and checkpoint k both belong to the k-th step: 1, 2, ….
"""

import fcntl
import importlib.metadata
import itertools
import os
import platform
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

import medrlvr_jax
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import gather
from medrlvr_jax.runs.console import Console, Tracker, before_after

Records = list[dict[str, Any]]
COMMAND = "# medrlvr "  # begins a run's config.yaml, and the name of the command that made it follows
LOGS = ("metrics", "samples", "questions")
MAY_CHANGE = ("runs", "steps", "passes", "checkpoint", "log", "eval", "mesh")  # settings that a resumed run may have new


class Run:
    """One training's records, from `with` to `finish`: what the training loop says here goes to files, console and trackers.

    Entering makes `runs/<name>` or reopens it; refused while another process has it, or if it was begun with other settings,
    or by another command (train or sft): the one's checkpoint is no start of the other.
    The first SIGINT or SIGTERM sets `stopping` once the step is recorded (or the programs are compiled), so that the loop can save and
    leave; the second kills.
    """

    def __init__(self, config: Config, steps: int, data: dict[str, Any] | None = None, command: str = "train"):
        self.path = Path(config.runs) / config.name
        self.meta = {"config": configs.to_tree(config), "versions": versions(), "data": data or {}}
        self.stopping = False
        self._config, self._steps, self._began = config, steps, time.time()
        self._lock = open_folder(self.path, config, command) if jax.process_index() == 0 else None
        self._console = Console(steps)
        self._tracker: Tracker | None = None
        self._signal, self._asked, self._done = 0, False, 0

    def __enter__(self) -> "Run":
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()  # Python's own rule
        # None: a handler that was not set by Python, which Python cannot put back
        self._handlers = {s: signal.signal(s, self._on_signal) or signal.SIG_DFL for s in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._tracker:
            self._tracker.close()
        self._console.close()
        if self._lock:
            self._lock.close()  # which gives the lock back

    def stop(self) -> None:
        """As a signal would: `stopping` is set in all processes by the next `check_signals`."""
        self._asked = True

    def _on_signal(self, number: int, _: Any) -> None:
        self._signal = number
        for s, handler in self._handlers.items():
            signal.signal(s, handler)
        self.notify(f"{signal.Signals(number).name}: stopping after this step; once more stops at once, without a checkpoint")

    def resume(self, done: int) -> int:
        """Go back to where checkpoint `done` was made; 0 is a start with empty logs. Returns how many of the last steps were skipped."""
        skips = 0
        if self._lock:
            for name in LOGS:
                files.rewind(self.path / f"{name}.jsonl", done)
            if done:
                skips = sum(1 for _ in itertools.takewhile(skipped, reversed(files.read_jsonl(self.path / "metrics.jsonl"))))
        self._done, self._tracker = done, Tracker(self.path, self._config, done)
        if done:
            self.notify(f"{self.path}: going on after step {done}")
        return gather(skips)[0]

    def history(self, n: int) -> Records:
        """The last `n` records of the steps that are done, the same in every process; after `resume`."""
        path = self.path / "metrics.jsonl"
        records = [r for r in files.read_jsonl(path) if r["step"]] if self._lock and path.exists() else []
        return gather(records[-n:])[0]

    def record(self, step: int, metrics: dict[str, Any], **logs: Iterable[dict[str, Any]]) -> None:
        """A step is done. On the disk when this returns; each of `logs` in a file of its name, one of `LOGS`."""
        if metrics.get("seconds") and "tokens" in metrics:
            metrics = metrics | {"tokens_per_second": metrics["tokens"] / metrics["seconds"]}
        if self._lock:
            for name, rows in (logs | {"metrics": [metrics]}).items():
                files.append(self.path / f"{name}.jsonl", [{"step": step, **row} for row in rows])
        if self._tracker:
            self._tracker.log(step, metrics)
        self._console.step(step, metrics)
        self._done = step
        self.check_signals()

    def check_signals(self) -> None:
        """Set `stopping` in all processes alike, whichever of them a signal or `stop` has reached."""
        self.stopping = _any_process(bool(self._signal) or self._asked)

    def notify(self, text: str) -> None:
        self._console.notify(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self._console.progress(what, done, total)

    def finish(self) -> dict[str, Any]:
        """Write and return the summary; of a run that was stopped before its end, how far it is, and the exit status that its
        signal asks for; 0 if `stop` was called."""
        if self.stopping and self._done < self._steps:
            self.notify("stopped; the same command goes on from here")
            status = 0 if self._asked and not self._signal else 128 + (self._signal or signal.SIGTERM)
            return {"name": self._config.name, "steps": self._steps, "done": self._done, "exit_status": status}
        if not self._lock:
            return {}
        records = files.read_jsonl(self.path / "metrics.jsonl")
        summary = {"name": self._config.name, "steps": self._steps, "seconds": time.time() - self._began, "eval": before_after(records)}
        files.write_json(self.path / "summary.json", summary | {"last": records[-1] if records else {}} | self.meta)
        return summary


def skipped(metrics: dict[str, Any]) -> bool:
    """Whether one of the step's updates was not finite, and so not taken."""
    return any(value > 0 for name, value in metrics.items() if name.split("/")[-1] == "skipped")


def _any_process(asked: bool) -> bool:
    """All processes stop after the same step, whichever of them the signal has reached."""
    return asked if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(asked)).any())


# --- the run's folder ------------------------------------------------------------------------------------------------


def open_folder(path: Path, config: Config, command: str) -> TextIO:
    """Make or reopen a run's folder. Returns its lock, held until that is closed."""
    with files.named_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
    try:
        if (path / "config.yaml").exists():
            if (by := begun_by(path)) not in (None, command):
                other = "which would go on from the other's checkpoint; give this run another name="
                raise ConfigError(f"name: {path} was begun by `medrlvr {by}`, and this is `medrlvr {command}`, {other}")
            check_same(path / "config.yaml", config)
        files.write_text(path / "config.yaml", f"{COMMAND}{command}\n{configs.dump(config)}")
    except BaseException:
        lock.close()
        raise
    return lock


def begun_by(path: Path) -> str | None:
    """`train` or `sft`, by the first line of a run's config.yaml; of a folder from before there was one, by what its steps recorded."""
    first = (path / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    if first.startswith(COMMAND):
        return first.removeprefix(COMMAND).strip()
    steps = [r for r in files.read_jsonl(path / "metrics.jsonl") if r["step"]] if (path / "metrics.jsonl").exists() else []
    return ("train" if "reward" in steps[-1] else "sft") if steps else None


def _take_lock(path: Path) -> TextIO:
    """The kernel gives a flock back when its process ends, however it ends: there are no stale locks to clear."""
    lock = open(path / ".lock", "a+", encoding="utf-8")  # open for as long as the run is
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock)
        lock.close()
        raise ConfigError(f"name: {path} is in use by {holder}; wait for it, stop it, or give this run another name=") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _holder(lock: TextIO) -> str:
    lock.seek(0)
    return f"process {lock.read() or '(starting)'}"


def lock_holder(path: Path) -> str | None:
    """Which process runs in this folder, for messages; None if none does."""
    if not (path / ".lock").exists():
        return None
    with open(path / ".lock", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(lock)
    return None


def check_same(path: Path, config: Config) -> None:
    """One folder holds one experiment: going on with other settings would make a curve of two."""
    remedy = "repair it, or give this run another name="
    old, new = configs.flat(configs.read_yaml(path, remedy) or {}), configs.flat(configs.to_tree(config))
    names = [k for k in sorted(old.keys() | new.keys()) if k.split(".")[0] not in MAY_CHANGE and old.get(k) != new.get(k)]
    if names:
        lines = [f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in names]
        remedy = "give this run another name=, or the settings it was begun with"
        raise ConfigError("\n".join([f"name: {path.parent} was begun with other settings; {remedy}:", *lines]))


# --- what ran --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """What would be needed to run the same thing again: packages, devices, revision."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    devices = jax.devices()
    return {
        "medrlvr_jax": medrlvr_jax.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
    }


def git_revision() -> dict[str, Any] | None:
    """`{"revision", "dirty"}` of the checkout that this package runs from; None when it is installed from elsewhere."""
    root = Path(medrlvr_jax.__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()

    return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}

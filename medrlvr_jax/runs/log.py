"""What a run writes beside its checkpoints: folder and lock, JSON lines, progress, trackers, summary.

    runs/<name>/config.yaml     the resolved settings, after a line that names the command
                inputs.json     digests of the files that the settings name (inputs.py)
                metrics.jsonl   one object a step; step 0 is the evaluation before training
                samples.jsonl   some completions, every few steps
                answers/        answers of the evaluations: <step>/<set>.jsonl
                summary.json    at the end
                checkpoints/    checkpoint.py

Only process 0 writes these. Each step is in the logs exactly once, whenever the run is killed, because of the
order: the records of step k are on the disk before checkpoint k is begun (`Run.record`, then
`Checkpoints.save`), and a run that resumes from checkpoint k first drops the records after k (`Run.resume`).
Record k and checkpoint k both belong to the k-th step: 1, 2, ….
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

import medrlvr_jax
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.images import with_thumbnails
from medrlvr_jax.data.question import Question
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import Records
from medrlvr_jax.host.processes import gather
from medrlvr_jax.runs import trackers
from medrlvr_jax.runs.console import Console, evaluations_by_set

COMMAND = "# medrlvr "  # begins the first line of config.yaml; the command's name follows
LOGS = ("metrics", "samples", "questions")
# settings that a resume may change
MAY_CHANGE = ("runs", "steps", "passes", "checkpoint", "log", "eval", "mesh")


class Run:
    """The records of one training, written to files, the console and trackers.

    Creates or reopens `runs/<name>`. Raises `ConfigError` if another process uses it, or if other settings or
    the other command (train or sft) began it: neither can continue from the other's checkpoint. The first
    SIGINT or SIGTERM sets `stopping` once the step is recorded, or once the programs are compiled, so that
    the loop can save and end. The second kills.
    """

    def __init__(
        self, config: Config, steps: int, data: dict[str, Any] | None = None, command: str = "train"
    ):
        self.path = Path(config.runs) / config.name
        self.meta = {"config": configs.to_tree(config), "versions": versions(), "data": data or {}}
        self.stopping = False
        self._config, self._steps, self._start_time = config, steps, time.time()
        self._lock = open_folder(self.path, config, command) if jax.process_index() == 0 else None
        self._console = Console(steps)
        self._tracker: trackers.Tracker | None = None
        self._signal, self._stop_called, self._done = 0, False, 0

    def __enter__(self) -> "Run":
        in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
        signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        # None: a handler that Python did not set and cannot restore
        self._handlers = {s: signal.signal(s, self._on_signal) or signal.SIG_DFL for s in signals}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self._restore_handlers()
        if self._tracker:
            self._tracker.close(error is not None)
        self._console.close()
        if self._lock:
            self._lock.close()  # releases the lock

    def stop(self) -> None:
        """Stop as a signal would: the next `check_signals` sets `stopping` in all processes."""
        self._stop_called = True

    def _on_signal(self, number: int, _: Any) -> None:
        self._signal = number
        self._restore_handlers()
        pressed = number == signal.SIGINT
        cause = "Ctrl-C was pressed" if pressed else "The system asks for the end (SIGTERM)"
        self.notify(f"{cause}: the run finishes what it is doing, saves, and stops.")
        self.notify("Once more stops it at once; then what came after the last checkpoint is lost.")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def resume(self, done: int) -> int:
        """Drop the records after step `done`, 0: all. Returns how many of the last steps were skipped."""
        skips = 0
        if self._lock:
            for name in LOGS:
                files.rewind(self.path / f"{name}.jsonl", done)
            for folder in self.path.glob("answers/*"):
                if int(folder.name) > done or not done:
                    shutil.rmtree(folder)
            if done:
                records = files.read_jsonl(self.path / "metrics.jsonl")
                skips = sum(1 for _ in itertools.takewhile(skipped, reversed(records)))
        self._done = done
        if self._lock:
            self._tracker = trackers.Tracker(self.path, self._config, done)
        self._console.begin(done)
        if done:
            self.notify(f"{self.path}: going on after step {done}")
        return gather(skips)[0]

    def history(self, n: int) -> Records:
        """The records of the last `n` steps, the same in every process. Call it after `resume`."""
        return gather(_step_records(self.path)[-n:] if self._lock else [])[0]

    def record(self, step: int, metrics: dict[str, Any], **logs: Iterable[dict[str, Any]]) -> None:
        """Write a step's records to the disk before returning; `logs` are rows for others of `LOGS`."""
        if metrics.get("seconds") and "tokens" in metrics:
            metrics = metrics | {"tokens_per_second": metrics["tokens"] / metrics["seconds"]}
        if self._lock:
            for name, rows in (logs | {"metrics": [metrics]}).items():
                files.append(self.path / f"{name}.jsonl", [{"step": step, **row} for row in rows])
        if self._tracker:
            self._tracker.log(step, metrics, list(logs.get("samples", ())))
        self._console.step(step, metrics)
        self._done = step
        self.check_signals()

    def write_answers(self, step: int, name: str, rows: Records, questions: list[Question]) -> None:
        """Write the first answer to `log.answers` questions, spread evenly over an evaluated set; where a run
        first does, with the questions' images.
        """
        first = [row for row in rows if row["sample"] == 0]
        chosen = np.unique(np.linspace(0, len(first) - 1, min(self._config.log.answers, len(first))).round())
        if self._lock and len(chosen):
            file = self.path / "answers" / str(step) / f"{name}.jsonl"
            with files.named_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            shown = [first[int(i)] for i in chosen]
            begun = any(self.path.glob(f"answers/*/{name}.jsonl"))
            files.write_text(file, files.jsonl(shown if begun else with_thumbnails(shown, questions)))

    def check_signals(self) -> None:
        """Set `stopping` in all processes if a signal or `stop` has reached any of them."""
        self.stopping = any(gather(bool(self._signal) or self._stop_called))

    def notify(self, text: str) -> None:
        self._console.notify(text)

    def progress(self, what: str, done: int, total: int, awaited: str = "") -> None:
        self._console.progress(what, done, total, awaited)

    def finish(self) -> dict[str, Any]:
        """Write and return the summary.

        If the run was stopped early: only its progress, and the exit status of its signal, or 0 after `stop`.
        """
        name = self._config.name
        if self.stopping and self._done < self._steps:
            if self._done:
                saved = f"step {self._done} of {self._steps} is saved. The same command goes on from there."
            else:
                saved = "no step was done. The same command starts it again."
            self.notify(f"{self.path} has stopped: {saved}")
            status = 0 if self._stop_called and not self._signal else 128 + (self._signal or signal.SIGTERM)
            return {"name": name, "steps": self._steps, "done": self._done, "exit_status": status}
        if not self._lock:
            return {}
        records = files.read_jsonl(self.path / "metrics.jsonl")
        seconds = time.time() - self._start_time
        summary = {
            "name": name,
            "steps": self._steps,
            "seconds": seconds,
            "eval": evaluations_by_set(records),
        }
        last = {"last": records[-1] if records else {}}
        files.write_json(self.path / "summary.json", summary | last | self.meta)
        return summary


def skipped(metrics: dict[str, Any]) -> bool:
    """Whether the step skipped an update because it was not finite."""
    return any(value > 0 for name, value in metrics.items() if name.split("/")[-1] == "skipped")


def _step_records(path: Path) -> Records:
    """The metrics of a run's steps, without step 0, which is an evaluation."""
    file = path / "metrics.jsonl"
    return [r for r in files.read_jsonl(file) if r["step"]] if file.exists() else []


# --- the run's folder -------------------------------------------------------------------------------------


def open_folder(path: Path, config: Config, command: str) -> TextIO:
    """Create or reopen a run's folder and return its lock, which is held until it is closed."""
    with files.named_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
    try:
        check_folder(path, config, command)
        files.write_text(path / "config.yaml", f"{COMMAND}{command}\n{configs.dump(config)}")
    except BaseException:
        lock.close()
        raise
    return lock


def check(config: Config, command: str) -> None:
    """Refuse, before anything is loaded, what a run of these settings would be refused for when it begins."""
    if jax.process_index() == 0:
        path = Path(config.runs) / config.name
        if holder := lock_holder(path):
            raise ConfigError(_in_use(path, holder))
        check_folder(path, config, command)
        trackers.check(config)


def check_folder(path: Path, config: Config, command: str) -> None:
    """Refuse a folder that another command or other settings began."""
    if not (path / "config.yaml").exists():
        return
    if (by := begun_by(path)) not in (None, command):
        remedy = "which would go on from the other's checkpoint; give this run another name="
        raise ConfigError(
            f"name: {path} was begun by `medrlvr {by}`, and this is `medrlvr {command}`, {remedy}"
        )
    check_same(path / "config.yaml", config)


def begun_by(path: Path) -> str | None:
    """`train` or `sft`, from the first line of config.yaml; of an older version, from the metrics."""
    first = (path / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    if first.startswith(COMMAND):
        return first.removeprefix(COMMAND).strip()
    steps = _step_records(path)
    return ("train" if "reward" in steps[-1] else "sft") if steps else None


def _take_lock(path: Path) -> TextIO:
    """The kernel releases a flock when its process ends, however it ends: there are no stale locks."""
    lock = open(path / ".lock", "a+", encoding="utf-8")  # stays open as long as the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock)
        lock.close()
        raise ConfigError(_in_use(path, holder)) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _in_use(path: Path, holder: str) -> str:
    return f"name: {path} is in use by {holder}; wait for it, stop it, or give this run another name="


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
    """Refuse to resume with settings other than those in the file `path`, but for `MAY_CHANGE`."""
    old = configs.read_yaml(path, "repair it, or give this run another name=") or {}
    trees = (old, configs.to_tree(config))
    then, now = (configs.flat({k: v for k, v in t.items() if k not in MAY_CHANGE}) for t in trees)
    if changed := configs.differences(then, now):
        remedy = "give this run another name=, or the settings it was begun with"
        head = f"name: {path.parent} was begun with other settings; {remedy}:"
        raise ConfigError("\n  ".join([head, *changed]))


# --- versions ---------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Packages, devices and git revision: what is needed to run the same thing again."""
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
    """`{"revision", "dirty"}` of the git checkout that this package runs from; None elsewhere."""
    root = Path(medrlvr_jax.__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"revision": git("rev-parse", "HEAD"), "dirty": dirty}

"""The folder of a run and its logs.

    runs/<name>/config.yaml     all settings, after a line with the name of the command
                inputs.json     digests of the files that the settings name (inputs.py)
                metrics.jsonl   one record per step; step 0 is the evaluation before training
                samples.jsonl   some completions, every few steps
                answers/        answers of the evaluations: <step>/<set>.jsonl
                summary.json    results, written at the end
                checkpoints/    see checkpoint.py

Only process 0 writes these files. Each step is in the logs exactly once, even if the run is killed at any
time: the records of step k are on the disk before the save of checkpoint k starts (`Run.record`, then
`Checkpoints.save`), and a run that resumes from checkpoint k first removes the records after k
(`Run.resume`). Record k and checkpoint k both belong to step k = 1, 2, ….
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

COMMAND = "# medrlvr "  # the start of the first line of config.yaml, before the command's name
LOGS = ("metrics", "samples", "questions")
# Settings that may change between the starts of a run.
MAY_CHANGE = ("runs", "steps", "passes", "checkpoint", "log", "eval", "mesh")


class Run:
    """The log of one training, which is written to files, the console and trackers.

    The constructor creates or reopens `runs/<name>`. It raises `ConfigError` if another process uses the
    folder, or if the run was started with other settings or by the other command (train or sft). The first
    SIGINT or SIGTERM sets `stopping` after the current step or compilation, so that the loop can save and
    end. The second ends the process at once.
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
        # Python allows signal handlers only in the main thread.
        is_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        # signal.signal returns None for a handler that Python did not set and cannot restore
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
        """Stop the run like a signal: the next `check_signals` sets `stopping` in all processes."""
        self._stop_called = True

    def _on_signal(self, number: int, _: Any) -> None:
        self._signal = number
        self._restore_handlers()
        cause = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self.notify(f"{cause}: the run will finish the current step, save and stop.")
        self.notify("A second signal stops it at once. All steps after the last checkpoint are then lost.")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def resume(self, done: int) -> int:
        """Remove the records after step `done`. Return how many of the last steps had skipped updates."""
        skips = 0
        if self._lock:
            for name in LOGS:
                files.rewind(self.path / f"{name}.jsonl", done)
            for folder in self.path.glob("answers/*"):
                if int(folder.name) > done or not done:
                    shutil.rmtree(folder)
            if done:
                records = files.read_jsonl(self.path / "metrics.jsonl")
                skips = sum(1 for _ in itertools.takewhile(has_skipped, reversed(records)))
        self._done = done
        if self._lock:
            self._tracker = trackers.Tracker(self.path, self._config, done)
        self._console.begin(done)
        if done:
            self.notify(f"{self.path}: resuming after step {done}")
        return gather(skips)[0]

    def history(self, n: int) -> Records:
        """Return the records of the last `n` steps, equal in all processes. Call it after `resume`."""
        return gather(_step_records(self.path)[-n:] if self._lock else [])[0]

    def record(self, step: int, metrics: dict[str, Any], **logs: Iterable[dict[str, Any]]) -> None:
        """Write a step's metrics and the rows of other `LOGS`. They are on the disk when this returns."""
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
        """Write the first answer to each of `log.answers` questions, spread evenly over an evaluated set.

        The run's first file of a set also contains the images of the questions.
        """
        first = [row for row in rows if row["sample"] == 0]
        indices = np.unique(np.linspace(0, len(first) - 1, min(self._config.log.answers, len(first))).round())
        if self._lock and len(indices):
            file = self.path / "answers" / str(step) / f"{name}.jsonl"
            with files.named_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            answers = [first[int(i)] for i in indices]
            if not any(self.path.glob(f"answers/*/{name}.jsonl")):
                answers = with_thumbnails(answers, questions)
            files.write_text(file, files.jsonl(answers))

    def check_signals(self) -> None:
        """Set `stopping` in all processes if any of them got a signal or a call of `stop`."""
        self.stopping = any(gather(bool(self._signal) or self._stop_called))

    def notify(self, text: str) -> None:
        self._console.notify(text)

    def progress(self, what: str, done: int, total: int, awaited: str = "") -> None:
        self._console.progress(what, done, total, awaited)

    def finish(self) -> dict[str, Any]:
        """Write and return the summary.

        After an early stop it has only the progress and the exit status: 0 after `stop`, else the signal's.
        """
        name = self._config.name
        if self.stopping and self._done < self._steps:
            saved = f"step {self._done} of {self._steps} is saved" if self._done else "no step was finished"
            self.notify(f"{self.path} has stopped: {saved}. The same command resumes the run.")
            status = 0 if self._stop_called and not self._signal else 128 + (self._signal or signal.SIGTERM)
            return {"name": name, "steps": self._steps, "done": self._done, "exit_status": status}
        if not self._lock:
            return {}
        records = files.read_jsonl(self.path / "metrics.jsonl")
        summary = {"name": name, "steps": self._steps, "seconds": time.time() - self._start_time}
        summary["eval"] = evaluations_by_set(records)
        last = {"last": records[-1] if records else {}}
        files.write_json(self.path / "summary.json", summary | last | self.meta)
        return summary


def has_skipped(metrics: dict[str, Any]) -> bool:
    """Return whether the step skipped an update that was not finite."""
    return any(value > 0 for name, value in metrics.items() if name.split("/")[-1] == "skipped")


def _step_records(path: Path) -> Records:
    """Return the metrics of a run's steps, without step 0, which is an evaluation."""
    file = path / "metrics.jsonl"
    return [r for r in files.read_jsonl(file) if r["step"]] if file.exists() else []


# --- the run's folder -------------------------------------------------------------------------------------


def open_folder(path: Path, config: Config, command: str) -> TextIO:
    """Create or reopen a run's folder. Return its lock, which is held until the file is closed."""
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
    """Raise `ConfigError`, before anything is loaded, if `Run` would refuse these settings later."""
    if jax.process_index() == 0:
        path = Path(config.runs) / config.name
        if holder := lock_holder(path):
            raise ConfigError(_in_use(path, holder))
        check_folder(path, config, command)
        trackers.check(config)


def check_folder(path: Path, config: Config, command: str) -> None:
    """Raise `ConfigError` if the folder's run was started by another command or with other settings."""
    if not (path / "config.yaml").exists():
        return
    if (by := started_by(path)) not in (None, command):
        why = f"was started by `medrlvr {by}` and cannot be resumed by `medrlvr {command}`"
        raise ConfigError(f"name: {path} {why}; give this run another name=")
    check_same(path / "config.yaml", config)


def started_by(path: Path) -> str | None:
    """Return the command that started a run, `train` or `sft`; None if an old run without steps does not say.

    The command is in the first line of config.yaml. Runs of older versions are recognised by their metrics.
    """
    first = (path / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    if first.startswith(COMMAND):
        return first.removeprefix(COMMAND).strip()
    steps = _step_records(path)
    return ("train" if "reward" in steps[-1] else "sft") if steps else None


def _take_lock(path: Path) -> TextIO:
    """Lock a run's folder by flock, which the kernel releases when the process ends in any way."""
    lock = open(path / ".lock", "a+", encoding="utf-8")  # held open until the run ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read_holder(lock)
        lock.close()
        raise ConfigError(_in_use(path, holder)) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _in_use(path: Path, holder: str) -> str:
    return f"name: {path} is in use by {holder}; wait for it, stop it, or give this run another name="


def _read_holder(lock: TextIO) -> str:
    lock.seek(0)
    return f"process {lock.read() or '(starting)'}"


def lock_holder(path: Path) -> str | None:
    """Return the process that runs in this folder, as text for messages, or None."""
    if not (path / ".lock").exists():
        return None
    with open(path / ".lock", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_holder(lock)
    return None


def check_same(path: Path, config: Config) -> None:
    """Raise `ConfigError` if settings outside `MAY_CHANGE` differ from those in the file `path`."""
    old = configs.read_yaml(path, "repair it, or give this run another name=") or {}
    settings = map(configs.settings_of, (old, configs.to_tree(config)))
    before, now = ({k: v for k, v in s.items() if k.split(".")[0] not in MAY_CHANGE} for s in settings)
    if changed := configs.differences(before, now):
        remedy = "give this run another name=, or use the same settings"
        head = f"name: {path.parent} was started with other settings; {remedy}:"
        raise ConfigError("\n  ".join([head, *changed]))


# --- versions ---------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Return versions of packages, devices and git revision, which are needed to repeat a run."""
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
    """Return `{"revision", "dirty"}` if this package runs from a git checkout, else None."""
    root = Path(medrlvr_jax.__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"revision": git("rev-parse", "HEAD"), "dirty": dirty}

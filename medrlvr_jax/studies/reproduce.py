"""`medrlvr reproduce FILE.yaml`: run the cells of a file of arms (arms.py) as processes, then write a table.

`--jobs N` processes run at a time, each on its share of the processor's cores: small models are fastest on
one core each. A finished cell is not run again, and a stopped cell resumes. SIGINT and SIGTERM are sent to
the processes, which save and stop after their steps. If this process is killed, its children finish their
commands, and the same command waits for them when it is started again.
"""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import format_duration
from medrlvr_jax.studies import arms, claims
from medrlvr_jax.studies.arms import Cell

HEARTBEAT = 60  # seconds between reports of progress


def reproduce(path: str, settings: list[str], only: list[str], jobs: int, dry_run: bool) -> int:
    """Run the unfinished cells, then write table.md, table.json and curves.png. Returns the exit status."""
    experiment, cells = arms.read(path, settings)
    if lost := [name for name in only if name not in experiment.arms]:
        raise ConfigError(f"--only: {lost[0]}: no such arm; there are {', '.join(experiment.arms)}")
    arms.check_same(cells)
    chosen = {cell.path for cell in cells if not only or cell.arm in only}
    for cell in reversed(cells):  # a cell comes after the one it starts from
        if cell.parent and cell.path in chosen:
            chosen.add(cell.parent.path)
    wanted = [cell for cell in cells if cell.path in chosen]
    if dry_run:
        rows = [(cell.path.name, cell.by, _state(cell, cell in wanted)) for cell in cells]
        print(tables.plain(("cell", "by", "state"), rows))
        return 0
    runner = Runner(wanted, jobs)
    status = runner.run()
    if not status:
        print(claims.conclude(experiment, [cell for cell in cells if cell.finished], len(cells)))
        print(f"{experiment.folder}: table.md, table.json, curves.png")
    return status or int(bool(runner.failed))


def _state(cell: Cell, wanted: bool) -> str:
    if cell.finished:
        return "finished"
    if cell.beside(".yaml").exists():
        return "started"
    return "to run" if wanted else "left out by --only"


class Runner:
    """Runs cells as processes, at most one on each share of the cores."""

    def __init__(self, wanted: list[Cell], jobs: int):
        all_cores = range(os.cpu_count() or 1)
        cores = sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else all_cores)
        if not 1 <= jobs <= len(cores):
            remedy = f"give 1 to {len(cores)}"
            raise ConfigError(f"--jobs: {jobs} at a time, with {len(cores)} cores here; {remedy}")
        self.shares = [set(cores[i::jobs]) for i in range(jobs)]
        self.todo, self.wanted = [cell for cell in wanted if not cell.finished], wanted
        self.failed: set[Path] = set()
        self.running: dict[int, tuple[Cell, subprocess.Popen, float]] = {}  # by share; with the cell's start
        self.seconds: list[float] = []  # the durations of finished cells
        self.signal = 0

    def run(self) -> int:
        """Run all cells. Returns 0, or 128 + the signal that stopped it."""
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        reported = -math.inf  # the first report comes at once: it names cells that older processes still run
        try:
            while self.running or (self.todo and not self.signal):
                for share in range(len(self.shares)):
                    if share in self.running:
                        self._check(share)
                    elif not self.signal:
                        self._start(share)
                if time.monotonic() - reported > HEARTBEAT:
                    reported = time.monotonic()
                    holders = {cell.path.name: log.lock_holder(cell.path) for cell in self.todo}
                    held = [f"{name} waits for {holder}" for name, holder in holders.items() if holder]
                    progress = [f"{cell.path.name} {_progress(cell)}" for cell, _, _ in self.running.values()]
                    self._report("; ".join(progress + held))
                time.sleep(0.2)
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if self.signal:
            print("stopped; the same command continues from here", file=sys.stderr)
        return 128 + self.signal if self.signal else 0

    def _start(self, share: int) -> None:
        """Start the first cell whose parent is finished and that no older process runs."""
        for cell in list(self.todo):
            if cell.parent and cell.parent.path in self.failed:
                self.todo.remove(cell)
                self.failed.add(cell.path)
                self._report(f"{cell.path.name} is left out, since {cell.parent.path.name} failed")
            elif not (cell.parent and cell.parent.commands()) and not log.lock_holder(cell.path):
                self.todo.remove(cell)
                cell.path.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(cell.beside(".yaml"), cell.record())
                self._spawn(share, cell, time.monotonic())
                return self._report(f"{cell.path.name} starts")

    def _spawn(self, share: int, cell: Cell, start: float) -> None:
        """Start the cell's next command on the share's cores."""
        command = [sys.executable, "-m", "medrlvr_jax", *cell.commands()[0]]
        cache = str((cell.path.parent / ".programs").absolute())  # cells share most programs
        env = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
        pins = hasattr(os, "sched_setaffinity")
        own_cores = os.sched_getaffinity(0) if pins else set()
        with open(cell.beside(".log"), "ab") as out:
            if pins:
                os.sched_setaffinity(0, self.shares[share])  # a child inherits its parent's cores
            # In a new session, Ctrl-C of the terminal reaches only this process, which sends it to the child.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
            if pins:
                os.sched_setaffinity(0, own_cores)
        self.running[share] = cell, process, start

    def _check(self, share: int) -> None:
        """If the share's process has ended, report its cell, or start the cell's next command."""
        cell, process, start = self.running[share]
        if process.poll() is None:
            return
        del self.running[share]
        if process.returncode and not self.signal:
            self.failed.add(cell.path)
            file = cell.beside(".log")
            tail = file.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            head = f"{cell.path.name} failed with exit status {process.returncode}; {file} ends:"
            self._report("\n    ".join([head, *tail]))
        elif cell.finished:
            self.seconds.append(time.monotonic() - start)
            self._report(f"{cell.path.name} is finished after {format_duration(self.seconds[-1])}")
        elif not self.signal:
            self._spawn(share, cell, start)

    def _stop(self, number: int, _: Any) -> None:
        self.signal = number
        for cell, process, _ in self.running.values():
            process.send_signal(signal.SIGINT)
            name = f"{signal.Signals(number).name}: {cell.path.name}"
            print(f"{name} stops after its step; a second signal stops it at once", file=sys.stderr)

    def _report(self, text: str) -> None:
        done, open_cells = sum(c.finished for c in self.wanted), len(self.todo) + len(self.running)
        left = format_duration(mean(self.seconds) * open_cells / len(self.shares)) if self.seconds else None
        more = f"; about {left} left" if open_cells and left else ""
        print(f"{done}/{len(self.wanted)} cells: {text}{more}", file=sys.stderr, flush=True)


def _progress(cell: Cell) -> str:
    """Return the step that the cell's run has reached."""
    file = cell.path / "metrics.jsonl"
    records = files.read_jsonl(file) if file.exists() else []
    total = f"/{cell.config.steps}" if cell.config.steps else ""
    return f"step {records[-1]['step']}{total}" if records else "starts"

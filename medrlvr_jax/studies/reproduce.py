"""`medrlvr reproduce FILE.yaml`: the cells of a file of arms (arms.py) as processes of their own, then the table of them (claims.py).

`--jobs N` at a time, each on its share of the processor's cores: small models run best one to a core. A finished cell is not run again,
one that was stopped goes on. SIGINT and SIGTERM are passed on: each run saves and stops after its step. If this process is killed, its
children go on to the end of their command, and the same command again waits for them.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from statistics import mean, median
from typing import Any

from medrlvr_jax.host import files, tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.runs import log
from medrlvr_jax.runs.console import clock
from medrlvr_jax.studies import arms, claims
from medrlvr_jax.studies.arms import Cell

HEARTBEAT = 60  # seconds between lines that say how far the cells are


def reproduce(path: str, settings: list[str], only: list[str], jobs: int, dry_run: bool) -> int:
    """Run what is not finished, then write table.md, table.json and curves.png; the exit status."""
    experiment, cells = arms.read(path, settings)
    if lost := [name for name in only if name not in experiment.arms]:
        raise ConfigError(f"--only: {lost[0]}: no such arm; there are {', '.join(experiment.arms)}")
    arms.check_same(cells)
    names = {cell.path for cell in cells if not only or cell.arm in only}
    for cell in reversed(cells):  # what they start from stands before them
        names |= {cell.parent.path} if cell.parent and cell.path in names else set()
    wanted = [cell for cell in cells if cell.path in names]
    if dry_run:
        rows = []
        for cell in cells:
            begun = "begun" if cell.beside(".yaml").exists() else "to run"
            state = "finished" if cell.finished else begun if cell in wanted else "left out by --only"
            rows.append((cell.path.name, cell.by, state))
        print(tables.plain(("cell", "by", "state"), rows))
        return 0
    runner = Runner([cell for cell in wanted if not cell.finished], wanted, jobs)
    status = runner.run()
    if not status:
        print(claims.conclude(experiment, [cell for cell in cells if cell.finished], len(cells)))
        print(f"{experiment.folder}: table.md, table.json, curves.png")
    return status or int(bool(runner.failed))


class Runner:
    """The processes: at most one to each share of the cores."""

    def __init__(self, todo: list[Cell], every: list[Cell], jobs: int):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        if not 1 <= jobs <= len(cores):
            raise ConfigError(f"--jobs: {jobs} at a time, with {len(cores)} cores here; give 1 to {len(cores)}")
        self.shares = [set(cores[i::jobs]) for i in range(jobs)]
        self.todo, self.every, self.failed = list(todo), every, set()
        self.running: dict[int, tuple[Cell, subprocess.Popen, float]] = {}  # by share
        self.signal = 0

    def run(self) -> int:
        """0 when nothing is left to do, or 128 + the signal that stopped it."""
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        said = -math.inf  # at once, for what is held by processes left from before
        try:
            while self.running or (self.todo and not self.signal):
                for share in range(len(self.shares)):
                    if share in self.running:
                        self._look(share)
                    elif not self.signal:
                        self._start(share)
                if time.monotonic() - said > HEARTBEAT:
                    said = time.monotonic()
                    held = [f"{c.path.name} waits for {holder}" for c in self.todo if (holder := log.lock_holder(c.path))]
                    self._say("; ".join([*(f"{c.path.name} {_steps(c)}" for c, _, _ in self.running.values()), *held]))
                time.sleep(0.2)
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if self.signal:
            print("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + self.signal if self.signal else 0

    def _start(self, share: int) -> None:
        """The first cell whose start is there, and which no process left from before is still at."""
        for cell in list(self.todo):
            if cell.parent and cell.parent.path in self.failed:
                self.todo.remove(cell)
                self.failed.add(cell.path)
                self._say(f"{cell.path.name} is left out, since {cell.parent.path.name} failed")
            elif not (cell.parent and cell.parent.commands()) and not log.lock_holder(cell.path):
                self.todo.remove(cell)
                cell.path.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(cell.beside(".yaml"), cell.record())
                self._spawn(share, cell, time.monotonic())
                return self._say(f"{cell.path.name} begins")

    def _spawn(self, share: int, cell: Cell, began: float) -> None:
        command = [sys.executable, "-m", "medrlvr_jax", *cell.commands()[0]]
        env = {"JAX_COMPILATION_CACHE_DIR": str((cell.path.parent / ".programs").absolute())} | os.environ  # cells share most programs
        pins = hasattr(os, "sched_setaffinity")
        mine = os.sched_getaffinity(0) if pins else set()
        with open(cell.beside(".log"), "ab") as out:
            if pins:
                os.sched_setaffinity(0, self.shares[share])  # a process is born onto its parent's cores
            # A session of its own: the terminal's Ctrl-C is for this process, which passes it on.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True)
            if pins:
                os.sched_setaffinity(0, mine)
        self.running[share] = cell, process, began

    def _look(self, share: int) -> None:
        cell, process, began = self.running[share]
        if process.poll() is None:
            return
        del self.running[share]
        if process.returncode and not self.signal:
            self.failed.add(cell.path)
            tail = cell.beside(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            ends = f"{cell.path.name} failed with exit status {process.returncode}; {cell.beside('.log')} ends:"
            self._say("\n    ".join([ends, *tail]))
        elif cell.finished:
            self._say(f"{cell.path.name} is finished after {clock(time.monotonic() - began)}")
        elif not self.signal:
            self._spawn(share, cell, began)

    def _stop(self, number: int, _: Any) -> None:
        self.signal = number
        for cell, process, _ in self.running.values():
            process.send_signal(signal.SIGINT)
            print(f"{signal.Signals(number).name}: {cell.path.name} stops after its step; once more stops it at once", file=sys.stderr)

    def _say(self, text: str) -> None:
        done, left = sum(c.finished for c in self.every), self._left()
        more = f"; about {clock(left)} left" if left else ""
        print(f"{done}/{len(self.every)} cells: {text}{more}", file=sys.stderr, flush=True)

    def _left(self) -> float | None:
        """Seconds. A cell takes what others of its arm take, or else of its kind; None while nothing is known of one."""
        known: dict[str, list[float]] = {}
        for cell in self.every:
            for kind in (cell.arm, cell.by):
                known.setdefault(kind, []).extend(_seconds(cell))
        waiting = [c for c in (*self.todo, *(c for c, _, _ in self.running.values())) if c.by != "eval"]  # those take next to nothing
        times = [known[c.arm] or known[c.by] for c in waiting]
        if not all(times):
            return None
        spent = sum(time.monotonic() - began for _, _, began in self.running.values())
        return max(sum(map(mean, times)) - spent, 0.0) / len(self.shares)


def _seconds(cell: Cell) -> list[float]:
    """What its run took; or, by its first steps, will take."""
    summary, metrics = cell.path / "summary.json", cell.path / "metrics.jsonl"
    if summary.exists():
        return [json.loads(summary.read_text(encoding="utf-8"))["seconds"]]
    steps = [r["seconds"] for r in files.read_jsonl(metrics) if "seconds" in r] if metrics.exists() else []
    return [sum(steps) + median(steps) * (cell.config.steps - len(steps))] if len(steps) > 1 and cell.config.steps else []


def _steps(cell: Cell) -> str:
    """How far its run is."""
    file = cell.path / "metrics.jsonl"
    records = files.read_jsonl(file) if file.exists() else []
    return f"step {records[-1]['step']}" + (f"/{cell.config.steps}" if cell.config.steps else "") if records else "starts"

"""What a run shows in progress: lines or a bar on the terminal, and the trackers that the config names."""

import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError

QUIET = 30  # seconds without a line, after which long work prints its progress
FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("seconds", lambda v: f"{v:.2f} s"),
    ("tokens_per_second", lambda v: f"{v:,.0f} tok/s"),
    ("loss", lambda v: f"loss {v:.4f}"),
    ("reward", lambda v: f"reward {v:+.3f}"),
    ("accuracy", lambda v: f"correct {v:.1%}"),
    ("format_ok", lambda v: f"format {v:.1%}"),
    ("kl", lambda v: f"KL {v:.4f}"),
    ("response_length", lambda v: f"length {v:.0f}"),
)


def line(metrics: dict[str, float]) -> str:
    """The metrics of `FIELDS` that a step has, as one line."""
    return "  ".join(show(metrics[key]) for key, show in FIELDS if metrics.get(key) is not None)


def before_after(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{set: {"before", "after": {"n", "correct", …}}}` from the `eval.<set>.<count>` of step 0 and of the
    last evaluation."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval."):
                name, count = key.removeprefix("eval.").rsplit(".", 1)
                out.setdefault(name, {}).setdefault("after" if record["step"] else "before", {})[count] = (
                    value
                )
    return out


class Console:
    """Progress on stderr: a bar on a terminal, else one line a step. Silent on processes other than 0.

    In a notebook, where stderr is red: messages on stdout, and progress on one line that is overwritten.
    """

    def __init__(self, total: int, file: TextIO | None = None):
        quiet, notebook = jax.process_index() > 0, file is None and rich.console.Console().is_jupyter
        self._rich = rich.console.Console(
            file=file or (sys.stdout if notebook else sys.stderr),
            quiet=quiet,
            highlight=False,
            soft_wrap=True,
            force_jupyter=False,
        )
        self._line = Line() if notebook and not quiet else None
        self._total = total
        self._last_message = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=21)
        self._bar = None
        if self._rich.is_terminal and not self._rich.quiet:
            columns = (MofNCompleteColumn(), BarColumn(24), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._rich)
            self._task = self._bar.add_task("starting", total=total)
            self._bar.start()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a step's metrics and, if it was evaluated, a line for each evaluation set."""
        text, place = line(metrics), f"step {step}/{self._total}"
        if "seconds" in metrics:
            self._step_seconds.append(metrics["seconds"])
            text += f"  {clock(statistics.median_low(self._step_seconds) * (self._total - step))} left"
        if self._line:
            self._line.write(f"{place}  {text}")
        elif self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif text:
            self.notify(f"{place}  {text}")
        for name, counts in before_after([{"step": step, **metrics}]).items():
            c = next(iter(counts.values()))
            shares = f"correct {c['correct']}/{c['n']}, format {c['format_ok']}/{c['n']}"
            cut = f", cut off {c['truncated']}/{c['n']}" if c.get("truncated") else ""
            self.notify(f"{place}  eval {name}: {shares}{cut}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of work within a step: on the bar, or as a line every `QUIET` seconds."""
        if self._line:
            self._line.write(f"{what}  {done}/{total}")
        elif self._bar:
            self._bar.update(self._task, description=f"{what}  {done}/{total}")
        elif time.monotonic() - self._last_message > QUIET and done < total:
            self.notify(f"{what}  {done}/{total}")

    def notify(self, text: str) -> None:
        """Print a message."""
        self._last_message = time.monotonic()
        self._rich.print(text, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class Line:
    """One line below a notebook's cell, which each `write` overwrites."""

    def __init__(self):
        self._handle: Any = None

    def write(self, text: str) -> None:
        from IPython.display import display  # installed wherever a notebook runs

        if self._handle is None:
            self._handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 → `1:02:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"


# --- trackers ---------------------------------------------------------------------------------------------


class Tracker:
    """The metrics to TensorBoard and Weights & Biases, if `log` names them; process 0 only."""

    def __init__(self, path: Path, config: Config, done: int):
        leader = jax.process_index() == 0
        self._board = _tensorboard(path / "tensorboard", done) if leader and config.log.tensorboard else None
        self._wandb = _wandb(path, config) if leader and config.log.wandb else None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Send the step's metrics that have a value."""
        numbers = {k: float(v) for k, v in metrics.items() if v is not None}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _tensorboard(path: Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = "pip install 'medrlvr-jax[tensorboard]', or set it to false"
        raise ConfigError(f"log.tensorboard: true needs tensorboardX: {remedy}") from None
    return SummaryWriter(
        str(path), purge_step=done + 1
    )  # a resumed run replaces what came after its checkpoint


def _wandb(path: Path, config: Config) -> Any:
    project = config.log.wandb
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = "pip install 'medrlvr-jax[wandb]', or set it to null"
        raise ConfigError(f"log.wandb: {project} needs wandb: {remedy}") from None
    file = path / "wandb_id"  # one per folder: a run of the same name in another folder is another run
    if not file.exists():
        files.write_text(file, uuid.uuid4().hex)
    return wandb.init(
        project=project,
        name=config.name,
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(path),
        config=configs.to_tree(config),
    )

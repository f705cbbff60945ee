"""Show the progress of a command: an updated last line on a terminal, and ordinary lines elsewhere."""

import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import rich.console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from medrlvr_jax.host.tables import visible

QUIET = 30  # seconds without output, after which long work prints a line of progress
LINES = 20  # approximate number of steps of a run whose line stays on a terminal
FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (  # a narrow terminal shows only the first ones
    ("reward", lambda v: f"reward {v:+.3f}"),
    ("accuracy", lambda v: f"correct {v:.1%}"),
    ("format_ok", lambda v: f"format {v:.1%}"),
    ("loss", lambda v: f"loss {v:.4f}"),
    ("kl", lambda v: f"KL {v:.4f}"),
    ("response_length", lambda v: f"length {v:.0f}"),
    ("seconds", lambda v: f"{v:.2f} s"),
    ("tokens_per_second", lambda v: f"{v:,.0f} tok/s"),
)


def format_metrics(metrics: dict[str, Any]) -> list[str]:
    """Return the step's metrics of `FIELDS` as text."""
    return [to_text(metrics[key]) for key, to_text in FIELDS if metrics.get(key) is not None]


def evaluations_by_set(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the first and the last evaluation of each set from the records of metrics.jsonl.

    The result is `{set: {"before": {"n", "correct", …}, "after": …}}`. "before" is the evaluation of step 0.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        when = "after" if record["step"] else "before"
        for key, value in record.items():
            if key.startswith("eval."):
                name, count = key.removeprefix("eval.").rsplit(".", 1)
                out.setdefault(name, {}).setdefault(when, {})[count] = value
    return out


class Console:
    """The progress of a command on stderr. Processes other than 0 print nothing.

    On a terminal the last line shows the step, the percentage and the time left, and then, if there is space,
    the current work or the metrics of the last step. Some steps leave a line behind. Without a terminal there
    is one line per step. A notebook shows stderr in red, so messages go to stdout there, and one line of
    progress is overwritten.

    `total`: the number of steps; 0 for a command without steps, such as an evaluation.
    """

    def __init__(self, total: int = 0, file: TextIO | None = None):
        notebook = file is None and rich.console.Console().is_jupyter
        self._rich = rich.console.Console(
            file=file or (sys.stdout if notebook else sys.stderr),
            quiet=not _is_leader(),
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
            force_jupyter=False,
        )
        self._total, self._done, self._metrics = total, 0, list[str]()
        self._step_seconds: deque[float] = deque(maxlen=21)
        self._last_message = self._last_line = self._last_step = time.monotonic()
        self._work, self._work_start, self._work_text = "", 0.0, ""
        self._notebook_line = NotebookLine() if notebook and not self._rich.quiet else None
        self._live = None
        if self._rich.is_terminal and not self._rich.quiet:
            self._live = Live(
                get_renderable=self._render,
                console=self._rich,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()

    def begin(self, done: int) -> None:
        """Set the number of steps that the run has already finished before this start."""
        self._done = done

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show the metrics of a step and, after an evaluation, one line for each set."""
        self._done, self._metrics, self._work = step, format_metrics(metrics), ""
        self._last_step = time.monotonic()
        if "seconds" in metrics:
            self._step_seconds.append(metrics["seconds"])
        if self._notebook_line:
            self._notebook_line.write(self._status())
        elif self._metrics and (not self._live or self._keeps_line(step)):
            self._last_line = time.monotonic()
            width = self._rich.width if self._live else None
            self.notify(fit_to_width([*self._position(), *self._metrics], width))
        for name, counts in evaluations_by_set([{"step": step, **metrics}]).items():
            c = next(iter(counts.values()))
            shares = f"correct {c['correct']}/{c['n']}, format {c['format_ok']}/{c['n']}"
            cut = f", cut off {c['truncated']}/{c['n']}" if c.get("truncated") else ""
            self.notify(f"step {step}/{self._total}  eval {name}: {shares}{cut}")

    def progress(self, what: str, done: int, total: int, awaited: str = "") -> None:
        """Show that `done` of `total` parts of some long work are finished.

        A terminal shows this in the last line. Elsewhere a line is printed every `QUIET` seconds.
        `awaited`: the name of the part that is running.
        """
        if what != self._work:
            self._work, self._work_start = what, time.monotonic()
        self._work_text = f"{what}  {done}/{total}" if total else what
        self._work_text += f", waiting for {awaited}" if awaited else ""
        if self._notebook_line:
            self._notebook_line.write(self._status())
        elif not self._live and time.monotonic() - self._last_message > QUIET and done < total:
            self.notify(self._work_text)

    def notify(self, text: str) -> None:
        """Print a message."""
        self._last_message = time.monotonic()
        if self._live:
            self._live.refresh()  # else rich would repeat an outdated last line
        self._rich.print(visible(text), soft_wrap=not self._live)  # wrap lines at words on a terminal

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _keeps_line(self, step: int) -> bool:
        late = time.monotonic() - self._last_line > 2 * QUIET
        return step in (1, self._total) or step % max(1, self._total // LINES) == 0 or late

    def _render(self) -> rich.console.Group:
        """Return the last line, with the cursor at its start.

        Text that C++ writes (XLA, libtpu) then replaces the line, which is drawn again below.
        """
        line = Text(self._status(), no_wrap=True, overflow="crop", end="")
        return rich.console.Group(line, Control(ControlType.CARRIAGE_RETURN))

    def _status(self) -> str:
        """Return the text of the last line."""
        if not self._work:
            return fit_to_width([*self._position(), *self._metrics], self._rich.width)
        work = f"{format_duration(time.monotonic() - self._work_start)}  {self._work_text}"
        return fit_to_width(["  ".join([*self._position(), work])], self._rich.width)

    def _position(self) -> list[str]:
        """Return step, percentage and time left."""
        if not self._total:
            return []
        parts = [f"step {self._done}/{self._total}", f"{100 * self._done / self._total:.0f} %"]
        if self._step_seconds:
            left = statistics.median_low(self._step_seconds) * (self._total - self._done)
            elapsed = time.monotonic() - self._last_step
            parts.append(f"{format_duration(max(0.0, left - elapsed))} left")
        return parts


def fit_to_width(parts: Sequence[str], width: int | None) -> str:
    """Join as many of the parts as fit into `width` columns, or cut the first one if it is too long."""
    prefixes = list(itertools.accumulate(parts, "{}  {}".format))
    if width is None or not prefixes:
        return "  ".join(parts)
    return next((text for text in reversed(prefixes) if len(text) < width), f"{parts[0][: width - 2]}…")


ShowProgress = Callable[[str, int, int], None]  # called with work, parts done, all parts


def show_nothing(what: str, done: int, total: int) -> None:
    """Ignore progress."""


@contextmanager
def stage(what: str) -> Iterator[ShowProgress]:
    """Show on a terminal, while the context is open, the work before the first step and its duration.

    Yields a function that shows the progress of parts of this work.
    """
    console = Console()
    console.progress(what, 0, 0)
    try:
        yield console.progress
    finally:
        console.close()


def _is_leader() -> bool:
    """Return whether this is process 0. Before JAX is imported there is only one process."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


class NotebookLine:
    """One line below a notebook's cell. Each `write` overwrites it."""

    def __init__(self):
        self._handle: Any = None

    def write(self, text: str) -> None:
        from IPython.display import display  # every notebook has IPython

        if self._handle is None:
            self._handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds: 3725 → `1:02:05`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"

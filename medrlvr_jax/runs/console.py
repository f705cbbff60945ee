"""What a command shows in progress: on a terminal a last line that is always up to date, elsewhere lines."""

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

QUIET = 30  # seconds without a line, after which long work prints its progress
LINES = 20  # of a run's steps, about so many leave a line on a terminal
FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (  # the first ones stay where a terminal is narrow
    ("reward", lambda v: f"reward {v:+.3f}"),
    ("accuracy", lambda v: f"correct {v:.1%}"),
    ("format_ok", lambda v: f"format {v:.1%}"),
    ("loss", lambda v: f"loss {v:.4f}"),
    ("kl", lambda v: f"KL {v:.4f}"),
    ("response_length", lambda v: f"length {v:.0f}"),
    ("seconds", lambda v: f"{v:.2f} s"),
    ("tokens_per_second", lambda v: f"{v:,.0f} tok/s"),
)


def in_words(metrics: dict[str, Any]) -> list[str]:
    """The metrics of `FIELDS` that a step has."""
    return [show(metrics[key]) for key, show in FIELDS if metrics.get(key) is not None]


def before_after(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{set: {"before", "after": {"n", "correct", …}}}` from the `eval.<set>.<count>` of step 0 and of the
    last evaluation."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        when = "after" if record["step"] else "before"
        for key, value in record.items():
            if key.startswith("eval."):
                name, count = key.removeprefix("eval.").rsplit(".", 1)
                out.setdefault(name, {}).setdefault(when, {})[count] = value
    return out


class Console:
    """Progress on stderr. Silent on processes other than 0.

    On a terminal, however narrow, the last line has the step, the share that is done and the time left; then,
    as far as they fit, what is going on or the last step's metrics. Every few steps a line stays. Without a
    terminal there is one line a step. In a notebook, where stderr is red, messages are on stdout, and
    progress is one line that is overwritten.

    `total`: the steps of the run; 0 where there are none, as for a command that evaluates.
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
        self._work, self._work_began, self._work_shown = "", 0.0, ""
        self._line = Line() if notebook and not self._rich.quiet else None
        self._live = None
        if self._rich.is_terminal and not self._rich.quiet:
            self._live = Live(
                get_renderable=self._drawn,
                console=self._rich,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()

    def begin(self, done: int) -> None:
        """Steps that an earlier start of the run has done."""
        self._done = done

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a step's metrics and, if it was evaluated, a line for each evaluation set."""
        self._done, self._metrics, self._work = step, in_words(metrics), ""
        self._last_step = time.monotonic()
        if "seconds" in metrics:
            self._step_seconds.append(metrics["seconds"])
        if self._line:
            self._line.write(self._status())
        elif self._metrics and (not self._live or self._stays(step)):
            self._last_line = time.monotonic()
            width = self._rich.width if self._live else None
            self.notify(fitted([*self._place(), *self._metrics], width))
        for name, counts in before_after([{"step": step, **metrics}]).items():
            c = next(iter(counts.values()))
            shares = f"correct {c['correct']}/{c['n']}, format {c['format_ok']}/{c['n']}"
            cut = f", cut off {c['truncated']}/{c['n']}" if c.get("truncated") else ""
            self.notify(f"step {step}/{self._total}  eval {name}: {shares}{cut}")

    def progress(self, what: str, done: int, total: int, awaited: str = "") -> None:
        """Show long work within a step or before the first: in the last line, or as a line every `QUIET`
        seconds. `awaited`: what it waits for now.
        """
        if what != self._work:
            self._work, self._work_began = what, time.monotonic()
        self._work_shown = f"{what}  {done}/{total}" if total else what
        self._work_shown += f", waiting for {awaited}" if awaited else ""
        if self._line:
            self._line.write(self._status())
        elif not self._live and time.monotonic() - self._last_message > QUIET and done < total:
            self.notify(self._work_shown)

    def notify(self, text: str) -> None:
        """Print a message."""
        self._last_message = time.monotonic()
        if self._live:
            self._live.refresh()  # rich prints the last line again as it was drawn last
        self._rich.print(visible(text), soft_wrap=not self._live)  # a terminal breaks lines at words

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _stays(self, step: int) -> bool:
        late = time.monotonic() - self._last_line > 2 * QUIET
        return step in (1, self._total) or step % max(1, self._total // LINES) == 0 or late

    def _drawn(self) -> rich.console.Group:
        """The last line; the cursor goes back to its start, so that what C++ writes (XLA, libtpu) replaces it
        instead of following it. It is drawn again below.
        """
        line = Text(self._status(), no_wrap=True, overflow="crop", end="")
        return rich.console.Group(line, Control(ControlType.CARRIAGE_RETURN))

    def _status(self) -> str:
        """The last line of a terminal."""
        if not self._work:
            return fitted([*self._place(), *self._metrics], self._rich.width)
        waited = f"{clock(time.monotonic() - self._work_began)}  {self._work_shown}"
        return fitted(["  ".join([*self._place(), waited])], self._rich.width)

    def _place(self) -> list[str]:
        """Step, share and time left."""
        if not self._total:
            return []
        place = [f"step {self._done}/{self._total}", f"{100 * self._done / self._total:.0f} %"]
        if self._step_seconds:
            left = statistics.median_low(self._step_seconds) * (self._total - self._done)
            place.append(f"{clock(max(0.0, left - (time.monotonic() - self._last_step)))} left")
        return place


def fitted(parts: Sequence[str], width: int | None) -> str:
    """As many of the parts as fit into `width` columns; if not even the first does, its beginning."""
    fitting = list(itertools.accumulate(parts, "{}  {}".format))
    if width is None or not fitting:
        return "  ".join(parts)
    return next((text for text in reversed(fitting) if len(text) < width), f"{parts[0][: width - 2]}…")


Show = Callable[[str, int, int], None]  # called with what is done, how much of it is, and of how much


def silent(what: str, done: int, n: int) -> None:
    """Shows nothing."""


@contextmanager
def stage(what: str) -> Iterator[Show]:
    """Show on a terminal what a command does before its first step, and for how long already; what it yields
    shows a part of that, and how far it is.
    """
    console = Console()
    console.progress(what, 0, 0)
    try:
        yield console.progress
    finally:
        console.close()


def _is_leader() -> bool:
    """Whether this is process 0; so it is while JAX is not imported yet."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


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

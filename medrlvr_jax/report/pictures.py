"""Curves and evaluations of runs as one picture: `medrlvr report RUN … --out NAME.png`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from medrlvr_jax.evaluation.answers import interval
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import Records, read_jsonl, short_names
from medrlvr_jax.report.explore import COLORS, GREY, Columns, columns, over_steps
from medrlvr_jax.runs.console import evaluations_by_set

POINTS = 150  # the maximum of a curve
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = Path(__file__).parent / "templates" / "pictures.mplstyle"


class Panel(NamedTuple):
    key: str  # in metrics.jsonl
    title: str
    share: bool = False  # whether the axis is in per cent


PANELS = (
    Panel("reward", "Reward"),
    Panel("accuracy", "Correct answers", share=True),
    Panel("format_ok", "Answers in the format", share=True),
    Panel("response_length", "Response length (tokens)"),
    Panel("kl", "KL to the reference (nats per token)"),
    Panel("entropy", "Entropy (nats per token)"),
)


def curves(run_dirs: Sequence[Path | str], out_png: Path | str) -> None:
    """Draw `PANELS` with a curve for each run. Evaluations are markers with intervals among the accuracies.

    Raises `ConfigError` for a folder without metrics.jsonl.
    """
    runs = {str(folder): _metrics(Path(folder)) for folder in run_dirs}
    groups, legend = [(i, columns(records)) for i, records in enumerate(runs.values())], []
    if len(runs) > 1:
        names = short_names([Path(folder) for folder in runs])
        legend = [Line2D([], [], label=name, **line_style(i)) for i, name in enumerate(names)]
    with matplotlib.rc_context(fname=STYLE):  # a Figure without pyplot, whose state is global
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        for axis, panel in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
            if not draw_panel(axis, panel, groups):
                center = {"transform": axis.transAxes, "ha": "center", "va": "center"}
                axis.text(0.5, 0.5, "not recorded", color="#888888", **center)
            if panel.key == "accuracy":
                legend += _evaluations(axis, list(runs.values()))
            if panel.share:
                axis.set_ylim(bottom=0.0)  # the last call, because it stops the scaling to new values
        for axis in figure.axes[3:]:
            axis.set_xlabel("step")
        if legend:
            figure.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)))
        figure.savefig(out_png, dpi=160)


def draw_panel(axis: Axes, panel: Panel, runs: Sequence[tuple[int, Columns]]) -> bool:
    """Draw a curve for each run in the style of its number. Returns whether any run recorded the metric.

    A line is the running mean over 1/25 of the steps; the metric itself is drawn faintly.
    """
    drawn = False
    for number, run in runs:
        steps, values = over_steps([run], panel.key, POINTS)
        if not len(steps):
            continue
        drawn, window = True, 2 * (len(steps) // 50) + 1
        marker = "o" if len(steps) == 1 else ""
        axis.plot(steps, smooth(values[0], window), marker=marker, **line_style(number))
        if window > 1:
            axis.plot(steps, values[0], color=COLORS[number % len(COLORS)], lw=0.7, alpha=0.25)
    axis.set_title(panel.title)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return drawn


def smooth(values: Float64[np.ndarray, " n"], window: int) -> Float64[np.ndarray, " n"]:
    """Return the running mean over `window` values (odd, at most n) around each, over fewer at the ends."""
    total, count = (np.convolve(x, np.ones(window), "same") for x in (values, np.ones(len(values))))
    return total / count


def line_style(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "ls": DASHES[number % len(DASHES)], "lw": 1.8}


def _metrics(run: Path) -> Records:
    if not (run / "metrics.jsonl").exists():
        raise ConfigError(f"{run}: no metrics.jsonl there; name a run's folder, such as runs/<name>")
    return read_jsonl(run / "metrics.jsonl")


def _evaluations(axis: Axes, runs: list[Records]) -> list[Line2D]:
    """Draw a marker for each evaluation. Returns their entries of the legend.

    The colour is that of the run or, of a single run, that of the set.
    """
    sets = sorted({name for records in runs for name in evaluations_by_set(records)})
    last, single = max((r["step"] for records in runs for r in records), default=0), len(runs) == 1
    legend = [Line2D([], [], color=COLORS[0] if single else GREY, lw=1.7, label="training batches")]
    for i, name in enumerate(sets):
        set_color, marker = COLORS[1 + i % (len(COLORS) - 1)], MARKERS[i % len(MARKERS)]
        shift = 0.01 * last * (i - (len(sets) - 1) / 2)  # keeps sets of equal accuracy visible
        style: Any = {"marker": marker, "ms": 4.5, "mec": "white", "mew": 0.5, "lw": 0, "elinewidth": 0.9}
        for j, records in enumerate(runs):
            counts = {r["step"]: c for r in records for c in evaluations_by_set([r]).get(name, {}).values()}
            if not counts:
                continue
            share, low, high = np.array([interval(c) for c in counts.values()]).T
            steps = [step + shift for step in counts]
            color = set_color if single else COLORS[j % len(COLORS)]
            axis.errorbar(
                steps, share, [share - low, high - share], color=color, zorder=3, clip_on=False, **style
            )
        color, label = set_color if single else GREY, name.replace("_", " ")
        legend.append(Line2D([], [], lw=0, marker=marker, ms=5, color=color, label=label))
    return legend if sets else []

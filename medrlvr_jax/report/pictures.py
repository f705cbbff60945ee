"""What runs came to, as pictures: curves, stages, accuracies with their intervals. page.py shows them."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from medrlvr_jax.evaluation.stats import Interval
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_jsonl
from medrlvr_jax.report.ending import interval
from medrlvr_jax.rewards.stages import STAGES
from medrlvr_jax.runs.log import Records

# Okabe and Ito's colours, which colour-blind readers can distinguish
POINTS, STAGE_POINTS = 150, 40  # of a curve, of a picture of stages, at most: pages stay small
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
FILLS = {  # of the stages: a colour, and for the two hacks a hatch, so that they differ without colour
    "format_failure": ("#BBBBBB", ""),
    "verbose_formatter": ("#E69F00", ""),
    "concise_structurer": ("#56B4E9", ""),
    "direct_answer_hacker": ("#D55E00", "////"),
    "step_by_step_exploit": ("#CC79A7", "...."),
    "reintegrated_reasoning": ("#009E73", ""),
}
STYLE = Path(__file__).parent / "templates" / "pictures.mplstyle"


class Panel(NamedTuple):
    key: str  # in metrics.jsonl
    title: str
    share: bool = False  # shown in per cent


PANELS = (
    Panel("reward", "Reward"),
    Panel("accuracy", "Correct answers", share=True),
    Panel("format_ok", "Answers in the format", share=True),
    Panel("response_length", "Response length (tokens)"),
    Panel("kl", "KL to the reference (nats per token)"),
    Panel("entropy", "Entropy (nats per token)"),
)
MORE = (  # on the page, after PANELS
    Panel("truncated", "Responses cut off by the budget", share=True),
    Panel("clip_fraction", "Clip fraction of the surrogate", share=True),
    Panel("policy/grad_norm", "Gradient norm of the policy"),
)


# --- curves ---


def curves(run_dirs: Sequence[Path | str], out_png: Path | str) -> None:
    """PANELS over the steps, a curve a run.

    Evaluations are markers, with 95 % intervals, on the panel of correct answers.
    """
    runs = {str(folder): _metrics(Path(folder)) for folder in run_dirs}
    groups = [(i, [records]) for i, records in enumerate(runs.values())]
    with matplotlib.rc_context(fname=STYLE):  # a Figure made directly needs no pyplot, whose state is global
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        for axis, panel in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
            if not draw_panel(axis, panel, groups):
                center = {"transform": axis.transAxes, "ha": "center", "va": "center"}
                axis.text(0.5, 0.5, "not recorded", color="#888888", **center)
            if panel.key == "accuracy":
                _evaluations(axis, list(runs.values()))
        for axis in figure.axes[3:]:
            axis.set_xlabel("step")
        if len(runs) > 1:
            lines = [Line2D([], [], **line_style(i)) for i, _ in groups]
            names = short_names([Path(folder) for folder in runs])
            figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(runs)))
        figure.savefig(out_png, dpi=160)


def curve_figure(panel: Panel, groups: Sequence[tuple[int, Sequence[Records]]]) -> Figure | None:
    """One panel as a figure; None where no run recorded it."""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel("step")
    return figure if draw_panel(axis, panel, groups) else None


def draw_panel(axis: Axes, panel: Panel, groups: Sequence[tuple[int, Sequence[Records]]]) -> bool:
    """One curve a group, in the style of its number. Returns whether any run recorded the panel's metric.

    A group of several runs is their mean, with a band from the lowest to the highest. A single run is also
    drawn faintly as it is. Lines are running means over a 25th of the steps.
    """
    drawn = False
    for number, runs in groups:
        steps, values = over_steps(runs, panel.key)
        if not steps:
            continue
        drawn, window, color = True, 2 * (len(steps) // 50) + 1, COLORS[number % len(COLORS)]
        marker = "o" if len(steps) == 1 else ""
        axis.plot(steps, smooth(np.nanmean(values, 0), window), marker=marker, **line_style(number))
        if len(runs) > 1:
            low, high = (smooth(f(values, axis=0), window) for f in (np.nanmin, np.nanmax))
            axis.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
        elif window > 1:
            axis.plot(steps, values[0], color=color, lw=0.7, alpha=0.25)
    axis.set_title(panel.title)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(bottom=0.0)
    return drawn


def over_steps(
    runs: Sequence[Records], key: str, points: int = POINTS
) -> tuple[list[int], Float64[np.ndarray, "runs steps"]]:
    """The steps at which any run recorded the metric, and its values there; NaN where a run has none.

    Of more than `points` steps, the last of each of so many equal stretches, and the means over them.
    """
    recorded = [{r["step"]: x for r in records if math.isfinite(x := value_of(r, key))} for records in runs]
    steps = sorted(set().union(*recorded))
    values = np.array([[values.get(step, math.nan) for step in steps] for values in recorded])
    if len(steps) <= points:
        return steps, values
    stretches = np.array_split(np.arange(len(steps)), points)
    means = [[_mean(row[stretch]) for stretch in stretches] for row in values]
    return [steps[stretch[-1]] for stretch in stretches], np.array(means)


def _mean(values: Float64[np.ndarray, " n"]) -> float:
    """The mean of the values that are not NaN; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def value_of(record: dict[str, Any], key: str) -> float:
    """A number of a step's record; NaN where there is none. `clip_fraction` is the sum of both sides."""
    keys = ("policy/clip_low", "policy/clip_high") if key == "clip_fraction" else (key,)
    return sum(math.nan if record.get(k) is None else float(record[k]) for k in keys)


def smooth(values: Float64[np.ndarray, " n"], window: int) -> Float64[np.ndarray, " n"]:
    """The running mean over `window` values (odd, at most n) around each, fewer at the ends."""
    total, count = (np.convolve(x, np.ones(window), "same") for x in (values, np.ones(len(values))))
    return total / count


def line_style(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "ls": DASHES[number % len(DASHES)], "lw": 1.8}


def short_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name; where several have one name, as much of their paths as makes them differ."""
    paths, out = [folder.resolve().parts for folder in folders], []
    for parts in paths:
        depth, others = 1, [other for other in paths if other != parts]
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        out.append("/".join(parts[-depth:]))
    return out


def _metrics(run: Path) -> Records:
    if not (run / "metrics.jsonl").exists():
        raise ConfigError(f"{run}: no metrics.jsonl there; name a run's folder, such as runs/<name>")
    return read_jsonl(run / "metrics.jsonl")


def _evaluations(axis: Axes, runs: list[Records]) -> None:
    """A marker a set, in the run's colour; with a single run in the set's, as the curve has the run's."""
    keys = {key for records in runs for r in records for key in r if key.startswith("eval.")}
    sets = sorted({key.removeprefix("eval.").rsplit(".", 1)[0] for key in keys})
    last, single = max((r["step"] for records in runs for r in records), default=0), len(runs) == 1
    legend = [Line2D([], [], color=COLORS[0] if single else GREY, lw=1.7, label="training batches")]
    for i, name in enumerate(sets):
        set_color, marker = COLORS[1 + i % (len(COLORS) - 1)], MARKERS[i % len(MARKERS)]
        shift = 0.01 * last * (i - (len(sets) - 1) / 2)  # sets of equal accuracy stay visible side by side
        style: Any = {"marker": marker, "ms": 4.5, "mec": "white", "mew": 0.5, "lw": 0, "elinewidth": 0.9}
        for j, records in enumerate(runs):
            prefix = f"eval.{name}."
            if not (asked := [r for r in records if r.get(f"{prefix}n")]):
                continue
            counts = [{k.removeprefix(prefix): r[k] for k in r if k.startswith(prefix)} for r in asked]
            share, low, high = np.array([interval(c) for c in counts]).T
            steps = [r["step"] + shift for r in asked]
            color = set_color if single else COLORS[j % len(COLORS)]
            axis.errorbar(
                steps, share, [share - low, high - share], color=color, zorder=3, clip_on=False, **style
            )
        color, label = set_color if single else GREY, name.replace("_", " ")
        legend.append(Line2D([], [], lw=0, marker=marker, ms=5, color=color, label=label))
    if sets:
        axis.legend(handles=legend, fontsize=8, loc="best")


# --- stages and accuracies ---


def stage_figure(runs: Sequence[Records], title: str) -> Figure | None:
    """The paper's figure: shares of the six stages over the steps, means over runs; None if not recorded."""
    columns = [over_steps(runs, f"stage/{stage}", STAGE_POINTS) for stage in STAGES]
    steps, shares = columns[0][0], [np.nanmean(values, 0) for _, values in columns if values.size]
    if not steps:
        return None
    if len(steps) == 1:
        steps, shares = [steps[0], steps[0] + 1], np.repeat(shares, 2, axis=1)
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axis = figure.subplots()
    layers = axis.stackplot(steps, shares, colors=[FILLS[s][0] for s in STAGES], edgecolor="white", lw=0.6)
    for layer, stage in zip(layers, STAGES, strict=True):
        layer.set_hatch(FILLS[stage][1])
    axis.set(title=title, xlabel="step", xlim=(steps[0], steps[-1]), ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(False)
    return figure


def bar_figure(arms: Sequence[tuple[str, str, list[Interval]]], title: str) -> Figure:
    """One set: of each arm (name, colour, accuracy of each run) the mean, and every run with its interval."""
    figure = Figure(figsize=(4.6, 0.75 + 0.42 * len(arms)), layout="constrained")
    axis = figure.subplots()
    style: Any = {"fmt": "o", "ms": 3.5, "mec": "white", "mew": 0.4, "elinewidth": 1.1, "capsize": 1.5}
    for y, (_, color, runs) in enumerate(arms):
        share, low, high = np.array(runs).T
        axis.barh(y, share.mean(), height=0.62, color=color, alpha=0.45, lw=0)
        heights = y + (np.arange(len(runs)) - (len(runs) - 1) / 2) * min(0.18, 0.5 / len(runs))
        axis.errorbar(share, heights, xerr=[share - low, high - share], color="#222222", **style)
    axis.set_yticks(range(len(arms)), [name for name, _, _ in arms])
    axis.set(title=title, xlim=(0, 1))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def save(draw: Callable[[], Figure | None], stem: Path) -> str | None:
    """Draw a figure and write it as `<stem>.png`; returns it as SVG for a page, None if there is none."""
    svg_style: Any = {"svg.fonttype": "none", "svg.hashsalt": stem.name, "font.family": "sans-serif"}
    with matplotlib.rc_context(svg_style, fname=STYLE):
        figure = draw()
        if figure is None:
            return None
        figure.savefig(f"{stem}.png", dpi=160)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    name, svg = re.sub(r"[^\w.-]", "-", stem.name), text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r'((?:\bid="|href="#|url\(#))', rf"\g<1>{name}-", svg)  # ids must be unique on the page

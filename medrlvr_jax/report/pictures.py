"""What runs came to, as pictures and a table: curves, stages, accuracies with their uncertainty. `report_html` makes a page of them."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from medrlvr_jax.evaluation.answers import remarks
from medrlvr_jax.evaluation.stats import Interval, wilson
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_jsonl
from medrlvr_jax.rewards.stages import STAGES
from medrlvr_jax.runs.log import Records

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's: told apart by all eyes
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS = (  # key in metrics.jsonl, title, whether it is a share
    ("reward", "Reward", False),
    ("accuracy", "Correct answers", True),
    ("format_ok", "Answers in the format", True),
    ("response_length", "Response length (tokens)", False),
    ("kl", "KL to the reference (nats per token)", False),
    ("entropy", "Entropy (nats per token)", False),
)
MORE = (  # with PANELS, the page's curves
    ("truncated", "Responses cut off by the budget", True),
    ("clip_fraction", "Clip fraction of the surrogate", True),
    ("policy/grad_norm", "Gradient norm of the policy", False),
)
FILLS = {  # of the stages: a colour, and a hatch for the two hacks, so that they can be told apart without colour
    "format_failure": ("#BBBBBB", ""),
    "verbose_formatter": ("#E69F00", ""),
    "concise_structurer": ("#56B4E9", ""),
    "direct_answer_hacker": ("#D55E00", "////"),
    "step_by_step_exploit": ("#CC79A7", "...."),
    "reintegrated_reasoning": ("#009E73", ""),
}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": "#888888",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}


def table(summary: dict[str, Any]) -> str:
    """Accuracy and format rate on each evaluation set, before and after training, with 95 % intervals over questions."""
    rows = []
    for name, when in summary["eval"].items():
        before, after = when.get("before"), when.get("after")
        shares = [_share(counts, key) for key in ("accuracy", "format") for counts in (before, after)]
        asked = after or before or {}
        rows.append([name, f"{asked.get('questions', asked.get('n', 0)):,}", *shares])
    head = ("set", "questions", "accuracy before", "after", "format before", "after")
    last = {name: when.get("after") or when.get("before") or {} for name, when in summary["eval"].items()}
    said = [line for name, counts in last.items() for line in remarks(name, counts)]
    return "\n".join([tables.plain(head, rows, summary.get("name")), *said])


def _share(counts: dict[str, Any] | None, key: str) -> str:
    if not counts or not counts["n"]:
        return "–"
    return percent(interval(counts, key))


def percent(x: Interval) -> str:
    return f"{100 * x.value:.1f} % ({100 * x.low:.1f}–{100 * x.high:.1f})"


def interval(counts: dict[str, Any], key: str = "accuracy") -> Interval:
    """Of an evaluation's counts (`evaluate.summarise`): the share of right answers, or of those in the `format`, with its 95 % interval
    over questions. Older logs have none: theirs is Wilson's of the answers, right for one answer a question."""
    count, share = {"accuracy": ("correct", "accuracy"), "format": ("format_ok", "format_rate")}[key]
    if f"{key}_low" in counts:
        return Interval(counts[share], counts[f"{key}_low"], counts[f"{key}_high"])
    return Interval(counts[count] / counts["n"], *wilson(counts[count], counts["n"]))


def curves(run_dirs: Sequence[Path | str], out_png: Path | str) -> None:
    """Six panels over the steps of one or several runs; evaluations stand as markers, with 95 % intervals, among the correct answers."""
    runs = {str(d): _metrics(Path(d)) for d in run_dirs}
    with matplotlib.rc_context(STYLE):  # a Figure made by hand saves itself with Agg: pyplot and its globals stay out of it
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        panels = {}
        for axis, (key, title, share) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
            drawn = [_curve(axis, records, key, COLORS[i % len(COLORS)]) for i, records in enumerate(runs.values())]
            if not any(drawn):
                axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", va="center", color="#888888")
            axis.set_title(title)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if share:
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            panels[key] = axis
        _evaluations(panels["accuracy"], list(runs.values()))
        for axis in figure.axes[3:]:
            axis.set_xlabel("step")
        if len(runs) > 1:
            lines = [Line2D([], [], color=COLORS[i % len(COLORS)], lw=2) for i in range(len(runs))]
            figure.legend(lines, short_names([Path(d) for d in runs]), loc="outside lower center", ncols=min(4, len(runs)))
        figure.savefig(out_png, dpi=160)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name; of several with one name, as much of their paths as tells them apart."""
    paths, out = [folder.resolve().parts for folder in folders], []
    for parts in paths:
        depth, others = 1, [other for other in paths if other != parts]
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        out.append("/".join(parts[-depth:]))
    return out


def panel(groups: Sequence[tuple[int, Sequence[Records]]], key: str, title: str, share: bool) -> Figure | None:
    """One curve a group, in the style of its number: the mean over its runs, and the band from the least to the greatest; None where
    nobody recorded it."""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axis, drawn = figure.subplots(), False
    for i, runs in groups:
        table = [{r["step"]: value_of(r, key) for r in records} for records in runs]
        steps = sorted({step for values in table for step, x in values.items() if math.isfinite(x)})
        if not steps:
            continue
        drawn, color = True, COLORS[i % len(COLORS)]
        values = np.array([[of.get(step, math.nan) for step in steps] for of in table])
        window = max(1, 2 * (len(steps) // 50) + 1)
        there = np.isfinite(values)
        mean = np.where(there, values, 0.0).sum(0) / there.sum(0)
        axis.plot(steps, smooth(mean, window), color=color, lw=1.8, ls=DASHES[i % len(DASHES)], marker="" if len(steps) > 1 else "o")
        if len(runs) > 1:
            low, high = (f(values, axis=0) for f in (np.nanmin, np.nanmax))
            axis.fill_between(steps, smooth(low, window), smooth(high, window), color=color, alpha=0.18, lw=0)
    axis.set(title=title, xlabel="step")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(bottom=0.0)
    return figure if drawn else None


def value_of(record: dict[str, Any], key: str) -> float:
    """A number of a step's record; NaN where there is none. `clip_fraction` is the sum of both sides'."""
    keys = ("policy/clip_low", "policy/clip_high") if key == "clip_fraction" else (key,)
    return sum(math.nan if record.get(k) is None else float(record[k]) for k in keys)


def stage_shares(runs: Sequence[Records], title: str) -> Figure | None:
    """The shares of the six stages over the steps, mean over the runs: the paper's figure. None where they were not recorded."""
    table = [{r["step"]: [value_of(r, f"stage/{s}") for s in STAGES] for r in records} for records in runs]
    steps = sorted({step for of in table for step, shares in of.items() if np.isfinite(shares).all()})
    if not steps:
        return None
    shares = np.array([np.mean([of[step] for of in table if step in of], axis=0) for step in steps]).T
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


def bars(arms: Sequence[tuple[str, str, list[Interval]]], title: str) -> Figure:
    """One set: for each arm (name, colour, accuracy of each of its runs) the mean, and every run with its 95 % interval."""
    figure = Figure(figsize=(4.6, 0.75 + 0.42 * len(arms)), layout="constrained")
    axis = figure.subplots()
    for y, (_, color, runs) in enumerate(arms):
        share, low, high = np.array(runs).T
        axis.barh(y, share.mean(), height=0.62, color=color, alpha=0.45, lw=0)
        aside = y + (np.arange(len(runs)) - (len(runs) - 1) / 2) * min(0.18, 0.5 / len(runs))
        style = {"fmt": "o", "ms": 3.5, "mec": "white", "mew": 0.4, "elinewidth": 1.1, "capsize": 1.5}
        axis.errorbar(share, aside, xerr=[share - low, high - share], color="#222222", **style)
    axis.set_yticks(range(len(arms)), [name for name, _, _ in arms])
    axis.set(title=title, xlim=(0, 1))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def picture(draw: Callable[[], Figure | None], stem: Path) -> str | None:
    """The figure that `draw` makes, as `<stem>.png` and, returned, as SVG to stand inside a page; None where there is none."""
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": stem.name, "font.family": "sans-serif"}):
        figure = draw()
        if figure is None:
            return None
        figure.savefig(f"{stem}.png", dpi=160)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    name, svg = re.sub(r"[^\w.-]", "-", stem.name), text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r'((?:\bid="|href="#|url\(#))', rf"\g<1>{name}-", svg)  # matplotlib's ids are the same in each of a page's figures


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The running mean over `window` values around each, fewer at the ends; NaNs do not count."""
    there = np.isfinite(values)
    total, count = (np.convolve(v, np.ones(window)) for v in (np.where(there, values, 0.0), there.astype(float)))
    middle = slice(window // 2, window // 2 + len(values))
    return np.divide(total[middle], count[middle], out=np.full(len(values), np.nan), where=count[middle] > 0)


def _metrics(run: Path) -> Records:
    if not (run / "metrics.jsonl").exists():
        raise ConfigError(f"{run}: no metrics.jsonl there; name a run's folder, such as runs/<name>")
    return read_jsonl(run / "metrics.jsonl")


def _curve(axis: Axes, records: Records, key: str, color: str) -> bool:
    """Every step faintly, and a running mean over a 25th of them; says whether there was anything to draw."""
    points = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]
    if not points:
        return False
    steps, values = np.array(points, float).T
    window = max(1, 2 * (len(points) // 50) + 1)
    if window > 1:
        axis.plot(steps, values, color=color, lw=0.7, alpha=0.25)
    axis.plot(steps, smooth(values, window), color=color, lw=1.7, marker="" if len(points) > 1 else ".")
    return True


def _evaluations(axis: Axes, runs: list[Records]) -> None:
    """A marker a set; its colour is the run's, or, of a single run, the set's own, since the first is then the training curve's."""
    sets = sorted({k.removeprefix("eval.").rsplit(".", 1)[0] for records in runs for r in records for k in r if k.startswith("eval.")})
    last = max((r["step"] for records in runs for r in records), default=0)
    legend = [Line2D([], [], color=COLORS[0] if len(runs) == 1 else "#666666", lw=1.7, label="training batches")]
    for i, name in enumerate(sets):
        own, marker = COLORS[1 + i % (len(COLORS) - 1)], MARKERS[i % len(MARKERS)]
        aside = 0.01 * last * (i - (len(sets) - 1) / 2)  # sets that are equally good stay visible side by side
        for j, records in enumerate(runs):
            prefix = f"eval.{name}."
            asked = [r for r in records if r.get(f"{prefix}n")]
            found = [interval({k.removeprefix(prefix): v for k, v in r.items() if k.startswith(prefix)}) for r in asked]
            share, low, high = np.array(found).reshape(-1, 3).T
            steps = np.array([r["step"] + aside for r in asked])
            style = {"marker": marker, "ms": 4.5, "mec": "white", "mew": 0.5, "lw": 0, "elinewidth": 0.9, "zorder": 3}
            axis.errorbar(steps, share, [share - low, high - share], color=own if len(runs) == 1 else COLORS[j % len(COLORS)], **style)
        color = own if len(runs) == 1 else "#666666"
        legend.append(Line2D([], [], lw=0, marker=marker, ms=5, color=color, label=name.replace("_", " ")))
    if sets:
        axis.legend(handles=legend, fontsize=8, loc="best")

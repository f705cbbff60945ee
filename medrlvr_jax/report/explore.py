"""The data of curves: the metrics of a run as columns, on common steps for several runs, and for the page."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from medrlvr_jax.host.files import Records
from medrlvr_jax.runs import metrics

SIZE = 1_500_000  # characters of JSON for all curves together, approximately
MIN_POINTS, MAX_POINTS, STAGE_POINTS = 60, 500, 40  # points of a curve, and of a picture of stages
# Okabe and Ito's colours, which colour-blind readers can distinguish, without black because of dark pages
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A2A")
GREY = "#7F7F7F"
FILLS = {  # of the stages
    "format_failure": "#BBBBBB",
    "verbose_formatter": "#E69F00",
    "concise_structurer": "#56B4E9",
    "direct_answer_hacker": "#D55E00",
    "step_by_step_exploit": "#CC79A7",
    "reintegrated_reasoning": "#009E73",
}
HIDDEN = ("step", "row/*")  # metrics without a curve


class Column(NamedTuple):
    steps: Int[np.ndarray, " n"]
    values: Float64[np.ndarray, " n"]


Columns = Mapping[str, Column]  # the metrics of a run by name


def columns(records: Records) -> Columns:
    """Return each metric at the steps at which it is a finite number."""
    steps, out = np.array([record["step"] for record in records]), {}
    for name in sorted({name for record in records for name in record}):
        values = np.array([record.get(name) for record in records], float)
        finite = np.isfinite(values)
        out[name] = Column(steps[finite], values[finite])
    return {name: column for name, column in out.items() if len(column.steps)}


def over_steps(
    runs: Sequence[Columns], name: str, points: int
) -> tuple[Int[np.ndarray, " steps"], Float64[np.ndarray, "runs steps"]]:
    """Return the steps at which any run recorded the metric, and its values; NaN if a run has none.

    More than `points` steps are divided into that many equal intervals. Their last steps and the means over
    them are then returned.
    """
    recorded = [run.get(name, Column(np.zeros(0, int), np.zeros(0))) for run in runs]
    steps = np.unique(np.concatenate([column.steps for column in recorded]))
    values = np.full((len(runs), len(steps)), np.nan)
    for row, column in zip(values, recorded, strict=True):
        row[np.searchsorted(steps, column.steps)] = column.values
    if len(steps) <= points:
        return steps, values
    starts = np.linspace(0, len(steps), points, endpoint=False).astype(int)
    known = ~np.isnan(values)
    total = np.add.reduceat(np.where(known, values, 0), starts, axis=1)
    count = np.add.reduceat(known, starts, axis=1, dtype=float)
    ends = np.append(starts[1:], len(steps)) - 1
    return steps[ends], np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def curves(groups: Sequence[Sequence[Columns]]) -> list[dict[str, Any]]:
    """Return `{name, unit, meaning, curves}` of each metric, for report.js.

    `curves` has `[steps, values of the first run, values of the second, …]` for each group of runs, with four
    digits, and null if a run has no value. It has `[]` if no run of the group recorded the metric.
    """
    names = sorted({name for runs in groups for run in runs for name in run})
    known = {name: metrics.find(name) or metrics.Metric(name, "", "") for name in names}
    names = [name for name in names if known[name].name not in HIDDEN]
    number = sum(len(runs) + 1 for runs in groups)
    points = int(np.clip(SIZE / 8 / max(1, len(names) * number), MIN_POINTS, MAX_POINTS))
    return [
        {
            "name": name,
            "unit": known[name].unit,
            "meaning": known[name].meaning.replace("`", ""),
            "curves": [_curve(runs, name, points) for runs in groups],
        }
        for name in names
    ]


def _curve(runs: Sequence[Columns], name: str, points: int) -> list[list[float | None]]:
    steps, values = over_steps(runs, name, points)
    if not len(steps):
        return []
    rows = [[None if np.isnan(x) else float(f"{x:.4g}") for x in row] for row in values.tolist()]
    return [steps.tolist(), *rows]

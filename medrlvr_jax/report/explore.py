"""The data of a report's curves: every metric of every run, thinned so that the page stays small."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medrlvr_jax.runs import metrics
from medrlvr_jax.runs.log import Records

SIZE = 1_500_000  # characters of JSON, about, for all curves together
LEAST, MOST = 60, 500  # points of a curve
HIDDEN = ("step", "row/*")  # not curves


def curves(runs: Sequence[tuple[str, str, Records]]) -> dict[str, Any]:
    """`{"runs": [{name, color}], "metrics": [{name, unit, meaning, curves}]}` for explore.js.

    `runs`: each run's name, colour and records. A metric's `curves` have `[steps, values]` for each run,
    empty where the run did not record it. A curve of more points than there is room for has the means of
    equal stretches of steps.
    """
    names = sorted({k for _, _, records in runs for r in records for k, v in r.items() if _is_number(v)})
    known = {name: metrics.find(name) or metrics.Metric(name, "", "") for name in names}
    names = [name for name in names if known[name].name not in HIDDEN]
    points = int(np.clip(SIZE / 16 / max(1, len(names) * len(runs)), LEAST, MOST))
    shown = []
    for name in names:
        curves = [[(r["step"], r[name]) for r in records if _is_number(r.get(name))] for *_, records in runs]
        about = {"name": name, "unit": known[name].unit, "meaning": known[name].meaning}
        shown.append(about | {"curves": [thinned(curve, points) for curve in curves]})
    return {"runs": [{"name": name, "color": color} for name, color, _ in runs], "metrics": shown}


def thinned(curve: list[tuple[int, float]], points: int) -> list[list[float]]:
    """At most `points` steps and values with four digits: the means of equal stretches of the curve."""
    if not curve:
        return [[], []]
    parts = np.array_split(np.array(curve, float), min(points, len(curve)))
    steps: list[float] = [int(part[-1, 0]) for part in parts]
    return [steps, [float(f"{part[:, 1].mean():.4g}") for part in parts]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)

"""`medrlvr report RUN …`: runs as one self-contained HTML file.

This file collects the content of the page; templates/report.html has its form. Runs that differ only in the
seed are a group, drawn as a mean and a band. Names and completions of runs are untrusted text: the template
escapes them, the script sets them as `textContent`, and the page's policy blocks the network. Only some steps
of long runs are read, so that a page of many runs takes seconds and few megabytes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from medrlvr_jax.config import load as configs
from medrlvr_jax.evaluation.answers import interval, percent
from medrlvr_jax.evaluation.stats import Interval
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import Records, read_json, read_jsonl, short_names, write_text
from medrlvr_jax.report import answers, explore
from medrlvr_jax.runs.console import evaluations_by_set, format_duration
from medrlvr_jax.runs.metrics import is_due

MAX_NAMED = 3  # settings in the name of a group
IGNORED = ("name", "runs", "seed", "log", "checkpoint", "mesh")  # settings that may differ within a group
STEPS, SAMPLES = 10_000, 2000  # the number that is read for a page, from all runs together
SAMPLE_SIZE, LENGTH = 1_500_000, 6000  # characters of all samples on a page, approximately, and of one text
FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Run:
    """The content of the folder of a run or of an evaluation."""

    name: str
    folder: Path  # absolute
    config: dict[str, Any]  # flat
    metrics: explore.Columns  # empty for an evaluation
    samples: Records
    summary: dict[str, Any]  # empty while the run is in progress
    evals: dict[str, dict[str, dict[str, Any]]]  # {set: {"before", "after": counts}}

    @property
    def settings_text(self) -> str:
        return "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in self.config.items())


@dataclass(frozen=True)
class Group:
    """Runs whose settings are equal except for `IGNORED`: the seeds of one method."""

    name: str
    number: int  # among all groups of the page; it determines the style in all pictures
    runs: list[Run]
    differs: str  # the settings that distinguish it from most other groups, if its name does not have them

    @property
    def color(self) -> str:
        return explore.COLORS[self.number % len(explore.COLORS)]

    @property
    def dash(self) -> Sequence[float]:
        """The lengths in pixels of dashes and gaps; [] for a solid line."""
        return ([], [6, 3], [6, 3, 1.5, 3], [1.5, 2.5], [6, 2, 1.5, 2])[self.number % 5]

    def counts(self, set_name: str, when: str) -> list[dict[str, Any]]:
        """Return the counts of the runs that evaluated the set `before` or `after` training."""
        return [c for run in self.runs if (c := run.evals.get(set_name, {}).get(when))]


class Arm(NamedTuple):
    """A row of the accuracies on one set: a group after training, or a policy before training."""

    name: str
    color: str
    runs: list[Interval]
    texts: list[str]  # a description of each of `runs`

    @property
    def mean(self) -> float:
        return float(np.mean([share.value for share in self.runs]))


def write_page(folders: Sequence[Path], out: Path) -> None:
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    write_text(out, html([read_run(folder, len(distinct)) for folder in distinct]))


def html(runs: Sequence[Run], live: str = "", awaited: Sequence[Path] = ()) -> str:
    """Return the page. `live` is the version of a served page, `awaited` the runs that do not exist yet."""
    runs = with_unique_names(runs)
    groups = group(runs)
    trained = [g for g in groups if g.runs[0].metrics]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lines = [
        {"name": g.name, "color": g.color, "dash": g.dash, "runs": [r.name for r in g.runs]} for g in trained
    ]
    return templates.get_template("report.html").render(
        live=live,
        awaited=awaited,
        explore={
            "groups": lines,
            "metrics": explore.curves([[run.metrics for run in g.runs] for g in trained]),
        },
        groups=groups,
        trained=trained,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        accuracies=accuracies(groups),
        answers=answers.answers({run.name: run.folder for run in runs}),
        stages=stages(trained),
        fills=explore.FILLS,
        alarms=alarms(runs),
        samples=samples(runs),
        differing=differing([(g.name, g.runs[0].config) for g in groups]),
        cards=[(run.name, list(facts(run)), run.settings_text) for run in runs],
    )


# --- runs and groups ---


def read_run(folder: Path, runs: int = 1) -> Run:
    """Read the folder of a run, or of `medrlvr eval`, which has accuracies alone.

    `runs` is the number of runs on the page: with more, fewer steps and samples of each are read, but all
    evaluations and alarms. Raises `ConfigError` if the folder is neither, or if a file cannot be read.
    """
    folder, remedy = folder.resolve(), "repair it, or leave this folder out"
    config, samples, summary = (folder / name for name in ("config.yaml", "samples.jsonl", "summary.json"))
    log = folder / "metrics.jsonl"  # does not exist before the first step
    if not log.exists() and not config.exists():
        if not (folder / "eval.json").exists():
            either = "name a run's folder, such as runs/<name>, or one that `medrlvr eval` wrote"
            raise ConfigError(f"{folder}: no metrics.jsonl there; {either}")
        tree = read_json(folder / "eval.json", remedy)
        evals = {name: {"after": counts} for name, counts in tree["eval"].items()}
        settings = configs.settings_of(tree["config"]) if "config" in tree else {}
        return Run("/".join(folder.parts[-2:]), folder, settings, {}, [], tree, evals)
    settings = configs.settings_of(configs.read_yaml(config, remedy)) if config.exists() else {}
    records = read_jsonl(log, STEPS // runs, (b'"eval.', b'"alarm/')) if log.exists() else []
    return Run(
        name=str(settings.get("name", folder.name)),
        folder=folder,
        config=settings,
        metrics=explore.columns(records),
        samples=read_jsonl(samples, SAMPLES // runs) if samples.exists() else [],
        summary=read_json(summary, remedy) if summary.exists() else {},
        evals=evaluations_by_set(records),
    )


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Return the runs; those that have one name are named by the distinct ends of their paths."""
    names, paths = [run.name for run in runs], short_names([run.folder for run in runs])
    renamed = {name for name in names if names.count(name) > 1}
    pairs = zip(runs, paths, strict=True)
    return [replace(run, name=path) if run.name in renamed else run for run, path in pairs]


def group(runs: Sequence[Run]) -> list[Group]:
    """Return groups of runs whose settings are equal except for `IGNORED`, in the order of their first runs.

    If a seed occurs twice, because an experiment was repeated elsewhere, the runs of each folder are a group.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.config.items() if k.split(".")[0] not in IGNORED}
        key = json.dumps(same, sort_keys=True) if run.metrics else str(run.folder)
        alike.setdefault(key, []).append(run)
    split: dict[tuple[str, Path | None], list[Run]] = {}
    for settings, members in alike.items():
        repeated = len({run.config.get("seed") for run in members}) < len(members)
        for run in members:
            split.setdefault((settings, run.folder.parent if repeated else None), []).append(run)
    names = [common_name([run.name for run in members]) for members in split.values()]
    differs = distinguishing([members[0].config for members in split.values()])
    # Settings distinguish groups of one name, and numbers if the settings are equal.
    names = [f"{x}, {y}" if names.count(x) > 1 and y else x for x, y in zip(names, differs, strict=True)]
    shown = ["" if name.endswith(y) else y for name, y in zip(names, differs, strict=True)]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    names = [f"{name} ({n})" if n > 1 else name for name, n in zip(names, counts, strict=True)]
    return [Group(names[i], i, members, shown[i]) for i, members in enumerate(split.values())]


def distinguishing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each config the settings whose value at most half of the configs have, such as
    "kl.coef 0.5, steps 64": the first `MAX_NAMED` of them and the number of the others.
    """
    _, *rows = differing([(str(i), config) for i, config in enumerate(configs)])
    numbers = [i for i, config in enumerate(configs) if config]
    out = [""] * len(configs)
    for place, i in enumerate(numbers):
        rare = [
            f"{name} {values[place]}"
            for name, *values in rows
            if all(name in configs[j] for j in numbers) and 2 * values.count(values[place]) <= len(values)
        ]
        more = f" and {len(rare) - MAX_NAMED} more" if len(rare) > MAX_NAMED else ""
        out[i] = ", ".join(rare[:MAX_NAMED]) + more
    return out


def common_name(names: list[str]) -> str:
    """Return the common beginning, such as "ppo" of "ppo-seed1" and "ppo-seed2"; else the first name."""
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", "".join(column[0] for column in letters))
    return names[0] if len(names) == 1 or not common else common


# --- the sections ---


def accuracies(groups: Sequence[Group]) -> dict[str, list[Arm]]:
    """Return for each set the policies before training and each group after training."""
    out = {}
    for name in dict.fromkeys(s for g in groups for run in g.runs for s in run.evals):
        before = {describe(c): c for g in groups for c in g.counts(name, "before")}
        arms = [  # several before training, if runs started from other weights or were evaluated otherwise
            (f"before training{f' ({i})' if len(before) > 1 else ''}", explore.GREY, [before[text]])
            for i, text in enumerate(sorted(before), 1)
        ]
        arms += [(g.name, g.color, counts) for g in groups if (counts := g.counts(name, "after"))]
        out[name.replace("_", " ")] = [
            Arm(arm, color, list(map(interval, counts)), list(map(describe, counts)))
            for arm, color, counts in arms
        ]
    return out


def describe(counts: dict[str, Any]) -> str:
    """Return an evaluation's accuracy as text, such as "30 of 50: 60.0 % (46.2–72.4)"."""
    n, questions = counts["n"], counts.get("questions", counts["n"])
    asked = f"{n:,}" if n == questions else f"{n:,} answers to {questions:,} questions"
    return f"{counts['correct']:,} of {asked}: {percent(interval(counts))}"


def stages(groups: Sequence[Group]) -> list[tuple[str, int, int, list[tuple[str, str]]]]:
    """Return for each group its name, first and last step, and the colour and area of each stage.

    The points of the areas are in per cent of the picture.
    """
    out = []
    for g in groups:
        if g.runs[0].config.get("reward.mode") == "direct":  # logs of older versions have wrong stages
            continue
        runs = [run.metrics for run in g.runs]
        layers = [explore.over_steps(runs, f"stage/{stage}", explore.STAGE_POINTS) for stage in explore.FILLS]
        steps = layers[0][0]
        if not len(steps):
            continue
        shares = [np.nanmean(values, 0) for _, values in layers]
        edges = np.cumsum([np.zeros(len(steps)), *shares], 0)
        x = 100 * (steps - steps[0]) / max(1, steps[-1] - steps[0]) if len(steps) > 1 else np.array([0, 100])
        areas = []
        for stage, low, high in zip(explore.FILLS, edges, edges[1:], strict=False):
            low, high = (np.broadcast_to(100 - 100 * edge, x.shape) for edge in (low, high))
            corners = [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]
            areas.append((explore.FILLS[stage], " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)))
        out.append((g.name, int(steps[0]), int(steps[-1]), areas))
    return out


def alarms(runs: Sequence[Run]) -> list[tuple[str, str, int, int, int]] | None:
    """Return the reported alarms: run, alarm, number of steps, first and last step.

    The result is None if no run had monitors.
    """
    if not any(name.startswith("monitor/") for run in runs for name in run.metrics):
        return None
    rows = []
    for run in runs:
        for name, (steps, durations) in run.metrics.items():
            alarm, raised = name.removeprefix("alarm/"), steps[durations > 0]
            # An alarm that did not last was not reported.
            if name.startswith("alarm/") and any(is_due(alarm, int(n)) for n in durations[durations > 0]):
                rows.append((run.name, alarm.replace("_", " "), len(raised), int(raised[0]), int(raised[-1])))
    return rows


def samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return as many logged completions, evenly chosen, as fit into `SAMPLE_SIZE`."""
    rows = [{k: shortened(v) for k, v in s.items()} | {"run": run.name} for run in runs for s in run.samples]
    pictures = lambda row: sum(map(len, row.get("images", ())))
    size = sum(len(row["prompt"]) + len(row["completion"]) + pictures(row) + 300 for row in rows)
    number = min(len(rows), len(rows) * SAMPLE_SIZE // max(1, size))
    return [rows[i] for i in np.linspace(0, len(rows) - 1, number).round().astype(int)]


def shortened(value: Any) -> Any:
    """Cut a text to `LENGTH` characters and a note. Other values are returned unchanged."""
    if not isinstance(value, str) or len(value) <= LENGTH:
        return value
    return f"{value[:LENGTH]}… [the first {LENGTH:,} of {len(value):,} characters; samples.jsonl has all]"


def differing(configs: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Return the head and rows of a table of the settings in which configs differ, without `IGNORED`."""
    configs = [(name, config) for name, config in configs if config]
    keys = dict.fromkeys(k for _, config in configs for k in config if k.split(".")[0] not in IGNORED)
    rows = [[k, *(str(config.get(k)) for _, config in configs)] for k in keys]
    return [["setting", *(name for name, _ in configs)], *(row for row in rows if len(set(row[1:])) > 1)]


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the names and values that a repetition of the run needs beside its settings."""
    if run.metrics:
        last, steps = int(run.metrics["step"].values[-1]), run.summary.get("steps")
        yield "steps", f"{last} of {steps}" if steps else f"{last} so far: the run has no summary.json yet"
        if seconds := run.metrics.get("seconds"):
            total, median = format_duration(float(seconds.values.mean()) * last), np.median(seconds.values)
            yield "time", f"{total} in steps, {median:.2f} s a step (median)"
    elif not run.summary:
        yield "steps", "none so far: it reads, compiles, or is evaluated before training"
    if v := run.summary.get("versions"):
        git = v.get("git")
        commit = git and f"{git['revision']}{' with changes' if git['dirty'] else ''}"
        yield "code", commit or f"medrlvr_jax {v.get('medrlvr_jax')}"
        processes = f"{v['processes']} process{'es' * (v['processes'] > 1)}"
        yield "hardware", f"{v['devices']} × {v['device_kind']}, {processes}; {v['platform']}"
        shown = ("medrlvr_jax", "git", "platform", "device_kind", "devices", "processes")
        yield "versions", ", ".join(f"{name} {version}" for name, version in v.items() if name not in shown)
    for name, data in run.summary.get("data", {}).items():
        yield f"data: {name}", f"{data['n']:,} rows, sha256 {data['sha256']}"

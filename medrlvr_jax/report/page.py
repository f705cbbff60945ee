"""`medrlvr report RUN …`: runs as one HTML file that needs nothing else, and its pictures as PNG beside it.

This file gathers what the page shows; templates/report.html says how. Runs that differ only in their seed are
one group: a mean and a band. Names and completions of runs are untrusted text. The template escapes them, and
the script that shows samples sets them as `textContent`. The page forbids itself the network.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure

from medrlvr_jax.config import load as configs
from medrlvr_jax.evaluation.answers import percent
from medrlvr_jax.evaluation.monitors import is_due
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_json, read_jsonl, write_text
from medrlvr_jax.report import explore, pictures
from medrlvr_jax.report.ending import interval
from medrlvr_jax.rewards.stages import STAGES
from medrlvr_jax.runs.console import before_after, clock
from medrlvr_jax.runs.log import Records

ALIKE = ("name", "runs", "seed", "log", "checkpoint", "mesh")  # settings that may differ within a group
SAMPLES, LENGTH = 2000, 6000  # samples on a page, and characters of one
FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Run:
    """What the page needs of a run's folder, or of an evaluation's."""

    name: str
    folder: Path  # absolute
    config: dict[str, Any]  # flat
    records: Records
    samples: Records
    summary: dict[str, Any]  # empty while the run goes on
    evals: dict[str, dict[str, dict[str, Any]]]  # {set: {"before", "after": counts}}

    def counts(self, set_name: str, when: str) -> dict[str, Any] | None:
        """Of one evaluation; None where nothing was asked."""
        counts = self.evals.get(set_name, {}).get(when)
        return counts if counts and counts["n"] else None


@dataclass(frozen=True)
class Group:
    name: str
    number: int  # among all groups of the page: its style, in every picture
    runs: list[Run]

    @property
    def color(self) -> str:
        return pictures.COLORS[self.number % len(pictures.COLORS)]

    @property
    def dash(self) -> str:
        """`pictures.DASHES` as SVG has it."""
        return ("", "6 3", "6 3 1.5 3", "1.5 2.5", "6 2 1.5 2")[self.number % len(pictures.DASHES)]


class Picture(NamedTuple):
    svg: str
    label: str  # for screen readers
    rows: Sequence[tuple[str, str, str]] = ()  # the numbers that it shows


def write_page(folders: Sequence[Path], out: Path, live: str = "") -> None:
    """The page, and a folder `<stem>_pictures` beside it. `live`: of a page that is served, its version."""
    runs = with_unique_names([read_run(folder) for folder in dict.fromkeys(f.resolve() for f in folders)])
    groups = group(runs)
    trained = [g for g in groups if g.runs[0].records]
    folder = out.with_name(f"{out.stem}_pictures")
    folder.mkdir(parents=True, exist_ok=True)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html").render(
        live=live,
        explore=explore.curves([(run.name, g.color, run.records) for g in trained for run in g.runs]),
        groups=groups,
        trained=trained,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        accuracies=accuracies(groups, folder),
        stages=stages(trained, folder),
        fills=[(stage, pictures.FILLS[stage][0]) for stage in reversed(STAGES)],
        curves=curves(trained, folder),
        alarms=alarms(runs),
        samples=samples(runs),
        differing=differing(groups),
        cards=[(run.name, list(facts_of(run)), settings_of(run)) for run in runs],
    )
    write_text(out, page)


# --- runs and groups ---


def read_run(folder: Path) -> Run:
    """A run's folder, or one of `medrlvr eval`, which has accuracies alone and is named by its path's end."""
    folder, remedy = folder.resolve(), "repair it, or leave this folder out"
    if not (folder / "metrics.jsonl").exists():
        if not (folder / "eval.json").exists():
            either = "name a run's folder, such as runs/<name>, or one that `medrlvr eval` wrote"
            raise ConfigError(f"{folder}: no metrics.jsonl there; {either}")
        tree = read_json(folder / "eval.json", remedy)
        evals = {name: {"after": counts} for name, counts in tree["eval"].items()}
        settings = configs.flat(tree.get("config", {}))
        return Run("/".join(folder.parts[-2:]), folder, settings, [], [], tree, evals)
    config, samples, summary = (folder / name for name in ("config.yaml", "samples.jsonl", "summary.json"))
    settings = configs.flat(configs.read_yaml(config, remedy)) if config.exists() else {}
    records = read_jsonl(folder / "metrics.jsonl")
    return Run(
        name=str(settings.get("name", folder.name)),
        folder=folder,
        config=settings,
        records=records,
        samples=read_jsonl(samples) if samples.exists() else [],
        summary=read_json(summary, remedy) if summary.exists() else {},
        evals=before_after(records),
    )


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name, in different folders, are named by as much of their paths as makes them differ."""
    out = list(runs)
    for name in {run.name for run in runs}:
        places = [i for i, run in enumerate(runs) if run.name == name]
        if len(places) > 1:
            longer = pictures.short_names([runs[i].folder for i in places])
            for i, new in zip(places, longer, strict=True):
                out[i] = replace(runs[i], name=new)
    return out


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings are the same but for `ALIKE`, in the order in which they were given.

    Where a seed comes twice, as if an experiment was made again elsewhere, each folder's runs are a group.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.config.items() if k.split(".")[0] not in ALIKE}
        key = json.dumps(same, sort_keys=True) if run.records else str(run.folder)
        alike.setdefault(key, []).append(run)
    split: dict[tuple[str, Path | None], list[Run]] = {}
    for settings, members in alike.items():
        repeated = len({run.config.get("seed") for run in members}) < len(members)
        for run in members:
            split.setdefault((settings, run.folder.parent if repeated else None), []).append(run)
    names = [common_name([run.name for run in members]) for members in split.values()]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    numbered = [f"{name} ({n})" if n > 1 else name for name, n in zip(names, counts, strict=True)]
    return [Group(numbered[i], i, members) for i, members in enumerate(split.values())]


def common_name(names: list[str]) -> str:
    """What the names begin with: "ppo" of "ppo-seed1" and "ppo-seed2"; the first if that is nothing."""
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", "".join(column[0] for column in letters))
    return names[0] if len(names) == 1 or not common else common


# --- the sections ---


def picture(folder: Path, name: str, label: str, draw: Callable[[], Figure | None]) -> list[Picture]:
    """The picture in a list, which is empty where there is none."""
    svg = pictures.save(draw, folder / re.sub(r"[^\w.-]+", "-", name))
    return [Picture(svg, label)] if svg else []


def accuracies(groups: Sequence[Group], folder: Path) -> list[Picture]:
    """A picture and a table for each set: the policies before training, then each group after it."""
    out = []
    for name in dict.fromkeys(s for g in groups for run in g.runs for s in run.evals):
        before = {in_words(c): c for g in groups for run in g.runs if (c := run.counts(name, "before"))}
        arms = [  # several before training, if runs began at other weights or were asked otherwise
            (f"before training{f' ({i})' if len(before) > 1 else ''}", pictures.GREY, [before[text]])
            for i, text in enumerate(sorted(before), 1)
        ]
        arms += [(g.name, g.color, [c for run in g.runs if (c := run.counts(name, "after"))]) for g in groups]
        arms = [(arm, color, counts) for arm, color, counts in arms if counts]
        if not arms:
            continue
        bars = [(arm, color, [interval(c) for c in counts]) for arm, color, counts in arms]
        means = [f"{100 * np.mean([share.value for share in shares]):.1f} %" for _, _, shares in bars]
        each = ["\n".join(map(in_words, counts)) for _, _, counts in arms]
        rows = [(arm, runs, mean) for (arm, _, _), runs, mean in zip(arms, each, means, strict=True)]
        title = name.replace("_", " ")
        draw = partial(pictures.bar_figure, bars, title)
        drawn = picture(folder, f"accuracy-{name}", f"right answers on {title}", draw)
        out += [p._replace(rows=rows) for p in drawn]
    return out


def in_words(counts: dict[str, Any]) -> str:
    """An evaluation's accuracy with its interval over questions: "30 of 50: 60.0 % (46.2–72.4)"."""
    n, questions = counts["n"], counts.get("questions", counts["n"])
    asked = f"{n:,}" if n == questions else f"{n:,} answers to {questions:,} questions"
    return f"{counts['correct']:,} of {asked}: {percent(interval(counts)._asdict())}"


def stages(groups: Sequence[Group], folder: Path) -> list[Picture]:
    out = []
    for g in groups:
        if g.runs[0].config.get("reward.mode") != "direct":  # older logs call its answers format failures
            draw = partial(pictures.stage_figure, [run.records for run in g.runs], g.name)
            label = f"shares of the six stages over the steps of {g.name}"
            out += picture(folder, f"stages-{g.name}", label, draw)
    return out


def curves(groups: Sequence[Group], folder: Path) -> list[Picture]:
    records = [(g.number, [run.records for run in g.runs]) for g in groups]
    out = []
    for panel in (*pictures.PANELS, *pictures.MORE):
        draw = partial(pictures.curve_figure, panel, records)
        out += picture(folder, f"curve-{panel.key}", f"{panel.title} over the steps", draw)
    return out


def alarms(runs: Sequence[Run]) -> list[tuple[str, str, int, int, int]] | None:
    """What the monitors reported: run, alarm, number of steps, first, last; None if no run had monitors."""
    if not any(k.startswith("monitor/") for run in runs for r in run.records for k in r):
        return None
    rows = []
    for run in runs:
        for name in sorted({k for r in run.records for k in r if k.startswith("alarm/")}):
            alarm, raised = name.removeprefix("alarm/"), [r for r in run.records if r.get(name)]
            if any(is_due(alarm, r[name]) for r in raised):  # else it never lasted long enough to be reported
                first, last = raised[0]["step"], raised[-1]["step"]
                rows.append((run.name, alarm.replace("_", " "), len(raised), first, last))
    return rows


def samples(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """At most `SAMPLES` logged completions, evenly chosen, and how many there are."""
    rows = [sample | {"run": run.name} for run in runs for sample in run.samples]
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows))).round().astype(int)
    return [{k: shortened(v) for k, v in rows[i].items()} for i in chosen], len(rows)


def shortened(value: Any) -> Any:
    """A text of at most about `LENGTH` characters, with a note if it was longer; other values as they are."""
    if not isinstance(value, str) or len(value) <= LENGTH:
        return value
    return f"{value[:LENGTH]}… [the first {LENGTH:,} of {len(value):,} characters; samples.jsonl has all]"


def differing(groups: Sequence[Group]) -> list[list[str]]:
    """The settings in which the groups differ: a head, then a row a setting."""
    firsts = {g.name: g.runs[0].config for g in groups if g.runs[0].config}
    keys = dict.fromkeys(k for config in firsts.values() for k in config if k.split(".")[0] not in ALIKE)
    rows = [[k, *(str(config.get(k)) for config in firsts.values())] for k in keys]
    return [["setting", *firsts], *(row for row in rows if len(set(row[1:])) > 1)]


def settings_of(run: Run) -> str:
    return "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in run.config.items())


def facts_of(run: Run) -> Iterator[tuple[str, str]]:
    """What is needed to make the run again, beside its settings."""
    if run.records:
        last, steps = run.records[-1]["step"], run.summary.get("steps")
        yield "steps", f"{last} of {steps}" if steps else f"{last} so far: the run has no summary.json yet"
        seconds = [r["seconds"] for r in run.records if r.get("seconds")]
        if seconds:
            yield "time", f"{clock(sum(seconds))} in steps, {np.median(seconds):.2f} s a step (median)"
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

"""`medrlvr report RUN …`: runs as one HTML file that needs nothing else, and its pictures as PNG beside it.

Runs that differ in nothing but their seed are one group: a mean and a band. All that runs bring, names and completions above all, is
text: escaped in the markup, and put into the page by the browser's `textContent` where the script shows samples. The page forbids
itself the network.
"""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from medrlvr_jax.config import load as configs
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.files import read_json, read_jsonl, write_text
from medrlvr_jax.report import pictures as report
from medrlvr_jax.rewards.stages import STAGES
from medrlvr_jax.runs.console import before_after, clock
from medrlvr_jax.runs.log import Records

ALIKE = ("name", "runs", "seed", "log", "checkpoint", "mesh")  # settings by which runs of one group may differ
SAMPLES, LENGTH = 2000, 6000  # samples on a page, and characters of one
BASE = "#666666"
HATCHES = {  # as report.FILLS has them
    "direct_answer_hacker": '<path d="M-4 12L8 0M4 12L16 0M12 12L24 0M20 12L32 0M28 12L40 0" stroke="#fff" stroke-width="1.5"/>',
    "step_by_step_exploit": '<path d="M3 4H32M6 9H32" stroke="#fff" stroke-width="2.5" stroke-dasharray="2.5 5"/>',
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"  # no network
FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Run:
    """What a run's folder, or that of an evaluation, tells."""

    name: str
    folder: Path  # absolute
    config: dict[str, Any]  # flat
    records: Records
    samples: Records
    summary: dict[str, Any]  # empty while the run goes on
    evals: dict[str, dict[str, dict[str, Any]]]  # {set: {"before", "after": counts}}


@dataclass(frozen=True)
class Group:
    name: str
    place: int  # among all groups of the page: its style, in every picture
    runs: list[Run]

    @property
    def color(self) -> str:
        return report.COLORS[self.place % len(report.COLORS)]

    @property
    def dash(self) -> str:
        """As SVG has it."""
        return ("", "6 3", "6 3 1.5 3", "1.5 2.5", "6 2 1.5 2")[self.place % len(report.DASHES)]


def read_run(folder: Path) -> Run:
    """A run's folder, or one that `medrlvr eval` wrote: of that one the accuracies are shown, named by its path's end."""

    def read(name: str, otherwise: Any) -> Any:
        path = folder / name
        if not path.exists():
            return otherwise
        if path.suffix == ".jsonl":
            return read_jsonl(path)
        remedy = "repair it, or leave this folder out"
        return read_json(path, remedy) if path.suffix == ".json" else configs.read_yaml(path, remedy)

    records = read("metrics.jsonl", None)
    if records is None:
        found = read("eval.json", None)
        if found is None:
            raise ConfigError(
                f"{folder}: no metrics.jsonl there; name a run's folder, such as runs/<name>, or one that `medrlvr eval` wrote"
            )
        name = "/".join(folder.resolve().parts[-2:])
        return Run(
            name,
            folder.resolve(),
            configs.flat(found.get("config", {})),
            [],
            [],
            found,
            {s: {"after": counts} for s, counts in found["eval"].items()},
        )
    config = configs.flat(read("config.yaml", {}))
    name = str(config.get("name", folder.resolve().name))
    return Run(name, folder.resolve(), config, records, read("samples.jsonl", []), read("summary.json", {}), before_after(records))


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name, in different folders, by as much of their paths as tells them apart."""
    alike = {name: [run.folder for run in runs if run.name == name] for name in {run.name for run in runs}}
    longer = {
        folder: name
        for folders in alike.values()
        if len(folders) > 1
        for folder, name in zip(folders, report.short_names(folders), strict=True)
    }
    return [replace(run, name=longer.get(run.folder, run.name)) for run in runs]


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings are the same but for `ALIKE`, in the order in which they were named. A seed that comes twice is no seed more:
    then those of each folder are a group, as of an experiment that was made again elsewhere."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.config.items() if k.split(".")[0] not in ALIKE}
        alike.setdefault(json.dumps(same, sort_keys=True) if run.records else str(run.folder), []).append(run)
    found: dict[tuple[str, Path | None], list[Run]] = {}
    for settings, members in alike.items():
        twice = len({run.config.get("seed") for run in members}) < len(members)
        for run in members:
            found.setdefault((settings, run.folder.parent if twice else None), []).append(run)
    groups, names = [], []
    for i, members in enumerate(found.values()):
        letters = zip(*(r.name for r in members), strict=False)
        common = "".join(x[0] for x in takewhile(lambda x: len(set(x)) == 1, letters))
        common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common)  # of "ppo-seed1" and "ppo-seed2"
        name = members[0].name if len(members) == 1 or not common else common
        names.append(name)
        name = name if names.count(name) == 1 else f"{name} ({names.count(name)})"
        groups.append(Group(name, i, members))
    return groups


def write_page(folders: Sequence[Path], out: Path) -> None:
    """The page, and a folder `<stem>_pictures` beside it."""
    runs = named_apart([read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()])
    groups = group(runs)
    pictures = out.with_name(f"{out.stem}_pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    trained = [g for g in groups if g.runs[0].records]
    sections = {
        "Accuracy": accuracies(groups, pictures),
        "Stages": stages(trained, pictures),
        "Curves": curves(trained, pictures),
        "Alarms": alarms(runs),
        "Samples": browser(groups),
        "Run card": cards(groups),
    }
    sections = {title: body for title, body in sections.items() if body}
    title = ", ".join(g.name for g in groups)
    links = "".join(f'<li><a href="#{anchor(t)}">{t}</a></li>' for t in sections)
    body = "".join(f'<section aria-labelledby="{anchor(t)}"><h2 id="{anchor(t)}">{t}</h2>{b}</section>\n' for t, b in sections.items())
    style, script = ((FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    write_text(
        out,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{esc(title)}: medrlvr report</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{esc(title)}</h1>
<p class="soft">{counted(groups)}; made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by medrlvr report.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}</main>
{f"<script>{script}</script>" if "Samples" in sections else ""}
</body>
</html>
""",
    )


def counted(groups: Sequence[Group]) -> str:
    said = [f"{esc(g.name)}: {len(g.runs)} run{'s' * (len(g.runs) > 1)}" for g in groups]
    return "; ".join(said)


def esc(value: Any) -> str:
    return html.escape(str(value))


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers to the right; what is a text may break."""

    def cell(x: Any) -> str:
        return f'<td class="number">{x:,}</td>' if isinstance(x, int) else f'<td class="text">{esc(x)}</td>'

    top = "".join(f"<th scope=col>{esc(h)}</th>" for h in head)
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def figure(svg: str, label: str, caption: str = "") -> str:
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{esc(label)}" ', 1)
    return f"<figure>{svg}{f'<figcaption>{esc(caption)}</figcaption>' if caption else ''}</figure>"


def swatch(inside: str) -> str:
    return f'<svg viewBox="0 0 32 12" aria-hidden="true">{inside}</svg>'


def legend(groups: Sequence[Group]) -> str:
    def line(g: Group) -> str:
        return swatch(f'<path d="M0 6H32" stroke="{g.color}" stroke-width="3" stroke-dasharray="{g.dash}"/>')

    return f'<ul class="legend">{"".join(f"<li>{line(g)}{esc(g.name)}</li>" for g in groups)}</ul>'


def accuracies(groups: Sequence[Group], pictures: Path) -> str:
    """A picture and a table for each set: the policies before training, then each group after it."""
    out = []
    for name in dict.fromkeys(s for g in groups for run in g.runs for s in run.evals):
        arms = []
        before = {said(e): e for g in groups for run in g.runs if (e := run.evals.get(name, {}).get("before")) and e["n"]}
        for i, text in enumerate(sorted(before)):  # one base, unless runs began at different weights or were asked differently
            arms.append((f"before training{f' ({i + 1})' if len(before) > 1 else ''}", BASE, [before[text]]))
        for g in groups:
            after = [e for run in g.runs if (e := run.evals.get(name, {}).get("after")) and e["n"]]
            if after:
                arms.append((g.name, g.color, after))
        if not arms:
            continue
        title = name.replace("_", " ")
        drawn = [(arm, color, [report.interval(e) for e in each]) for arm, color, each in arms]
        svg = report.picture(lambda drawn=drawn, title=title: report.bars(drawn, title), pictures / f"accuracy-{file_name(name)}")
        assert svg is not None
        means = [f"{100 * np.mean([x.value for x in each]):.1f} %" for _, _, each in drawn]
        rows = [(arm, "\n".join(map(said, each)), mean) for (arm, _, each), mean in zip(arms, means, strict=True)]
        out.append(f"<div>{figure(svg, f'right answers on {title}')}{table(('arm', 'each run (95 % interval)', 'mean'), rows)}</div>")
    note = "Right answers; bars are means over seeds, points single runs with 95 % intervals over questions."
    return f'<p class="soft">{note}</p><div class="grid">{"".join(out)}</div>' if out else ""


def said(counts: dict[str, Any]) -> str:
    """Of an evaluation's counts the accuracy in words, with its interval over questions."""
    n, questions = counts["n"], counts.get("questions", counts["n"])
    asked = f"{n:,}" if n == questions else f"{n:,} answers to {questions:,} questions"
    return f"{counts['correct']:,} of {asked}: {report.percent(report.interval(counts))}"


def stages(groups: Sequence[Group], pictures: Path) -> str:
    figures = []
    for g in groups:
        if g.runs[0].config.get("reward.mode") == "direct":  # older logs count all its completions as format failures
            continue
        records = [run.records for run in g.runs]
        svg = report.picture(lambda r=records, g=g: report.stage_shares(r, g.name), pictures / f"stages-{file_name(g.name)}")
        if svg:
            figures.append(figure(svg, f"shares of the six stages over the steps of {g.name}"))
    items = ""
    for stage in reversed(STAGES):
        fill = swatch(f'<rect width="32" height="12" fill="{report.FILLS[stage][0]}"/>{HATCHES.get(stage, "")}')
        items += f"<li>{fill}{stage.replace('_', ' ')}</li>"
    note = """Share of sampled completions in each of the paper's six stages, told from their text alone; the rule direct asks for no
thought, so its runs have none. From top to bottom:"""
    return f'<p class="soft">{note}</p><ul class="legend">{items}</ul><div class="grid">{"".join(figures)}</div>' if figures else ""


def curves(groups: Sequence[Group], pictures: Path) -> str:
    figures = []
    for key, title, share in (*report.PANELS, *report.MORE):
        of = [(g.place, [run.records for run in g.runs]) for g in groups]
        svg = report.picture(lambda a=(of, key, title, share): report.panel(*a), pictures / f"curve-{file_name(key)}")
        if svg:
            figures.append(figure(svg, f"{title} over the steps"))
    note = "Means over the seeds of a group; bands reach from the lowest to the highest run. Training batches, sampled."
    return f'{legend(groups)}<p class="soft">{note}</p><div class="grid">{"".join(figures)}</div>' if figures else ""


def alarms(runs: Sequence[Run]) -> str:
    """What the monitors said; nothing where no run had them."""
    if not any(k.startswith("monitor/") for run in runs for r in run.records for k in r):
        return ""
    rows = []
    for run in runs:
        for name in sorted({k for r in run.records for k in r if k.startswith("alarm/")}):
            steps = [r["step"] for r in run.records if r.get(name)]
            rows.append((run.name, name.removeprefix("alarm/").replace("_", " "), len(steps), steps[0], steps[-1]))
    return table(("run", "alarm", "steps", "first", "last"), rows) if rows else "<p>The monitors raised no alarm.</p>"


def browser(groups: Sequence[Group]) -> str:
    """The samples as JSON that no markup can end, and the controls; the script does the rest."""
    rows = [s | {"run": run.name} for g in groups for run in g.runs for s in run.samples]
    if not rows:
        return ""
    chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, SAMPLES).astype(int))] if len(rows) > SAMPLES else rows
    data = json.dumps([{k: shortened(v) for k, v in s.items()} for s in chosen], ensure_ascii=True).replace("<", "\\u003c")
    note = f"; {len(chosen):,} of {len(rows):,} are on this page" if len(chosen) < len(rows) else ""
    choose = "".join(f'<label>{f}<select name="{f}"><option value="">all</option></select></label>' for f in ("run", "stage", "reward"))
    ranges = "".join(
        f'<label>{f} {word}<input type="number" name="{f}_{end}" min="0"></label>'
        for f in ("step", "length")
        for word, end in (("from", "low"), ("to", "high"))
    )
    return f"""<p class="soft">Real completions from training, as they were sampled{note}; length is in tokens.</p>
<noscript><p>The browser of samples needs JavaScript; nothing else here does.</p></noscript>
<form id="filter">{choose}{ranges}<label>text<input type="search" name="text"></label><button type="reset">clear</button></form>
<p id="count" aria-live="polite"></p><div id="list"></div><button type="button" id="more" hidden>show more</button>
<script type="application/json" id="sample-data">{data}</script>"""


def shortened(value: Any) -> Any:
    """A text of at most about `LENGTH` characters, which says so if it was longer; other values as they are."""
    if not isinstance(value, str) or len(value) <= LENGTH:
        return value
    return f"{value[:LENGTH]}… [the first {LENGTH:,} of {len(value):,} characters; samples.jsonl has all]"


def cards(groups: Sequence[Group]) -> str:
    """For each run what would be needed to make it again; first, by which settings the groups differ."""
    out, firsts = [], [g.runs[0].config for g in groups if g.runs[0].config]
    differing = [
        k for k in dict.fromkeys(k for c in firsts for k in c) if k.split(".")[0] not in ALIKE and len({str(c.get(k)) for c in firsts}) > 1
    ]
    if differing:
        named = [g for g in groups if g.runs[0].config]
        rows = [(k, *(str(c.get(k)) for c in firsts)) for k in differing]
        out.append(f"<h3>Settings in which the groups differ</h3>{table(('setting', *(g.name for g in named)), rows)}")
    for run in (run for g in groups for run in g.runs):
        facts = dict(facts_of(run))
        config = "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in run.config.items())
        settings = f"<details><summary>settings</summary><pre>{esc(config)}</pre></details>" if config else ""
        out.append(f"<h3>{esc(run.name)}</h3>{table(('', ''), facts.items())}{settings}")
    return "".join(out)


def facts_of(run: Run) -> Iterable[tuple[str, str]]:
    s, versions = run.summary, run.summary.get("versions", {})
    if run.records:
        last = run.records[-1]["step"]
        yield "steps", f"{last} of {s['steps']}" if s else f"{last} so far: the run has no summary.json yet"
        seconds = [r["seconds"] for r in run.records if r.get("seconds")]
        if seconds:
            yield "time", f"{clock(sum(seconds))} in steps, {np.median(seconds):.2f} s a step (median)"
    if versions:
        git = versions.get("git")
        yield "code", f"{git['revision']}{' with changes' if git['dirty'] else ''}" if git else f"medrlvr_jax {versions.get('medrlvr_jax')}"
        many = f"{versions['devices']} × {versions['device_kind']}, {versions['processes']} process{'es' * (versions['processes'] > 1)}"
        yield "hardware", f"{many}; {versions['platform']}"
        known = ("medrlvr_jax", "git", "platform", "device_kind", "devices", "processes")
        yield "versions", ", ".join(f"{k} {v}" for k, v in versions.items() if k not in known)
    for name, of in s.get("data", {}).items():
        yield f"data: {name}", f"{of['n']:,} rows, sha256 {of['sha256']}"

"""The reference pages, made from the code when the site is built: settings, commands, functions, modules.

MkDocs calls `on_files` and `on_page_markdown` (hooks in mkdocs.yml). The pages are made from the settings'
sections (config/describe.py), from the commands' help, and from docstrings. A fenced block marked `math`
holds LaTeX and becomes MathML, which browsers draw without scripts or fonts.
"""

import ast
import dataclasses
import inspect
import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

import medrlvr_jax
from medrlvr_jax.cli import app
from medrlvr_jax.config.describe import field_comments, sections
from medrlvr_jax.runs.metrics import METRICS

PREFIX = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)*\.(?=[A-Z]|ndarray)")
FENCE = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages = {"settings": settings(), "commands": commands(), "metrics": metrics()}
    pages |= {"api": api(), "modules": modules()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return FENCE.sub(lambda match: equation(match[1]), markdown)


def equation(latex: str) -> str:
    from latex2mathml.converter import convert

    return f'<div class="equation">{convert(" ".join(latex.split()), display="block")}</div>'


def metrics() -> str:
    """One table of all metrics (runs/metrics.py)."""
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning.replace('|', '&#124;')} |" for m in METRICS]
    text = "A step's line of `metrics.jsonl` has these metrics. Trackers such as TensorBoard show them."
    text += " Shares are between 0 and 1. `*` stands for the name of a set, a stage or a reward component."
    return "\n".join(["# Metrics", "", text, "", "| metric | unit | meaning |", "|---|---|---|", *rows, ""])


def settings() -> str:
    """One table for each section of the settings, the run's own fields first."""
    out = [
        "# Settings",
        "A config is a YAML file of these settings. `a.b=value` after it on the command line replaces one of"
        " them; the value is also YAML. Unknown settings, values of the wrong type and combinations that"
        " cannot work are refused before any device work. The message has the field, the value and the"
        " remedy. `null` means that something is absent. The files in `configs/` are complete examples.",
        "One file serves several commands. Each command requires and checks only the settings that it reads."
        " Its `--help` lists them: `medrlvr eval` needs no `learn`, and `medrlvr sft` checks no `advantage`."
        " A command prints a message about settings on the command line that it does not read.",
    ]
    for section in sections():
        out.append(f"## {section.title} {{ #{anchor(section.name)} }}\n\n{section.text}")
        rows = ["| setting | type | default | what it does |", "|---|---|---|---|"]
        for setting in section.settings:
            note = setting.text
            if setting.inner is not None:
                note = f"{note.rstrip('.')}; see [its settings](#{anchor(setting.inner)})"
            cells = map(cell, (f"`{setting.name}`", setting.kind, setting.default, note))
            rows.append(f"| {' | '.join(cells)} |")
        out.append("\n".join(rows))
    return "\n\n".join(out) + "\n"


def anchor(path: str) -> str:
    return path.replace(".", "-") or "run"


def cell(text: str) -> str:
    """Text inside a table: one line, bars escaped, and outside code no tags."""
    parts = text.replace("\n", " ").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return re.sub(r"(?<!\\)\|", r"\\|", "`".join(parts))


def commands() -> str:
    """The help of every command, 88 columns wide."""
    same = "`python -m medrlvr_jax COMMAND …` is the same as `medrlvr COMMAND …`."
    listed = "The `--help` of a command also lists its settings, as on the page [Settings](settings.md)."
    out = ["# Commands", f"{same} {listed}", help_of()]
    out += [f"## medrlvr {name}\n\n{help_of(name)}" for name in app if not name.startswith("-")]
    return "\n\n".join(out) + "\n"


def help_of(*command: str) -> str:
    text = io.StringIO()
    app.help_print(command, console=Console(file=text, width=88))
    return f"```text\n{text.getvalue()}```"


def api() -> str:
    """Signature and docstring of everything that `import medrlvr_jax` offers."""
    lead = "`import medrlvr_jax as mr` offers these names. The command line calls the same functions."
    out = ["# Python API", lead]
    known = {section.cls: section.name for section in sections()}
    things = {name: getattr(medrlvr_jax, name) for name in medrlvr_jax.__all__}
    for name, thing in sorted(things.items(), key=lambda item: (inspect.isclass(item[1]), item[0])):
        text = inspect.cleandoc(thing.__doc__ or "")
        out.append(f"## {name}")
        if thing in known:
            link = f"settings.md#{anchor(known[thing])}"
            out.append(f"{text.splitlines()[0]} Its fields are these [settings]({link}).")
        elif inspect.ismodule(thing):
            out.append(f"{text.splitlines()[0]} All of it: [Modules](modules.md).")
        elif inspect.isclass(thing) and issubclass(thing, Exception):
            out.append(text)
        else:
            out.append(f"```python\n{signature(name, thing)}\n```\n\n{text}")
        if dataclasses.is_dataclass(thing) and thing not in known:
            notes = field_comments(thing)
            fields = [f"| `{name}` | {cell(note)} |" for name, note in notes.items() if note]
            out.append("\n".join(["| field | meaning |", "|---|---|", *fields] if fields else []))
    return "\n\n".join(out) + "\n"


def signature(name: str, thing: Any) -> str:
    """A call with its parameters, one a line if they are many; types without their modules."""
    sig = inspect.signature(thing)
    if inspect.isclass(thing):
        sig = sig.replace(return_annotation=sig.empty)
    line = PREFIX.sub("", f"{name}{sig}")
    if len(line) <= 80:
        return line
    parts, star = [], False
    for parameter in sig.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts, star = [*parts, "*"], True
        parts.append(re.sub(r"(= \w+)\(.+\)$", r"\1(…)", PREFIX.sub("", str(parameter))))
    arrow = line.rpartition(")")[2]
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){arrow}"])


def modules() -> str:
    """The docstring of every module of the package, by folder."""
    root = Path(medrlvr_jax.__file__).parent
    out = ["# Modules", "What each file holds. The README has the order in which to read them."]
    for start in [root / "__init__.py", *sorted(root.rglob("*/__init__.py"))]:
        out.append(f"## {'/'.join(start.parent.relative_to(root.parent).parts)}\n\n{docstring(start)}")
        for file in sorted(set(start.parent.glob("*.py")) - {start}):
            out.append(f"### {file.relative_to(root)}\n\n```text\n{docstring(file)}\n```")
    return "\n\n".join(out) + "\n"


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""

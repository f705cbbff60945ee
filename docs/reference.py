"""The reference pages, made from the code when the site is built: every setting, command, function and module. And equations.

MkDocs calls `on_files` and `on_page_markdown` (hooks in mkdocs.yml). The pages are made from the dataclasses of the
settings, whose explanation is the comment beside or above each field; from argparse's own help; and from the modules'
docstrings. A fenced block marked `math` holds LaTeX and becomes MathML, which browsers draw without scripts or fonts.
"""

import argparse
import ast
import dataclasses
import inspect
import io
import os
import re
import textwrap
import tokenize
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import medrlvr_jax
from medrlvr_jax.cli import parser
from medrlvr_jax.config.schema import Config

TITLES = {
    "": "The run",
    "data": "data, and each set of eval.sets",
    "learn.policy": "learn.policy and learn.critic",
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
PREFIX = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)*\.(?=[A-Z]|ndarray)")
FENCE = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages = {"settings": settings(), "commands": commands(), "api": api(), "modules": modules()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return FENCE.sub(lambda match: equation(match[1]), markdown)


def equation(latex: str) -> str:
    from latex2mathml.converter import convert

    return f'<div class="equation">{convert(" ".join(latex.split()), display="block")}</div>'


def settings() -> str:
    """One table for each section of the settings, the run's own fields first."""
    out = [
        "# Settings",
        "A config is a YAML file of these settings. `a.b=value` after it on the command line replaces one of"
        " them; the value is YAML too. Unknown settings, settings of the wrong type and combinations that cannot"
        " work are refused before any device work, with the field, the value and the remedy. `null` means that the"
        " thing is absent. The files in `configs/` are complete examples.",
    ]
    for path, section in sections(Config):
        title = TITLES.get(path, path)
        out.append(f"## {title} {{ #{anchor(path)} }}\n\n{inspect.cleandoc(section.__doc__ or '')}")
        rows = ["| setting | type | default | what it does |", "|---|---|---|---|"]
        notes, kinds = explanations(section), get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            name = f"{path}.{field.name}" if path else field.name
            kind, note = kinds[field.name], notes[field.name]
            if inner := inner_section(kind):
                note = note or inspect.cleandoc(inner.__doc__ or "").split("\n")[0]
                note = f"{note.rstrip('.')}; see [its settings](#{anchor(path_of(name, kind))})"
            rows.append(f"| `{name}` | {cell(type_text(kind))} | {cell(default_text(field))} | {cell(note)} |")
        out.append("\n".join(rows))
    return "\n\n".join(out) + "\n"


def sections(section: type, path: str = "") -> list[tuple[str, type]]:
    """The section and those inside it, each once, with the path that leads to it."""
    out = [(path, section)]
    for name, kind in get_type_hints(section, include_extras=True).items():
        if inner := inner_section(kind):
            found = sections(inner, path_of(f"{path}.{name}" if path else name, kind))
            out += [(p, s) for p, s in found if s not in [s for _, s in out]]
    return out


def path_of(name: str, kind: Any) -> str:
    """The path under which a section is shown: data for eval.sets.NAME too, learn.policy for learn.critic too."""
    name = f"{name}.NAME" if get_origin(kind) is dict else name
    return {"eval.sets.NAME": "data", "learn.critic": "learn.policy"}.get(name, name)


def anchor(path: str) -> str:
    return path.replace(".", "-") or "run"


def inner_section(kind: Any) -> type | None:
    """The settings' section that a field holds, alone, optional, or by name."""
    candidates = [kind, *get_args(kind)]
    return next((k for k in candidates if dataclasses.is_dataclass(k) and isinstance(k, type)), None)


def type_text(kind: Any) -> str:
    """A type in words: whole numbers with their bounds, the values that a Literal allows, lists by their items."""
    if get_origin(kind) is Annotated:
        base, *meta = get_args(kind)
        bounds = [f"{BOUNDS[key]} {value}" for part in meta for key, value in constraints(part) if key in BOUNDS]
        return " ".join([type_text(base), *bounds])
    if get_origin(kind) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is ...:
            return f"list of {type_text(items[0])}"
        return f"[{', '.join(type_text(item) for item in items)}]"
    if get_origin(kind) is dict:
        return "mapping"
    if get_args(kind):  # X | None
        return " \\| ".join("`null`" if k is type(None) else type_text(k) for k in get_args(kind))
    if dataclasses.is_dataclass(kind):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "`true` \\| `false`", Any: "any"}[kind]


def constraints(part: Any) -> list[tuple[str, Any]]:
    """The bounds in one piece of an Annotated's metadata, which is pydantic's Field or annotated_types' own."""
    pieces = getattr(part, "metadata", [part])
    return [(key, getattr(piece, key)) for piece in pieces for key in BOUNDS if hasattr(piece, key)]


def default_text(field: Any) -> str:
    default = field.default
    if hasattr(default, "default_factory") and default.default_factory is not None:
        return f"`{default.default_factory()}`"
    if default is dataclasses.MISSING:
        return "needed" if field.default_factory is dataclasses.MISSING else f"`{field.default_factory()}`"
    if dataclasses.is_dataclass(default):
        return ""
    words = {None: "null", True: "true", False: "false"} if default is None or isinstance(default, bool) else {}
    text = words.get(default, default if not isinstance(default, tuple) else f"[{', '.join(map(str, default))}]")
    return '`""`' if text == "" else f"`{text}`"


def explanations(section: type) -> dict[str, str]:
    """Of each field of a section, the comment at the end of its line, or the comment lines right above it."""
    source = textwrap.dedent(inspect.getsource(section))
    comments: dict[int, tuple[str, bool]] = {}  # line: text, and whether it stands alone
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# "), token.line.lstrip().startswith("#")
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    out = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, line = [], node.lineno - 1
            while line in comments and comments[line][1]:
                above.insert(0, comments[line][0])
                line -= 1
            beside = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
            out[node.target.id] = " ".join([*above, *beside])
    return out


def cell(text: str) -> str:
    """Text inside a table: one line, bars escaped, and outside code no tags."""
    parts = text.replace("\n", " ").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return re.sub(r"(?<!\\)\|", r"\\|", "`".join(parts))


def commands() -> str:
    """argparse's own help of every command, 88 columns wide."""
    os.environ["COLUMNS"] = "88"
    top = parser()
    (sub,) = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    same = "`medrlvr COMMAND …` and `python -m medrlvr_jax COMMAND …` are the same."
    out = ["# Commands", same, f"```text\n{top.format_help()}```"]
    for name, command in sub.choices.items():
        out.append(f"## medrlvr {name}\n\n```text\n{command.format_help()}```")
    return "\n\n".join(out) + "\n"


def api() -> str:
    """Signature and docstring of everything that `import medrlvr_jax` offers."""
    out = ["# Python API", "`import medrlvr_jax as mr` offers these names. The command line calls the same functions."]
    known = {section: path for path, section in sections(Config)}
    things = {name: getattr(medrlvr_jax, name) for name in medrlvr_jax.__all__}
    for name, thing in sorted(things.items(), key=lambda item: (inspect.isclass(item[1]), item[0])):
        text = inspect.cleandoc(thing.__doc__ or "")
        out.append(f"## {name}")
        if thing in known:
            out.append(f"{text.splitlines()[0]} Its fields are these [settings](settings.md#{anchor(known[thing])}).")
        elif inspect.ismodule(thing):
            out.append(f"{text.splitlines()[0]} All of it: [Modules](modules.md).")
        elif inspect.isclass(thing) and issubclass(thing, Exception):
            out.append(text)
        else:
            out.append(f"```python\n{signature(name, thing)}\n```\n\n{text}")
        if dataclasses.is_dataclass(thing) and thing not in known:
            notes = explanations(thing)
            fields = [f"| `{name}` | {cell(note)} |" for name, note in notes.items() if note]
            out.append("\n".join(["| field | meaning |", "|---|---|", *fields] if fields else []))
    return "\n\n".join(out) + "\n"


def signature(name: str, thing: Any) -> str:
    """A call with its parameters, one a line where they are many; types without the modules that they come from."""
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
    out = ["# Modules", "What each file holds, in its own words. The README has the order in which to read them."]
    for start in [root / "__init__.py", *sorted(root.rglob("*/__init__.py"))]:
        out.append(f"## {'/'.join(start.parent.relative_to(root.parent).parts)}\n\n{docstring(start)}")
        for file in sorted(set(start.parent.glob("*.py")) - {start}):
            out.append(f"### {file.relative_to(root)}\n\n```text\n{docstring(file)}\n```")
    return "\n\n".join(out) + "\n"


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""

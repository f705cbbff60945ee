"""Every setting with its type, default and explanation, for `--help` and for the documentation's reference.

The explanation of a setting is the comment beside its field in schema.py, or the comment lines above it.
"""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from medrlvr_jax.config.check import reads
from medrlvr_jax.config.load import section_class, section_kinds
from medrlvr_jax.config.schema import Config

BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
KINDS = {int: "whole number", float: "number", str: "text", bool: "`true` | `false`", type(None): "`null`"}
# Sections of one class are described once, under the name on the right.
SAME = {"eval.sets.NAME": "data", "learn.critic": "learn.policy"}
TITLES = {
    "": "The run",
    "data": "data, and each set of eval.sets",
    "learn.policy": "learn.policy and learn.critic",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a section, in words. Literal values stand in backquotes."""

    name: str  # the dotted name
    kind: str
    default: str  # empty for a section that has a default
    text: str
    inner: str | None  # for a section: the name under which it is described


@dataclasses.dataclass(frozen=True)
class Section:
    """A dataclass of schema.py, with its docstring."""

    name: str  # the dotted name; empty for the run's own fields
    cls: type
    text: str
    settings: list[Setting]

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)


def sections(cls: type = Config, name: str = "") -> list[Section]:
    """The section `cls` and those inside it, each class once."""
    notes, kinds = explanations(cls), get_type_hints(cls, include_extras=True)
    settings, inner = [], []
    for field in dataclasses.fields(cls):
        if field.name == "kind" and name.endswith(default_text(field).strip("`")):
            continue  # the section's name says it
        path, kind = f"{name}.{field.name}" if name else field.name, kinds[field.name]
        holds, text, at = section_class(kind), notes[field.name], None
        if holds:
            at = f"{path}.NAME" if get_origin(kind) is dict else path
            at = SAME.get(at, at)
            text = text or inspect.cleandoc(holds.__doc__ or "").split("\n")[0]
            inner += sections(holds, at)
        for tag, item in section_kinds(kinds[field.name]).items():
            inner += sections(item, f"{path}.{tag}")
        settings.append(Setting(path, kind_text(kind), default_text(field), text, at))
    once: dict[type, Section] = {}
    for section in [Section(name, cls, inspect.cleandoc(cls.__doc__ or ""), settings), *inner]:
        once.setdefault(section.cls, section)
    return list(once.values())


def kind_text(kind: Any) -> str:
    """A type in words: numbers with their bounds, the values of a Literal, lists by their items."""
    origin, args = get_origin(kind), get_args(kind)
    if kinds := section_kinds(kind):
        return f"list of sections, each with a kind: {' | '.join(f'`{tag}`' for tag in kinds)}"
    if origin is Annotated:
        return " ".join([kind_text(args[0]), *_bounds(args[1:])])
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in args)
    if origin is tuple:
        items = [kind_text(item) for item in args if item is not ...]
        return f"list of {items[0]}" if args[-1] is ... else f"[{', '.join(items)}]"
    if origin is dict:
        return "mapping"
    if args:  # X | None
        return " | ".join(map(kind_text, args))
    return "section" if dataclasses.is_dataclass(kind) else KINDS[kind]


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for part in metadata:  # pydantic's Field, or a constraint of annotated_types
        for constraint in getattr(part, "metadata", [part]):
            for key, sign in BOUNDS.items():
                if hasattr(constraint, key):
                    yield f"{sign} {getattr(constraint, key)}"


def default_text(field: Any) -> str:
    """A field's default as YAML has it; `needed` where there is none."""
    default = field.default
    # pydantic keeps its factory inside the default
    factory = getattr(default, "default_factory", None) or field.default_factory
    if factory is not dataclasses.MISSING:
        return f"`{factory()}`"
    if default is dataclasses.MISSING:
        return "needed"
    if dataclasses.is_dataclass(default):
        return ""
    text = json.dumps(default)
    return f"`{text if default == '' else text.replace(chr(34), '')}`"


def explanations(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass and of its bases."""
    return {name: note for base in reversed(cls.__mro__[:-1]) for name, note in _comments(base).items()}


def _comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    comments: dict[int, tuple[str, bool]] = {}  # line: the comment, and whether it has the line to itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# "), token.line.lstrip().startswith("#")
    out = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parts = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
            line = node.lineno - 1
            while line in comments and comments[line][1]:
                parts.insert(0, comments[line][0])
                line -= 1
            out[node.target.id] = " ".join(parts)
    return out


def show(console: Console, command: str) -> None:
    """Print every setting that a command reads, one panel a section, as wide as the terminal."""
    console.print("Settings stand in the config or, as a.b=value, on the command line.", highlight=False)
    for section in sections():
        names = Column(style="cyan", no_wrap=True)
        table = Table.grid(names, Column(), padding=(0, 2, 0, 0))
        for setting in section.settings:
            if setting.kind != "section" and reads(command, setting.name):  # such a section has its own panel
                default = setting.default.replace("needed", "") and f", default {setting.default}"
                note = f"[{setting.kind}{default or ', needed'}]".replace("`", "")
                table.add_row(setting.name, Text.assemble(setting.text.replace("`", ""), " ", (note, "dim")))
        if table.row_count:
            console.print(Panel(table, title=Text(section.title), title_align="left"))

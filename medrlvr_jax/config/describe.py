"""Describe every setting by type, default and comment, for `--help` and the reference page.

The comment of a setting stands beside its field in the code or on the lines above it.
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
KINDS = {int: "integer", float: "number", str: "string", bool: "`true` | `false`", type(None): "`null`"}
# Sections with the same class are described once, under the name on the right.
SAME = {"eval.sets.NAME": "data", "learn.critic": "learn.policy"}
TITLES = {
    "": "The run",
    "data": "data, and each set of eval.sets",
    "learn.policy": "learn.policy and learn.critic",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The description of one field of a section. Literal values are in backquotes."""

    name: str  # the dotted name
    kind: str  # the type
    default: str  # `required` if there is none; empty for a section that has a default
    text: str  # the comment
    inner: str | None  # for a section: the name under which it is described


@dataclasses.dataclass(frozen=True)
class Section:
    """The description of one section of the settings."""

    name: str  # the dotted name; empty for the fields of `Config` itself
    cls: type
    text: str  # the docstring
    settings: list[Setting]

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)


def sections(cls: type = Config, name: str = "") -> list[Section]:
    """Return the descriptions of the section `cls` and of all sections inside it, each class once."""
    comments, kinds = field_comments(cls), get_type_hints(cls, include_extras=True)
    settings, inner = [], []
    for field in dataclasses.fields(cls):
        if field.name == "kind" and name.endswith(default_text(field).strip("`")):
            continue  # the kind of a reward component is the end of its section's name
        path, kind = f"{name}.{field.name}" if name else field.name, kinds[field.name]
        inner_class, text, inner_name = section_class(kind), comments[field.name], None
        if inner_class:
            inner_name = f"{path}.NAME" if get_origin(kind) is dict else path
            inner_name = SAME.get(inner_name, inner_name)
            text = text or inspect.cleandoc(inner_class.__doc__ or "").split("\n")[0]
            inner += sections(inner_class, inner_name)
        for tag, item in section_kinds(kind).items():
            inner += sections(item, f"{path}.{tag}")
        settings.append(Setting(path, kind_text(kind), default_text(field), text, inner_name))
    by_class: dict[type, Section] = {}
    for section in [Section(name, cls, inspect.cleandoc(cls.__doc__ or ""), settings), *inner]:
        by_class.setdefault(section.cls, section)
    return list(by_class.values())


def kind_text(kind: Any) -> str:
    """Describe a type: numbers with their bounds, the values of a Literal, lists by their items."""
    origin, args = get_origin(kind), get_args(kind)
    if kinds := section_kinds(kind):
        return f"list of sections, each with a kind: {' | '.join(f'`{tag}`' for tag in kinds)}"
    if origin is Annotated:
        return f"{kind_text(args[0])} {', '.join(_bounds(args[1:]))}".strip()
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
    """Return a field's default as YAML; `required` if there is none, and "" for a section."""
    default = field.default
    # pydantic stores the factory inside the default
    factory = getattr(default, "default_factory", None) or field.default_factory
    if factory is not dataclasses.MISSING:
        return f"`{factory()}`"
    if default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(default):
        return ""
    text = json.dumps(default)
    return f"`{text if default == '' else text.replace(chr(34), '')}`"


def field_comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass and of its base classes, by the field's name."""
    return {name: text for base in reversed(cls.__mro__[:-1]) for name, text in _own_comments(base).items()}


def _own_comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    comments: dict[int, tuple[str, bool]] = {}  # by line: the comment, and whether the line is only a comment
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
    """Print every setting that a command reads, one panel per section, as wide as the terminal."""
    console.print("Settings of the config, or of the command line as a.b=value:", highlight=False)
    for section in sections():
        names = Column(style="cyan", no_wrap=True)
        table = Table.grid(names, Column(), padding=(0, 2, 0, 0))
        for setting in section.settings:
            if setting.kind != "section" and reads(command, setting.name):  # a section has its own panel
                default = f"{'' if setting.default == 'required' else 'default '}{setting.default}"
                note = f"[{setting.kind}, {default}]".replace("`", "")
                table.add_row(setting.name, Text.assemble(setting.text.replace("`", ""), " ", (note, "dim")))
        if table.row_count:
            console.print(Panel(table, title=Text(section.title), title_align="left"))

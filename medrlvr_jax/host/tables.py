"""Tables as text: for a terminal, and as Markdown for a file."""

import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

Rows = Sequence[Sequence[str]]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and line feed


def plain(head: Sequence[str], rows: Rows, title: str | None = None) -> str:
    """For a terminal: the first column and columns of words to the left, columns of numbers to the right."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,  # this and the padding: narrow, for 80 columns
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
    )
    for i, name in enumerate(head):
        numbers = any(re.match(r"[-+−]?\d", row[i]) for row in rows)
        table.add_column(name, justify="right" if i and numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(visible, row))
    text = io.StringIO()
    # wider than any table; a text is shown as it is
    console = rich.console.Console(file=text, width=10_000, markup=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().split("\n")).strip("\n")


def visible(text: str) -> str:
    """Control characters by their codes, such as \\x1b: in somebody's data they could command a terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def say(text: str) -> None:
    """Print texts, somebody else's among them; on a terminal, lines break at words."""
    how: Any = {"markup": False, "emoji": False, "highlight": False}
    rich.console.Console(soft_wrap=not sys.stdout.isatty(), **how).print(visible(text))


def markdown(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Tables as text, for a terminal or as Markdown; and texts that are safe to print."""

import io
import re
import sys
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

Rows = Sequence[Sequence[str]]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def plain(head: Sequence[str], rows: Rows) -> str:
    """Return a table for a terminal. Columns of numbers are aligned right, the first and all others left."""
    # Without edges and padding, tables fit 80 columns.
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        numbers = any(re.match(r"[-+−]?\d", row[i]) for row in rows)
        table.add_column(name, justify="right" if i and numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(visible, row))
    text = io.StringIO()
    # wider than any table; texts are shown without markup
    console = rich.console.Console(file=text, width=10_000, markup=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().split("\n")).strip("\n")


def visible(text: str) -> str:
    """Replace control characters by their codes, such as \\x1b: in data, they could command a terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def say(text: str) -> None:
    """Print a text that may contain data. On a terminal, lines break at words."""
    console = rich.console.Console(markup=False, emoji=False, highlight=False)
    console.print(visible(text), soft_wrap=not sys.stdout.isatty())


def markdown(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""A file's own fields under the names that a format reads, and the choice of records by their fields.

`SetConfig.where` chooses, `patterns` takes texts apart, `fields` renames, `constants` adds what is the same
in every record:

    data:
      path: cases.json
      where: {category: [cardiology, nephrology]}
      patterns: {case.final: "Diagnosis: (?P<diagnosis>.*)"}
      fields: {question: case.summary, answer: diagnosis, options: [op1, op2], rationale: null}
      constants: {kind: text}
"""

import re
from collections.abc import Iterator, Mapping
from reprlib import repr as short
from typing import Any

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.formats import FORMATS
from medrlvr_jax.data.question import DataError
from medrlvr_jax.data.record import Row, field_names
from medrlvr_jax.host.errors import nearest

NEEDED = ("question", "answer", "options", "response")  # a record without these is refused, not read


def check(spec: SetConfig) -> None:
    """Refuse names that no format reads, and anything but a name, names or null to read them from."""
    known = {field for form in FORMATS.values() for field in form.fields}
    for setting, names in (("fields", spec.fields), ("constants", spec.constants)):
        for name in names:
            if name not in known:
                remedy = nearest(name, known) or "the reference of data/formats.py has them"
                raise DataError(f"{setting}.{name}: no format reads a field of this name; {remedy}")
    for name, pattern in spec.patterns.items():
        try:
            groups = re.compile(pattern).groupindex
        except re.error as e:
            raise DataError(
                f"patterns.{name}: {pattern!r} is no regular expression: {e}; correct it"
            ) from None
        if not groups:
            raise DataError(f"patterns.{name}: {pattern!r} names no part; write one as (?P<question>.*)")
    if both := spec.fields.keys() & spec.constants.keys():
        raise DataError(f"constants.{min(both)}: given in fields, too; take one of the two out")


class Choice:
    """The records of a set that `where` chooses, with their fields renamed; counts those it leaves out."""

    def __init__(self, spec: SetConfig):
        check(spec)
        self.spec, self.left_out = spec, 0
        named = (*spec.where, *spec.patterns)
        self.read = {name.split(".")[0] for name in named}  # the file's fields that the settings name
        self.values: dict[str, dict[str, None]] = {name: {} for name in spec.where}  # up to 5 that occur

    def records(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Number and record as in `rows`; a record that lacks a needed field is a `DataError`."""
        for number, row in rows:
            if not isinstance(row, dict):
                yield number, row
            elif self._chosen(row):
                yield number, self._rename(row)
            else:
                self.left_out += 1

    def nothing(self) -> str:
        """What to tell a user who chose no record at all."""
        values = [f"{name} is {', '.join(seen) or 'absent'}" for name, seen in self.values.items()]
        return f"where {short(self.spec.where)} leaves no record; in them, {'; '.join(values)}"

    def _chosen(self, row: Row) -> bool:
        for name, wanted in self.spec.where.items():
            value, seen = get(row, name), self.values[name]
            if value is not None and len(seen) < 5:
                seen[short(value)] = None
            if not any(equal(value, choice) for choice in (wanted if isinstance(wanted, list) else [wanted])):
                return False
        return True

    def _rename(self, row: Row) -> Row | DataError:
        for name, pattern in self.spec.patterns.items():
            if (value := get(row, name)) is None:
                continue
            match = re.fullmatch(pattern, str(value), re.DOTALL)
            if not match:
                return DataError(f"field {name}: {short(value)} does not match patterns.{name}, {pattern!r}")
            row = row | {part: text for part, text in match.groupdict().items() if text is not None}
        renamed = {}
        for name, source in self.spec.fields.items():
            sources = [source] if isinstance(source, str) else source or []
            values = [get(row, each) for each in sources]
            self.read.update(each.split(".")[0] for each in sources)
            while values and values[-1] in (None, ""):  # as an absent fifth option is in CSV
                values.pop()
            if not values and sources and name in NEEDED:
                missing = f"field {sources[0]}, read as {name}: needed, and not there"
                return DataError(f"{missing}; the record has {field_names(row)}")
            renamed[name] = values if isinstance(source, list) else values[0] if values else None
        return row | renamed | self.spec.constants


def get(row: Mapping[str, Any], name: str) -> Any:
    """The field of this name, or by `a.b` the field b of the object a; None if it is not there."""
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return get(inner, rest) if rest and isinstance(inner, Mapping) else None


def equal(value: Any, wanted: Any) -> bool:
    """Whether a field has the value `wanted`, or is a list that holds it. CSV's "3" is 3."""
    if isinstance(value, list):
        return any(equal(each, wanted) for each in value)
    return value == wanted or (value is not None and str(value) == str(wanted))

"""Select a set's records, and read their fields under other names, by four settings of `SetConfig`.

`where` selects records, `patterns` splits texts into new fields, `fields` renames, and `constants` adds
fields that are the same in every record:

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

REQUIRED = ("question", "answer", "options", "response")  # a record without one that `fields` names is bad


def check(spec: SetConfig) -> None:
    """Raise `DataError` for names that no format reads, and for patterns that cannot work."""
    known = {field for form in FORMATS.values() for field in form.fields}
    for setting, names in (("fields", spec.fields), ("constants", spec.constants)):
        if name := next((name for name in names if name not in known), None):
            remedy = nearest(name, known) or "the page Your own data lists the fields of each format"
            raise DataError(f"{setting}.{name}: no format reads a field of this name; {remedy}")
    for name, pattern in spec.patterns.items():
        try:
            groups = re.compile(pattern).groupindex
        except re.error as e:
            problem = f"{pattern!r} is not a regular expression: {e}; correct it"
            raise DataError(f"patterns.{name}: {problem}") from None
        if not groups:
            raise DataError(f"patterns.{name}: {pattern!r} names no part; write one as (?P<question>.*)")
    if both := spec.fields.keys() & spec.constants.keys():
        raise DataError(f"constants.{min(both)}: fields names it, too; remove one of the two")


class FieldMapping:
    """Select and rename the records of one set; count those that `where` leaves out."""

    def __init__(self, spec: SetConfig):
        check(spec)
        self.spec, self.left_out = spec, 0
        # For each field of the format, the file's fields to read it from.
        self._sources = {
            name: [source] if isinstance(source, str) else source or []
            for name, source in spec.fields.items()
        }
        read = [*spec.where, *spec.patterns, *(x for sources in self._sources.values() for x in sources)]
        self.read = {name.split(".")[0] for name in read}  # the file's fields that the settings name
        self._seen: dict[str, dict[str, None]] = {name: {} for name in spec.where}  # up to 5 values of each

    def apply(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Yield number and record as in `rows`. A record without a required field becomes a `DataError`."""
        for number, row in rows:
            if not isinstance(row, dict):
                yield number, row
            elif self._is_selected(row):
                yield number, self._rename(row)
            else:
                self.left_out += 1

    def explain_empty(self) -> str:
        """Say which values `where` met, for a user whose setting selects no record."""
        values = [f"{name} is {', '.join(seen) or 'absent'}" for name, seen in self._seen.items()]
        return f"where {short(self.spec.where)} selects no record; in them, {'; '.join(values)}"

    def _is_selected(self, row: Row) -> bool:
        for name, wanted in self.spec.where.items():
            value, seen = field_value(row, name), self._seen[name]
            if value is not None and len(seen) < 5:
                seen[short(value)] = None
            if not any(has_value(value, each) for each in (wanted if isinstance(wanted, list) else [wanted])):
                return False
        return True

    def _rename(self, row: Row) -> Row | DataError:
        for name, pattern in self.spec.patterns.items():
            if (value := field_value(row, name)) is None:
                continue
            match = re.fullmatch(pattern, str(value), re.DOTALL)
            if not match:
                return DataError(f"field {name}: {short(value)} does not match patterns.{name}, {pattern!r}")
            row = row | {part: text for part, text in match.groupdict().items() if text is not None}
        renamed = {}
        for name, sources in self._sources.items():
            values = [field_value(row, source) for source in sources]
            while values and values[-1] in (None, ""):  # as an absent fifth option is in CSV
                values.pop()
            if not values and sources and name in REQUIRED:
                problem = f"field {sources[0]}, read as {name}: it is required and missing"
                return DataError(f"{problem}; the record has {field_names(row)}")
            is_list = isinstance(self.spec.fields[name], list)
            renamed[name] = values if is_list else values[0] if values else None
        return row | renamed | self.spec.constants


def field_value(row: Mapping[str, Any], name: str) -> Any:
    """Return the field `name`, or for `a.b` field b of the object a; None if it is missing."""
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return field_value(inner, rest) if rest and isinstance(inner, Mapping) else None


def has_value(value: Any, wanted: Any) -> bool:
    """Whether a field's value is `wanted`, or a list that contains it. CSV's "3" equals 3."""
    if isinstance(value, list):
        return any(has_value(each, wanted) for each in value)
    return value == wanted or (value is not None and str(value) == str(wanted))

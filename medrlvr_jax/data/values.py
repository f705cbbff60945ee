"""Values in open questions and in answers: numbers with units, dates, durations, labels and texts.

`read_reference` reads the right answer of a record, and `matches` compares a response's answer with it. The
grammar is strict: nothing is evaluated, so `140/3.5` is not a number, and ambiguous texts are refused, as
`1,234` (thousands or a decimal comma) and `03/04/2024` (day or month first). Texts longer than `MAX_LENGTH`
are refused unread, and every pattern takes time linear in the length of a text.
"""

import contextlib
import datetime
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Kind = Literal["number", "integer", "date", "duration", "label", "labels", "text"]
DateOrder = Literal["month_first", "day_first"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_LENGTH = dict.fromkeys(KINDS, 200) | {"text": 2000}  # characters of an answer


@dataclass(frozen=True)
class Reference:
    """The right answer to an open question. Which fields count depends on `kind`."""

    kind: Kind
    text: str  # the right answer as in the data
    value: Fraction | datetime.date | int | tuple[str, ...] | None = None  # duration: days; text: None
    lower: Fraction | None = None  # number: the limits are included; None: there is none
    upper: Fraction | None = None
    unit: str | None = None  # number, integer: the unit of `value`
    allowed: tuple[str, ...] = ()  # label, labels: all labels of the question
    aliases: tuple[str, ...] = ()  # text: other right answers
    order: DateOrder | None = None  # date: how dates with slashes are read; None: they are ambiguous


@dataclass(frozen=True)
class Number:
    """A number and the unit that follows it, if any."""

    value: Fraction  # exact, so that a number equal to a limit is within it
    unit: str | None = None


class Unreadable(ValueError):
    """A text that is not a value of the wanted kind. The message is a key of `REASONS`, or a sentence."""


REASONS = {  # why a text is not a value
    "too_long": f"longer than {MAX_LENGTH['number']:,} characters, or {MAX_LENGTH['text']:,} for a text",
    "not_a_number": "not one number, with or without a unit",
    "ambiguous_number": "a single comma before three digits: thousands or a decimal comma",
    "unknown_unit": "the unit is not in the table",
    "unit_not_asked": "a unit where the reference has none",
    "other_dimension": "a unit of another quantity than the reference's",
    "not_an_integer": "a number with a fraction where a whole one is asked for",
    "not_a_date": "not a date in one of the forms 2024-03-04, 4 March 2024, March 4, 2024",
    "ambiguous_date": "a date with slashes: day or month first",
    "not_a_duration": "not weeks, days or both, such as 14 weeks 2 days",
    "unknown_label": "not one of the labels of the question",
    "repeated_label": "a label twice",
    "several_labels": "more than one label where one is asked for",
}

# ---- numbers ----

_NUMBER = re.compile(
    r"(?P<sign>[+\-−])?\s?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+|\d+)?(?P<fraction>\.\d+)?"
    r"(?:[eE](?P<exponent>[+\-−]?\d{1,2})|\s?[×x]\s?10\^(?P<power>[+\-−]?\d{1,2}))?"
    r"\s?(?P<unit>(?:/ ?)?[^\s\d.,+\-−/][^\s,]*(?: [^\s\d,]+){0,2}(?: ?/ ?1\.73 ?m[²2])?)?\.?",
    re.ASCII,
)
_MILLI, _MICRO, _NANO, _PICO = (Fraction(1, 1000**i) for i in range(1, 5))
# The size of each unit in the first unit of its dimension. A compound (mg/dL) is read part by part.
_DIMENSIONS = {
    "mass": {"g": 1, "kg": 1000, "mg": _MILLI, "µg": _MICRO, "ng": _NANO, "pg": _PICO},
    "volume": {"l": 1, "dl": Fraction(1, 10), "ml": _MILLI, "µl": _MICRO, "fl": Fraction(1, 1000**5)},
    "amount": {"mol": 1, "mmol": _MILLI, "µmol": _MICRO, "nmol": _NANO, "pmol": _PICO},
    "charge": {"eq": 1, "meq": _MILLI},
    "osmoles": {"osm": 1, "mosm": _MILLI},
    "activity": {"u": 1, "iu": 1, "mu": _MILLI, "miu": _MILLI},
    "length": {"m": 1, "cm": Fraction(1, 100), "mm": _MILLI, "in": Fraction(254, 10**4)},
    "area": {"m²": 1, "cm²": Fraction(1, 10**4)},
    "time": {"s": 1, "ms": _MILLI, "min": 60, "h": 3600, "d": 86400, "wk": 604800, "y": 31557600},
    "pressure": {"mmhg": 1, "kpa": Fraction(750062, 10**5)},
    "beats": {"beat": 1},
    "share": {"%": Fraction(1, 100)},
    "points": {"point": 1},
    "temperature": {"°c": 1},
}
_SPELLED = {
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "mg": "milligram milligrams",
    "µg": "mcg ug microgram micrograms",
    "l": "liter liters litre litres",
    "ml": "cc milliliter milliliters millilitre millilitres",
    "µl": "ul",
    "µmol": "umol",
    "in": "inch inches",
    "s": "sec second seconds",
    "ms": "msec millisecond milliseconds",
    "min": "minute minutes",
    "h": "hr hrs hour hours",
    "d": "day days",
    "wk": "week weeks",
    "y": "year years yr yrs",
    "%": "percent",
    "m²": "m2 m^2",
    "cm²": "cm2 cm^2",
    "point": "points pt pts",
    "beat": "beats",
    "beat/min": "bpm",
    "°c": "c",
    "u": "units unit",
}
_SPELLINGS = {spelling: unit for unit, spellings in _SPELLED.items() for spelling in spellings.split()}
_SIMPLE = {unit: (name, Fraction(size)) for name, row in _DIMENSIONS.items() for unit, size in row.items()}


def unit_size(text: str) -> tuple[str, Fraction]:
    """Return a unit's dimension, and its size in the dimension's first unit: `mass/volume`, 0.01 for mg/dL.

    Raises `Unreadable` for units that are not in the table.
    """
    text = text.strip().rstrip(".").lower().replace("μ", "µ")
    text = _SPELLINGS.get(text, text).replace(" per ", "/").replace("mm hg", "mmhg")
    dimensions, size = [], Fraction(1)
    for i, part in enumerate(part.strip() for part in text.split("/")):
        if not part and not i and "/" in text:  # as in 10^9 /L: a count of cells
            dimensions.append("count")
            continue
        if i and part in ("1.73 m²", "1.73m²", "1.73 m2", "1.73m2"):
            dimensions.append("1.73 m²")
            continue
        part = _SPELLINGS.get(part, part)
        if part not in _SIMPLE:
            raise Unreadable("unknown_unit")
        dimension, amount = _SIMPLE[part]
        dimensions.append(dimension)
        size = size / amount if i else size * amount
    return "/".join(dimensions), size


def read_number(text: str) -> Number:
    """Read a number, such as `−1,234.5 mg/dL`, `2.5e-3` or `3 × 10^4 /µL`."""
    match = _NUMBER.fullmatch(text)
    if not match or (match["digits"] is None and match["fraction"] is None):
        raise Unreadable("not_a_number")
    digits = match["digits"] or "0"
    if digits.count(",") == 1 and match["fraction"] is None:
        raise Unreadable("ambiguous_number")
    value = Fraction(digits.replace(",", "") + (match["fraction"] or ""))
    value *= Fraction(10) ** int((match["exponent"] or match["power"] or "0").replace("−", "-"))
    unit = match["unit"]
    if unit is not None:
        unit_size(unit)
    return Number(-value if match["sign"] in ("-", "−") else value, unit)


# ---- dates and durations ----

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = {name: i for i, full in enumerate(_MONTHS, 1) for name in (full, full[:3])} | {"sept": 9}
_DAY, _NAME, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<month>[a-z]{3,9})", r"(?P<year>\d{4})"
_DATES = {  # each pattern, and the order of day and month that it assumes; None: it is unambiguous
    r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})": None,
    rf"{_DAY} {_NAME}\.?,? {_YEAR}": None,
    rf"{_NAME}\.? {_DAY},? {_YEAR}": None,
    r"(?P<day>\d{1,2})/(?P<month>\d{1,2})/(?P<year>\d{4})": "day_first",
    r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})": "month_first",
}
_DURATION = re.compile(r"(?:(\d{1,4}) ?(?:weeks?|wks?|w))?(?:,? ?(?:and )?(\d{1,5}) ?(?:days?|d))?")


def read_date(text: str, order: DateOrder | None = None) -> datetime.date:
    """Read 2024-03-04, 4 March 2024 or March 4, 2024; and 03/04/2024 if `order` decides, or if only one order
    gives a date.
    """
    text = " ".join(text.lower().split())
    patterns = [p for p, assumed in _DATES.items() if order is None or assumed in (None, order)]
    matches = [match for pattern in patterns if (match := re.fullmatch(pattern, text))]
    dates = {date for match in matches if (date := _date(**match.groupdict()))}
    if len(dates) > 1:
        raise Unreadable("ambiguous_date")
    if not dates:
        raise Unreadable("not_a_date")
    return dates.pop()


def _date(year: str, month: str, day: str) -> datetime.date | None:
    with contextlib.suppress(ValueError):
        return datetime.date(int(year), _MONTH.get(month) or int(month), int(day))


def read_duration(text: str) -> int:
    """Return the days in `14 weeks 2 days`, `14 weeks`, `100 days`, or `('14 weeks', '2 days')`."""
    text = re.sub(r"[()'\"]", "", " ".join(text.lower().split())).strip()
    match = _DURATION.fullmatch(text)
    if not match or not any(match.groups()):
        raise Unreadable("not_a_duration")
    return 7 * int(match[1] or 0) + int(match[2] or 0)


# ---- labels and texts ----


def normalize(text: str) -> str:
    """Normalise compatibility forms (NFKC), case and white space; drop punctuation around the text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?\"'()[]{}")


def read_labels(text: str, allowed: tuple[str, ...], kind: Kind = "labels") -> tuple[str, ...]:
    """Return the labels of `allowed` in a text, sorted. Commas or semicolons separate them, in any case.

    Raises `Unreadable` for unknown and repeated labels, and for several labels if `kind` is `label`.
    """
    known = {normalize(label): label for label in allowed}
    parts = [text] if normalize(text) in known else re.split("[,;]", text)
    names = list(map(normalize, parts))
    if any(name not in known for name in names):
        raise Unreadable("unknown_label")
    if len(set(names)) < len(names):
        raise Unreadable("repeated_label")
    if kind == "label" and len(names) > 1:
        raise Unreadable("several_labels")
    return tuple(sorted(known[name] for name in names))


# ---- references and answers ----


def read_reference(row: Mapping[str, Any]) -> Reference:
    """Read the right answer of a record from its fields `kind` and `answer`.

    Numbers may have `unit`, and `lower`, `upper` or `tolerance` (a share of the answer); without limits, only
    the exact number is right. Label and labels need `labels`, the list of all labels. Texts may have
    `aliases`, and dates `order`.

    Raises `Unreadable` with a message that names the field, the value and the remedy.
    """
    kind, answer = row.get("kind"), row.get("answer", "")
    if kind not in KINDS:
        raise Unreadable(f"field kind: {kind!r} is none of {', '.join(KINDS)}; give one of these")
    text = ", ".join(map(str, answer)) if isinstance(answer, list | tuple) else str(answer).strip()
    unit, order, allowed = row.get("unit") or None, row.get("order"), _text_list(row, "labels")
    if order not in (None, *get_args(DateOrder)):
        raise Unreadable(f"field order: {order!r} is neither month_first nor day_first; give one of these")
    if not text or len(text) > MAX_LENGTH[kind]:
        problem = f"{text[:40]!r} has {len(text):,} characters; give 1 to {MAX_LENGTH[kind]:,}"
        raise Unreadable(f"field answer: {problem}")
    reference = Reference(KINDS[KINDS.index(kind)], text, unit=unit, allowed=allowed, order=order)
    if kind == "text":
        return replace(reference, aliases=_text_list(row, "aliases"))
    if unit is not None:
        _read_field("unit", str(unit), kind, unit_size)
    value = _read_field("answer", text, kind, lambda text: read_value(text, reference))
    limits = _limits(row, value, unit) if kind == "number" else {}
    return replace(reference, value=value, **limits)


def _read_field(name: str, text: str, kind: str, read: Callable[[str], T]) -> T:
    """Call `read` on the text of a field. Raises `Unreadable` with the field, the text and the reason."""
    try:
        return read(text)
    except Unreadable as e:
        problem = f"{text!r} cannot be read as a value of kind {kind}: {REASONS[str(e)]}"
        raise Unreadable(f"field {name}: {problem}; write it in another form") from None


def _text_list(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Return the texts of a list; () if the field is missing."""
    texts = row.get(field) or ()
    if not isinstance(texts, list | tuple):
        raise Unreadable(f"field {field}: {texts!r} is not a list; give a list of texts")
    return tuple(map(str, texts))


def _limits(row: Mapping[str, Any], value: Fraction, unit: str | None) -> dict[str, Fraction]:
    """Return `lower` and `upper` from these fields, from `tolerance`, or as the value itself."""
    stated = {x: str(row[x]).strip() for x in ("lower", "upper", "tolerance") if row.get(x) not in (None, "")}
    tolerance, limits = stated.pop("tolerance", None), {}
    if tolerance is not None and stated:
        raise Unreadable("field tolerance: the record also has lower or upper; remove one of the two")
    for name, text in stated.items():
        limits[name] = _read_field(name, text, "number", lambda text: convert(read_number(text), unit))
    if tolerance is not None:
        margin = abs(value) * _read_field("tolerance", tolerance, "number", _read_share)
        limits = {"lower": value - margin, "upper": value + margin}
    limits = limits or {"lower": value, "upper": value}
    if not limits.get("lower", value) <= value <= limits.get("upper", value):
        bounds = ", ".join(f"{name} {float(limit):g}" for name, limit in limits.items())
        raise Unreadable(f"field answer: {float(value):g} is not within {bounds}; put the limits in order")
    return limits


def _read_share(text: str) -> Fraction:
    """Read `0.05` or `5 %`."""
    number = read_number(text)
    return number.value if number.unit is None else convert(number, "%") / 100


def convert(number: Number, unit: str | None) -> Fraction:
    """Return the number in `unit`. A number without a unit is taken to be in it already."""
    if number.unit is None:
        return number.value
    if unit is None:
        raise Unreadable("unit_not_asked")
    (dimension, size), (wanted, wanted_size) = unit_size(number.unit), unit_size(unit)
    if dimension != wanted:
        raise Unreadable("other_dimension")
    return number.value * size / wanted_size


def read_value(text: str, reference: Reference) -> Any:
    """Read a text as a value of the reference's kind, unit, order and labels. Raises `Unreadable`."""
    match reference.kind:
        case "number":
            return convert(read_number(text), reference.unit)
        case "integer":
            value = convert(read_number(text), reference.unit)
            if value.denominator != 1:
                raise Unreadable("not_an_integer")
            return value
        case "date":
            return read_date(text, reference.order)
        case "duration":
            return read_duration(text)
        case "label" | "labels":
            return read_labels(text, reference.allowed, reference.kind)
        case "text":
            return normalize(text)


def matches(answer: str, reference: Reference) -> bool:
    """Whether a stripped answer is right. Raises `Unreadable` if it is no value of the reference's kind."""
    if len(answer) > MAX_LENGTH[reference.kind]:
        raise Unreadable("too_long")
    value = read_value(answer, reference)
    if reference.kind == "text":
        return value in map(normalize, (reference.text, *reference.aliases))
    if reference.kind == "number":
        low, high = reference.lower, reference.upper
        return (low is None or low <= value) and (high is None or value <= high)
    return value == reference.value

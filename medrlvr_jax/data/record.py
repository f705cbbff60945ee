"""Checks on a record's fields: each function reads one kind of field (text, options, facts, images, …).

A check that fails raises `DataError` with the field, the value and the remedy. load.py adds file and line.
"""

import contextlib
import json
import re
from io import BytesIO
from reprlib import repr as short
from typing import Any

from medrlvr_jax.data.question import LETTERS, DataError, Key
from medrlvr_jax.data.values import Unreadable, read_reference

Row = dict[str, Any]
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def field_names(row: Row) -> str:
    """List a record's fields for a message: up to 50, since the one that matters may be the last."""
    names = [short(name) for name in row]
    return f"[{', '.join(names[:50])}{', …' if len(names) > 50 else ''}]"


def bad_field(field: str, value: Any, problem: str) -> DataError:
    return DataError(f"field {field}: {short(value)} {problem}")


def required(row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"field {field}: it is required and missing; the record has {field_names(row)}")
    return row[field]


def text_of(row: Row, field: str, strip: bool = True, empty: bool = False) -> str:
    return checked_text(required(row, field), field, strip, empty)


def checked_text(value: Any, field: str, strip: bool = True, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise bad_field(field, value, "is not a string; put quotes around it")
    if not value.strip() and not empty:
        raise bad_field(field, value, "is blank; give a text, or remove the record")
    if not value.isascii() and LONE_SURROGATE.search(value):
        raise bad_field(field, value, "has half a surrogate pair (a lone \\ud8…); write the character again")
    return value.strip() if strip else value


def optional_text(row: Row, field: str) -> str:
    return text_of(row, field, empty=True) if field and row.get(field) is not None else ""


def id_of(row: Row, field: str) -> str:
    """Return the record's id as a text; "" if it has none."""
    name = row.get(field)
    if name is not None and (isinstance(name, bool) or not isinstance(name, int | str)):
        raise bad_field(field, name, "is neither a string nor an integer; give one of these")
    return "" if name is None else str(name)


def index_in(known: tuple[str, ...], row: Row, field: str) -> int:
    """Return the index of the field's text in `known`."""
    if (value := text_of(row, field)) not in known:
        raise bad_field(field, value, f"is none of {', '.join(known)}; give one of these")
    return known.index(value)


def as_integer(value: Any) -> int | None:
    """Return an integer, which CSV gives as digits; None for everything else."""
    if isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,9} *", value):
        return int(value)
    return value if type(value) is int else None


def options_of(row: Row, field: str) -> tuple[str, ...]:
    """Read 2 to 10 options from a list or from {"A": …}. Records of one set may differ in number."""
    value = required(row, field)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}  # parquet fills missing letters with null
        if set(value) != set(LETTERS[: len(value)]):
            problem = f"letters {short(list(value))} are not A, B, C … without a gap, up to {LETTERS[-1]}"
            raise DataError(f"field {field}: {problem}; name each option by its letter")
        value = [value[letter] for letter in LETTERS[: len(value)]]
    if not isinstance(value, list | tuple):
        remedy = "give a list of options, or an object by letter; in CSV, a column A, B, … for each"
        raise bad_field(field, value, f"is neither a list nor an object; {remedy}")
    options = tuple(checked_text(option, f"{field} {i}") for i, option in enumerate(value, 1))
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"field options: there are {len(options)}; a question has 2 to {len(LETTERS)}")
    return options


def option_index(value: Any, field: str, options: tuple[str, ...], answer_as: str = "letter") -> int:
    """Return the index of the option that `value` names. `answer_as`: letter, text, from_0 or from_1."""
    if answer_as == "letter":
        if as_integer(value) is not None:
            remedy = 'give the letter, such as "B"; or set constants={answer_as: from_0}, or from_1'
            raise bad_field(field, value, f"is a number where a letter is needed; {remedy}")
        letter = checked_text(value, field).upper()
        if len(letter) != 1 or letter not in LETTERS[: len(options)]:
            raise bad_field(field, value, f"is not the letter of one of its {len(options)} options")
        return LETTERS.index(letter)
    if answer_as == "text":
        if (option := checked_text(value, field)) not in options:
            raise bad_field(field, option, f"is not the text of one of its {len(options)} options")
        return options.index(option)
    first, number = int(answer_as[-1]), as_integer(value)
    if number is None or not first <= number < len(options) + first:
        problem = f"is not the number of one of its {len(options)} options, counted from {first}"
        raise bad_field(field, value, f"{problem}; correct it, or all if the file counts from {1 - first}")
    return number - first


def open_key(row: Row) -> Key:
    """Read the right answer of an open question from `kind`, `answer` and the fields that the kind needs."""
    required(row, "answer")
    try:
        return (), read_reference(row)
    except Unreadable as e:
        raise DataError(str(e)) from None


def facts_of(row: Row) -> tuple[tuple[str, ...], ...]:
    """Read `facts`, a list of what a good thought states. Each fact is a text, or a list of its wordings."""
    facts = row.get("facts") or ()
    if not isinstance(facts, list | tuple):
        raise bad_field("facts", facts, "is not a list; give a list of texts, or of lists of texts")
    lists = [fact if isinstance(fact, list | tuple) and fact else [fact] for fact in facts]
    return tuple(tuple(checked_text(x, f"facts {i}") for x in fact) for i, fact in enumerate(lists, 1))


def images_of(row: Row) -> tuple[str | bytes, ...]:
    """Read `image`, or the list `images`: paths, bytes of files, or images of datasets or Pillow."""
    image, images = row.get("image"), row.get("images")
    if image is not None and images is not None:
        raise DataError("field images: the record also has image; remove one of the two")
    value = images if image is None else image
    values = value if isinstance(value, list | tuple) else () if value is None else (value,)
    return tuple(map(_path_or_bytes, values))


def _path_or_bytes(image: Any) -> str | bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if hasattr(image, "getbands"):  # a Pillow image
        out = BytesIO()
        image.save(out, "PNG")
        image = out.getvalue()
    if not isinstance(image, str | bytes) or not image:
        raise bad_field("image", image, "is not an image; give the path of a file, or its bytes")
    return image

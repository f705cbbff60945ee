"""What the fields of a record must hold: texts, options, numbers, facts, images, values.

A check that fails raises `DataError` with the field, the value and the remedy; load.py adds file and line.
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
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


def field_names(row: Row) -> str:
    """The names of a record's fields, for messages: all, since the one that matters may be the last."""
    names = [short(name) for name in row]
    return f"[{', '.join(names[:50])}{', …' if len(names) > 50 else ''}]"


def wrong(field: str, value: Any, problem: str) -> DataError:
    return DataError(f"field {field}: {short(value)} {problem}")


def needed(row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"field {field}: needed, and not there; the record has {field_names(row)}")
    return row[field]


def text(row: Row, field: str, strip: bool = True, empty: bool = False) -> str:
    return as_text(needed(row, field), field, strip, empty)


def as_text(value: Any, field: str, strip: bool = True, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise wrong(field, value, "is not a string; put quotes around it")
    if not value.strip() and not empty:
        raise wrong(field, value, "is blank; give a text, or take the record out")
    if not value.isascii() and HALF.search(value):
        raise wrong(field, value, "holds half a surrogate pair (a lone \\ud8…); write the character again")
    return value.strip() if strip else value


def one_of(row: Row, field: str, known: tuple[str, ...]) -> int:
    """The index, among the texts that are known, of the one that the field holds."""
    if (value := text(row, field)) not in known:
        raise wrong(field, value, f"is none of {', '.join(known)}; give one of these")
    return known.index(value)


def integer(value: Any) -> int | None:
    """An integer, or digits as CSV brings them; None for everything else."""
    if isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,9} *", value):
        return int(value)
    return value if type(value) is int else None


def options_of(row: Row, field: str) -> tuple[str, ...]:
    """2 to 10 options from a list or from {"A": …}. Records of one set may differ in number."""
    value = needed(row, field)
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
        remedy = "a list of options is needed, or an object by letter; in CSV, a column A, B, … for each"
        raise DataError(f"field {field}: {short(value)}: {remedy}")
    options = tuple(as_text(option, f"{field} {i}") for i, option in enumerate(value, 1))
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(f"field options: {len(options)} of them; a question has 2 to {len(LETTERS)}")
    return options


def place_of(value: Any, field: str, options: tuple[str, ...], how: str = "letter") -> int:
    """The index of the option that the value of a field names, by its letter, its text or its number."""
    if how == "letter":
        if integer(value) is not None:
            remedy = 'give the letter, such as "B"; or set constants={answer_as: from_0}, or from_1'
            raise wrong(field, value, f"is a number where a letter is needed; {remedy}")
        letter = as_text(value, field).upper()
        if len(letter) != 1 or letter not in LETTERS[: len(options)]:
            raise wrong(field, value, f"is not the letter of one of its {len(options)} options")
        return LETTERS.index(letter)
    if how == "text":
        if (option := as_text(value, field)) not in options:
            raise wrong(field, option, f"is not the text of one of its {len(options)} options")
        return options.index(option)
    first, number = int(how[-1]), integer(value)
    if number is None or not first <= number < len(options) + first:
        problem = f"is not the number of one of its {len(options)} options, counted from {first}"
        raise wrong(field, value, f"{problem}; correct it, or all if the file counts from {1 - first}")
    return number - first


def value_of(row: Row) -> Key:
    """The value that the fields `kind`, `answer` and those beside them hold, and no options."""
    needed(row, "answer")
    try:
        return (), read_reference(row)
    except Unreadable as e:
        raise DataError(str(e)) from None


def facts_of(row: Row) -> tuple[tuple[str, ...], ...]:
    """What a good thought states: each fact a text, or the texts that state it."""
    facts = row.get("facts") or ()
    if not isinstance(facts, list | tuple):
        raise wrong("facts", facts, "is not a list; give a list of texts, or of lists of texts")
    wordings = [fact if isinstance(fact, list | tuple) and fact else [fact] for fact in facts]
    return tuple(tuple(as_text(each, f"facts {i}") for each in fact) for i, fact in enumerate(wordings, 1))


def images_of(row: Row) -> tuple[str | bytes, ...]:
    """The field `image`, or the list `images`: paths, bytes of files, or images of datasets or Pillow."""
    if row.get("image") is not None and row.get("images") is not None:
        raise DataError("field images: given beside image; take one of the two out")
    given = row.get("images") if row.get("image") is None else row["image"]
    many = given if isinstance(given, list | tuple) else () if given is None else (given,)
    return tuple(map(_image, many))


def _image(value: Any) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if hasattr(value, "getbands"):  # Pillow's
        out = BytesIO()
        value.save(out, "PNG")
        value = out.getvalue()
    if not isinstance(value, str | bytes) or not value:
        raise wrong("image", value, "is no image; give the path of a file, or its bytes")
    return value

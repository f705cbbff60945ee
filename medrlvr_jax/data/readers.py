"""Read records from files, the hub and Python: each reader yields (line or row number, record or error).

Readers yield a `DataError` in place of a bad record, so that one pass over a file reports all bad lines.
"""

import csv
import datetime
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, NamedTuple, TextIO

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.question import LETTERS, DataError, Example, Question
from medrlvr_jax.host import files

Records = Iterable[Question | Example | Mapping[str, Any]]  # from Python; also a datasets.Dataset
Row = dict[str, Any] | DataError
Rows = Iterator[tuple[int, Row]]
PYTHON = "python:data"  # `SetConfig.path` of records from Python
MAX_LINE = 16 * 2**20  # bytes; a longer line is no question, so the file is not JSONL
BOM = b"\xef\xbb\xbf"  # the byte order mark that Windows programs write before UTF-8


class Source(NamedTuple):
    """The records of one set, and how messages and ids refer to them."""

    unit: str  # line, row or record: what the numbers count
    rows: Iterator[tuple[int, Any]]
    stem: str  # the start of the ids of records without an id
    revision: str | None = None  # the hub's commit


def open_records(config: SetConfig, records: Records | None = None) -> Source:
    """Open `records`, which come from Python, or else a local file or a data set on the hub."""
    if records is not None:
        return Source("row", _from_python(records), "row")
    if config.path == PYTHON:
        problem = "these records came from Python, and no file has them"
        remedy = "pass them again, as train(config, data=rows), or set path to a file"
        raise DataError(f"path {PYTHON!r}: {problem}; {remedy}")
    path = Path(config.path).expanduser()
    stem = "-".join(filter(None, (path.stem, config.subset, config.split)))
    if path.suffix in READERS and path.is_file():
        unit, reader = READERS[path.suffix]
        with files.reading(path, "make it readable for this user", DataError):
            path.open("rb").close()
        return Source(unit, reader(path), stem)
    hub_name = config.path.count("/") < 2 and not config.path.startswith(("/", "./", "../", "~"))
    if hub_name and path.suffix not in READERS and not path.exists():
        revision, rows = _hub(config)
        return Source("row", rows, stem, revision)
    problem = "a folder" if path.is_dir() else "a file of unknown type" if path.exists() else "no such file"
    remedy = f"give a {' '.join(READERS)} file, a hub name or embedded:train"
    raise DataError(f"path {config.path!r}: {problem}; {remedy}")


def _from_python(records: Records) -> Iterator[tuple[int, Row | Question | Example]]:
    if hasattr(records, "features"):
        yield from _dataset(records)
        return
    for number, row in enumerate(records, 1):
        if isinstance(row, Mapping):
            row = dict(row)
        elif not isinstance(row, Question | Example):
            row = DataError(f"{short(row)}: the row is neither a Question nor a dict; give one of these")
        yield number, row


# ---- JSON ----


def read_json(path: Path) -> Rows:
    """Read a list of records, records by id (PubMedQA), or JSONL. The content decides, not the suffix."""
    with open(path, "rb") as file:
        first = _decode(next((line for line in _lines(file) if line), b""))
    # In JSONL, the first line is a record, whose values are not all objects.
    if not isinstance(first, dict) or all(isinstance(value, dict) for value in first.values()):
        tree = _decode(path.read_bytes())
        if path.suffix == ".json" or not isinstance(tree, DataError):
            if isinstance(tree, dict) and tree and all(isinstance(value, dict) for value in tree.values()):
                tree = [{"id": key} | value for key, value in tree.items()]
            yield from enumerate(map(_record, tree if isinstance(tree, list) else [tree]), 1)
            return
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if len(line) > MAX_LINE:
                remedy = "check that the file is JSONL, with one record a line"
                yield number, DataError(f"the line is longer than {MAX_LINE >> 20} MiB; {remedy}")
                return
            if line:
                yield number, _record(_decode(line))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines, stripped; a line longer than `MAX_LINE` comes in pieces."""
    for line in iter(lambda: file.readline(MAX_LINE + 1), b""):
        yield line.removeprefix(BOM).strip()


def _decode(text: bytes) -> Any:
    """Return the JSON value, or a `DataError`, after which the reader goes on to the next line."""
    try:
        return json.loads(text.removeprefix(BOM).decode("utf-8"), object_pairs_hook=_object)
    except DataError as e:
        return e
    except UnicodeDecodeError as e:
        return DataError(f"byte {e.start + 1} is not UTF-8; save the file as UTF-8")
    except ValueError as e:  # json.JSONDecodeError, and integers of more digits than Python reads
        return DataError(f"not JSON: {e}")
    except RecursionError:
        return DataError("not JSON of a question: its brackets are nested too deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. A repeated field is an error: Python would silently use its last value."""
    if len(row := dict(pairs)) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise DataError(f"field {short(twice)} is given twice; remove one")
    return row


def _record(value: Any) -> Row:
    if isinstance(value, dict | DataError):
        return value
    return DataError(f"{short(value)} is not an object with fields, as a record must be")


# ---- tables ----

Cells = Iterable[tuple[int, list[str]]]  # the number and the cells of each line or row


def _csv(path: Path) -> Rows:
    """Read CSV with commas, semicolons or tabs, whichever fits the first record."""
    start = 1  # the first line of the current record: a quoted cell may span lines
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            delimiter = _delimiter(file)
            reader = csv.reader(file, strict=True, delimiter=delimiter)

            def lines() -> Cells:
                nonlocal start
                for cells in reader:
                    number, start = start, reader.line_num + 1
                    yield number, cells

            yield from _table(lines(), path, f"quote cells that contain {delimiter!r}")
        except (csv.Error, UnicodeDecodeError) as e:
            yield start, DataError(f"not CSV in UTF-8: {e}; save the file again as CSV in UTF-8")


def _excel(path: Path) -> Rows:
    """Read the first sheet of a workbook. A formula counts as the value that was saved with it."""
    if not importlib.util.find_spec("openpyxl"):
        remedy = "pip install 'medrlvr-jax[excel]', or save the sheet as CSV in UTF-8"
        raise DataError(f"{path}: reading Excel files needs openpyxl; {remedy}")
    import openpyxl  # pyright: ignore[reportMissingModuleSource]

    with files.reading(path, "it is not an .xlsx file, or it is damaged; save it again", DataError):
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        rows = [[_cell(value) for value in row] for row in sheet.iter_rows(values_only=True)]
    for row in rows:  # the number of empty cells at the end is arbitrary
        while row and not row[-1]:
            row.pop()
    width = len(next(filter(None, rows), []))
    padded = (row and row + [""] * (width - len(row)) for row in rows)
    yield from _table(enumerate(padded, 1), path, "remove the cells beside the table")


def _cell(value: Any) -> str:
    """Return the text that a cell shows: 3 for 3.0, and a date without a time."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return "" if value is None else str(value)


def _table(lines: Cells, path: Path, remedy: str) -> Rows:
    """Read a table with a header, in which columns A, B, … are the options, or without one, as in MMLU.

    `remedy` is for a line whose number of cells differs from the header's.
    """
    header, filled = [], ((number, cells) for number, cells in lines if cells)
    for i, (number, cells) in enumerate(filled):
        if i == 0 and _is_header(cells):
            header = [cell.strip() for cell in cells]
            if twice := [name for name, times in Counter(header).items() if name and times > 1]:
                yield number, DataError(f"the header has the column {twice[0]!r} twice; remove one")
                return
        elif header and len(cells) != len(header):
            yield number, DataError(f"{len(cells)} cells under a header of {len(header)}; {remedy}")
        else:
            yield number, _under_header(header, cells) if header else _without_header(cells, path.stem)


def _is_header(cells: list[str]) -> bool:
    names = {cell.strip() for cell in cells}
    return bool(names & {"response", "text", "completion"}) or "question" in map(str.lower, names)


def _delimiter(file: TextIO) -> str:
    """Return the delimiter that splits the first record into a header or six cells, else a comma."""
    for delimiter in ",;\t":
        cells = next(filter(None, csv.reader(file, strict=True, delimiter=delimiter)), [])
        file.seek(0)
        if len(cells) > 1 and (_is_header(cells) or len(cells) == 6):
            return delimiter
    return ","


def _under_header(header: list[str], cells: list[str]) -> Row:
    """Drop empty cells, and the nameless column in which pandas writes row numbers."""
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell}
    options = {letter: row.pop(letter) for letter in LETTERS if letter in row}
    return {"options": options} | row if options else row


def _without_header(cells: list[str], stem: str) -> Row:
    if len(cells) != 6:
        return DataError(f"{len(cells)} cells; without a header six are needed: question, A, B, C, D, letter")
    subject = stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val").replace("_", " ")
    return {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}


# ---- data sets ----


def _parquet(path: Path) -> Rows:
    import datasets  # takes seconds to import
    import pyarrow.parquet
    from datasets.table import InMemoryTable

    with files.reading(path, "it is not a parquet file, or it is damaged; write it again", DataError):
        table = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    yield from _dataset(table)


def _hub(config: SetConfig) -> tuple[str | None, Rows]:
    """Return the commit and the records of a data set on the hub."""
    import datasets

    names = ("path", "subset", "split", "revision")
    source = ", ".join(f"{name} {getattr(config, name)!r}" for name in names)
    remedy = "it is no local file, and the hub gave no such data set; correct the name, or give a file"
    with files.reading(source, remedy, DataError):
        builder = datasets.load_dataset_builder(config.path, config.subset, revision=config.revision)
        builder.download_and_prepare()
        loaded = builder.as_dataset(config.split)
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{source}: set split to one of {', '.join(map(str, loaded))}")
    return builder.hash, _dataset(loaded)


def _dataset(rows: Any) -> Rows:
    """Yield the rows of a `datasets.Dataset`, with the names of class labels in place of their numbers.

    MedMCQA's cop is then `a`, not 0 (on the hub) or 1 (in the authors' files). Label -1 becomes None.
    """
    import datasets

    undecoded = datasets.Image(decode=False)  # images.py decodes, with errors that name the image
    for field, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(field, undecoded)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            rows = rows.cast_column(field, datasets.List(undecoded))
    kinds = {field: kind for field, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    labels = {field: dict(enumerate(kind.names)) for field, kind in kinds.items()}
    for number, row in enumerate(rows, 1):
        yield number, row | {field: names.get(row[field]) for field, names in labels.items()}


# For each suffix: what record numbers count, and the reader.
READERS = {".csv": ("line", _csv), ".tsv": ("line", _csv), ".xlsx": ("row", _excel)}
READERS |= {".jsonl": ("line", read_json), ".json": ("record", read_json), ".parquet": ("row", _parquet)}

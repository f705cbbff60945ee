"""From files, the hub and Python to records: each reader yields (line or row number, fields or an error).

Errors (`DataError`) are yielded, not raised, so that one pass over a file reports all its bad lines.
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

Records = Iterable[Question | Example | Mapping[str, Any]]  # given in Python; a datasets.Dataset is one
Row = dict[str, Any] | DataError
Rows = Iterator[tuple[int, Row]]
PYTHON = "python:data"  # SetConfig.path of records that were given in Python
MAX_LINE = 16 * 2**20  # bytes: longer than any question, so the file is of another kind
BOM = b"\xef\xbb\xbf"  # the mark that Windows programs put before UTF-8


class Source(NamedTuple):
    unit: str  # in which its records are counted
    rows: Iterator[tuple[int, Any]]
    stem: str  # how the ids of records begin that have none
    revision: str | None = None  # the hub's commit


def open_records(config: SetConfig, records: Records | None = None) -> Source:
    """The records of a local file or of a data set on the hub; or `records`, which were given in Python."""
    if records is not None:
        return Source("row", _given(records), "row")
    if config.path == PYTHON:
        remedy = "give them again, as train(config, data=rows), or set path to a file"
        raise DataError(f"path {PYTHON!r}: these rows were given in Python, and no file holds them; {remedy}")
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
    problem = "a folder" if path.is_dir() else "a file of another kind" if path.exists() else "no such file"
    remedy = f"give a {' '.join(READERS)} file, a hub name or embedded:train"
    raise DataError(f"path {config.path!r}: {problem}; {remedy}")


def _given(records: Records) -> Iterator[tuple[int, Row | Question | Example]]:
    if hasattr(records, "features"):
        yield from _dataset(records)
        return
    for number, row in enumerate(records, 1):
        if isinstance(row, Mapping):
            row = dict(row)
        elif not isinstance(row, Question | Example):
            row = DataError(f"{short(row)}: a Question or a dict is needed")
        yield number, row


# ---- JSON ----


def read_json(path: Path) -> Rows:
    """A list of records, records by id (PubMedQA), or one record a line: by the content, not the suffix."""
    with open(path, "rb") as file:
        first = _decode(next((line for line in _lines(file) if line), b""))
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
                remedy = "this is not a question; is the file JSONL, one record a line?"
                yield number, DataError(f"longer than {MAX_LINE >> 20} MiB: {remedy}")
                return
            if line:
                yield number, _record(_decode(line))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines without white space around them; a line longer than `MAX_LINE` comes in pieces."""
    for line in iter(lambda: file.readline(MAX_LINE + 1), b""):
        yield line.removeprefix(BOM).strip()


def _decode(text: bytes) -> Any:
    """The JSON value, or a `DataError` (returned, so that the reader goes on to the next line)."""
    try:
        return json.loads(text.removeprefix(BOM).decode("utf-8"), object_pairs_hook=_unique)
    except DataError as e:
        return e
    except UnicodeDecodeError as e:
        return DataError(f"byte {e.start + 1} is not UTF-8; save the file as UTF-8")
    except ValueError as e:  # json.JSONDecodeError, and integers of more digits than Python reads
        return DataError(f"not JSON: {e}")
    except RecursionError:
        return DataError("not JSON of a question: brackets nested too deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A field given twice is refused: Python would silently use the last."""
    if len(row := dict(pairs)) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise DataError(f"field {short(twice)} is given twice; take one out")
    return row


def _record(value: Any) -> Row:
    if isinstance(value, dict | DataError):
        return value
    return DataError(f"{short(value)}: a record is an object with fields")


# ---- tables ----

Cells = Iterable[tuple[int, list[str]]]  # each line's or row's number and its cells


def _csv(path: Path) -> Rows:
    """Cells are separated by commas, semicolons or tabs, whichever fits the first record."""
    start = 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            delimiter = _delimiter(file)
            reader = csv.reader(file, strict=True, delimiter=delimiter)

            def lines() -> Cells:
                nonlocal start
                for cells in reader:
                    number, start = start, reader.line_num + 1  # its first line: a quoted cell may span lines
                    yield number, cells

            yield from _table(lines(), path, f"quote cells that hold {delimiter!r}")
        except (csv.Error, UnicodeDecodeError) as e:
            yield start, DataError(f"not CSV in UTF-8: {e}; save the file again as CSV in UTF-8")


def _excel(path: Path) -> Rows:
    """The first sheet of a workbook; formulas by the values that were saved with them."""
    if not importlib.util.find_spec("openpyxl"):
        remedy = "pip install 'medrlvr-jax[excel]', or save the sheet as CSV in UTF-8"
        raise DataError(f"{path}: an Excel file needs openpyxl, which is not installed; {remedy}")
    import openpyxl  # pyright: ignore[reportMissingModuleSource]

    with files.reading(path, "it may be no .xlsx file, or a broken one: save it again", DataError):
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        values = [[_cell(value) for value in row] for row in sheet.iter_rows(values_only=True)]
    filled = [max((i for i, cell in enumerate(row, 1) if cell), default=0) for row in values]
    width = next(iter(filled), 0)  # of the header: empty cells at the end may be left out, or be too many
    sizes = [max(width, size) if size else 0 for size in filled]
    rows = ((row + [""] * width)[:size] for row, size in zip(values, sizes, strict=True))
    yield from _table(enumerate(rows, 1), path, "take out what stands beside the table")


def _cell(value: Any) -> str:
    """What a cell shows: 3.0 is 3, and a date has no time."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return "" if value is None else str(value)


def _table(lines: Cells, path: Path, remedy: str) -> Rows:
    """With a header (columns A, B, … are the options) or, as in MMLU, without: question, A, B, C, D, letter.

    `remedy`: for a line of more or fewer cells than the header has.
    """
    header = None
    for number, cells in lines:
        if number == 1 and _is_header(cells):
            header = [cell.strip() for cell in cells]
            if twice := [name for name, times in Counter(header).items() if name and times > 1]:
                yield number, DataError(f"column {twice[0]!r} is there twice; take one out")
                return
        elif header and cells and len(cells) != len(header):
            yield number, DataError(f"{len(cells)} cells under a header of {len(header)}; {remedy}")
        elif cells:
            yield number, _under_header(header, cells) if header else _without_header(cells, path.stem)


def _is_header(cells: list[str]) -> bool:
    names = {cell.strip() for cell in cells}
    return bool(names & {"response", "text", "completion"}) or "question" in map(str.lower, names)


def _delimiter(file: TextIO) -> str:
    """The delimiter that splits the first record into a header or six cells, else a comma."""
    for delimiter in ",;\t":
        cells = next(csv.reader(file, strict=True, delimiter=delimiter), [])
        file.seek(0)
        if len(cells) > 1 and (_is_header(cells) or len(cells) == 6):
            return delimiter
    return ","


def _under_header(header: list[str], cells: list[str]) -> Row:
    """A record without its empty cells, and without a nameless column, where pandas writes row numbers."""
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell}
    options = {letter: row.pop(letter) for letter in LETTERS if letter in row}
    return {"options": options} | row if options else row


def _without_header(cells: list[str], stem: str) -> Row:
    if len(cells) != 6:
        return DataError(f"{len(cells)} cells; without a header there are six: question, A, B, C, D, letter")
    subject = stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val").replace("_", " ")
    return {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}


# ---- data sets ----


def _parquet(path: Path) -> Rows:
    import datasets  # imports take seconds: only where needed
    import pyarrow.parquet
    from datasets.table import InMemoryTable

    with files.reading(path, "it may be no parquet file, or a broken one: write it again", DataError):
        table = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    yield from _dataset(table)


def _hub(config: SetConfig) -> tuple[str | None, Rows]:
    """The commit, and the records."""
    import datasets

    names = ("path", "subset", "split", "revision")
    source = ", ".join(f"{name} {getattr(config, name)!r}" for name in names)
    remedy = "neither a file here nor a data set that the hub gave: correct the name, or give a file"
    with files.reading(source, remedy, DataError):
        builder = datasets.load_dataset_builder(config.path, config.subset, revision=config.revision)
        builder.download_and_prepare()
        loaded = builder.as_dataset(config.split)
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{source}: set split to one of {', '.join(map(str, loaded))}")
    return builder.hash, _dataset(loaded)


def _dataset(rows: Any) -> Rows:
    """A datasets.Dataset, class labels as their names: no parser must know where a set starts to count.

    MedMCQA's cop is then `a`, not 0 (on the hub) or 1 (in the authors' files). A label of -1 means: no label.
    """
    import datasets

    closed = datasets.Image(decode=False)  # a file's bytes or path: images.py opens it, and names its faults
    for field, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(field, closed)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            rows = rows.cast_column(field, datasets.List(closed))
    labels = {field: kind for field, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(rows, 1):
        names = {field: dict(enumerate(kind.names)).get(row[field]) for field, kind in labels.items()}
        yield number, row | names


# By suffix: the unit that records are counted in, and the reader.
READERS = {".csv": ("line", _csv), ".tsv": ("line", _csv), ".xlsx": ("row", _excel)}
READERS |= {".jsonl": ("line", read_json), ".json": ("record", read_json), ".parquet": ("row", _parquet)}

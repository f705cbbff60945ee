"""Multiple-choice questions from files and the hub, checked line by line, and which of them step `step` takes.

A `SetConfig.path` is a local file (.jsonl .json .csv .tsv .parquet), `embedded:NAME`, or the name of a data set on the hub. The format is
told by the first record's fields, or set by `format`; formats.py has them.

Everything is read before anything is used, and up to ten complaints are raised at once, each naming its line. What can be read in more
than one way is told: `read` says how each set was taken, in a few lines for the console.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from pydantic_core import to_jsonable_python

from medrlvr_jax.config.schema import Config, PassCountConfig, SetConfig
from medrlvr_jax.config.sources import SOURCES, Source
from medrlvr_jax.data.formats import FORMATS, LETTERS, DataError, Example, Question, brings_letters, checked, detect, unlabelled
from medrlvr_jax.host import files

PYTHON = "python:data"  # SetConfig.path of rows that were given in Python
Records = Iterable[Question | Example | Mapping[str, Any]]  # what may be given there; a datasets.Dataset is such
MAX_LINE = 16 * 2**20  # bytes: beyond any question, so it is some other kind of file
MAX_COMPLAINTS = 10
WIDE = 80  # columns of a console
BOM = b"\xef\xbb\xbf"  # the mark that Windows programs put in front of UTF-8


def load(config: SetConfig) -> list[Question]:
    """The set's questions in their order; formats as in formats.py."""
    return read(config)[0]


def given(spec: SetConfig, data: Records | str | Path | None) -> tuple[SetConfig, Records | None]:
    """`spec` with the path of what a caller gave in Python, and the records where that is no path; None: all as `spec` has it."""
    if data is None:
        return spec, None
    if isinstance(data, str | Path):
        return dataclasses.replace(spec, path=str(data)), None
    return dataclasses.replace(spec, path=PYTHON), data


def read(config: SetConfig, rows: Records | None = None) -> tuple[list[Question], str]:
    """The set's questions in their order; and how they were read, for the console: counts, keys, repeats, the first of them.

    `rows` stand in place of what `config.path` names.
    """
    if source := _source(config.path):
        questions, notes = _packaged(config.path, source.questions), []
    else:
        questions, notes = _collect(config, ("plain", "medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa"), rows)
    questions = questions[: config.limit]
    questions = _by_pass_count(questions, config.pass_count) if config.pass_count else questions
    return questions, _told(questions, notes)


def load_text(config: SetConfig) -> list[Example]:
    """The set's prompts and responses, format `text`."""
    return read_text(config)[0]


def read_text(config: SetConfig, rows: Records | None = None) -> tuple[list[Example], str]:
    """The set's prompts and responses, and how they were read; `rows` as in `read`."""
    if source := _source(config.path):
        examples, notes = _packaged(config.path, source.texts), []
    else:
        examples, notes = _collect(config, ("text",), rows)
    examples = examples[: config.limit]
    shown = [f"{name}: {_short(text)}" for name, text in (("prompt", examples[0].prompt), ("response", examples[0].response))]
    return examples, "\n  ".join([f"texts: {len(examples):,}", *notes, *shown])


def _told(questions: list[Question], notes: list[str]) -> str:
    """How a set was read, in a few lines of at most `WIDE` columns, however long its texts are."""
    n, count = len(questions), sorted({len(q.options) for q in questions})
    keys = Counter(LETTERS[q.answer] for q in questions)
    lines = ["keys " + ", ".join(f"{key} {100 * keys[key] / n:.0f} %" for key in LETTERS[: count[-1]])]
    asked: dict[tuple, list[str]] = {}  # the same words and options, in whatever order: the texts of their keys
    for q in questions:
        asked.setdefault((q.question, tuple(sorted(q.options))), []).append(q.options[q.answer])
    if again := n - len(asked):
        differ = sum(len(set(texts)) > 1 for texts in asked.values())
        lines.append(f"repeats of an earlier question: {again:,}; questions with more than one key: {differ:,}")
    if both := sum(any(o.upper() == LETTERS[q.answer] for i, o in enumerate(q.options) if i != q.answer) for q in questions):
        lines.append(f"keys that are also the text of another option: {both:,}, taken as letters")
    first, reasons = questions[0], [q.rationale for q in questions if q.rationale is not None]
    options = [f"{letter}. {' '.join(option.split())}" for letter, option in zip(LETTERS, first.options, strict=False)]
    if len("  ".join(options)) > WIDE - 4:
        share = (WIDE - 2) // len(options) - 2
        options = [option if len(option) <= share else f"{option[: share - 1]}…" for option in options]
    lines += [*notes, f"first: {first.question}", "  " + "  ".join(options), f"  its key: {LETTERS[first.answer]}"]
    lines.append(f"rationales: {len(reasons):,}" + (f", the first: {reasons[0]}" if reasons else ""))
    sizes = f"{count[0]} to {count[-1]}" if len(count) > 1 else count[0]
    return "\n  ".join([f"questions: {n:,}, of {sizes} options", *map(_short, lines)])


def _short(text: str) -> str:
    """On one line of the console, from its column 2 on; of a longer one the beginning and the end."""
    line = text[: len(text) - len(text.lstrip())] + "  ".join(" ".join(part.split()) for part in text.split("  ") if part)
    return line if len(line) <= WIDE - 2 else f"{line[: WIDE - 35]} … {line[-30:]}"


def batch_at(n: int, step: int, size: int, seed: int, in_order: bool = False) -> np.ndarray:
    """The `size` of `n` questions that step `step` takes, int64 [size]: a pure function, so a resumed run is the same run.

    Each epoch of n // size steps walks through its own permutation, keyed by (seed, epoch); the tail that does not fill a batch is left
    out, other questions each epoch. `in_order`: what is left comes as it stands. Sorted raw Philox words, not `Generator.permutation`:
    NumPy keeps only the raw stream across releases.
    """
    if size > n:
        raise DataError(f"a batch of {size} questions cannot be drawn from {n} without repeats; set sample.questions to {n} or less")
    epoch, i = divmod(step, n // size)
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    taken = np.argsort(words, kind="stable")[: n // size * size]
    return (np.sort(taken) if in_order else taken)[i * size : (i + 1) * size]


def step_batch(config: Config, n: int, step: int) -> np.ndarray:
    """`batch_at` of a run over n questions."""
    in_order = config.data.pass_count is not None and config.data.pass_count.order is not None
    return batch_at(n, step, config.sample.questions, config.seed, in_order)


def repeats(questions: list[Question]) -> dict[str, str]:
    """The ids of questions that exactly repeat an earlier one, and that one's: 95 of MMLU-Pro Health's official 818."""
    first: dict[tuple, str] = {}
    return {q.id: first[asked] for q in questions if first.setdefault(asked := (q.question, q.options, q.answer), q.id) != q.id}


def _by_pass_count(questions: list[Question], config: PassCountConfig) -> list[Question]:
    """The questions that `keep` takes, in `order`. Those that `medrlvr difficulty` could not ask, for their length, are left out."""
    path = Path(config.file).expanduser()
    if not path.is_file():
        raise DataError(f"pass_count.file {config.file!r}: no such file; `medrlvr difficulty` writes one")
    right: dict[str, int | None] = {}
    score: dict[str, float] = {}
    by = config.order if config.order in ("variance", "impact") else "right"
    for number, row in jsonl(path):
        if isinstance(row, DataError) or not isinstance(row.get("id"), str) or type(row.get("right")) not in (int, type(None)):
            raise DataError(
                f'{path}, line {number}: a line such as {{"id": "train-1", "right": 3}} is needed, as `medrlvr difficulty` writes'
            )
        right[row["id"]] = row.get("right")
        if type(row.get(by)) not in (int, float) and row.get("right") is not None:
            raise DataError(
                f"{path}, line {number}: no number {by!r} in it, by which pass_count.order goes; `medrlvr difficulty --history` writes one"
            )
        score[row["id"]] = row.get(by) or 0.0
    missing = [q.id for q in questions if q.id not in right]
    if missing:
        what = f"{len(missing)} of {len(questions)} questions have no count there, the first is {missing[0]!r}"
        raise DataError(f"pass_count.file {config.file!r}: {what}; run `medrlvr difficulty` on this very set, to its end")
    low, high = config.keep or (0, max((n for n in right.values() if n is not None), default=0))
    counts = {q.id: n for q in questions if (n := right[q.id]) is not None and low <= n <= high}
    if not counts:
        raise DataError(f"pass_count.keep: no question has {low} to {high} right samples by {config.file}; widen it")
    kept, sign = [q for q in questions if q.id in counts], {None: 0, "hard_first": 1}.get(config.order, -1)  # the others: most first
    return sorted(kept, key=lambda q: sign * score[q.id])[: config.top]


def _source(path: str) -> Source | None:
    """The source that is named before the colon of `path`, as in embedded:train."""
    name, colon, _ = path.partition(":")
    return SOURCES.get(name) if colon else None


def _packaged(path: str, sets: Mapping[str, Callable[[], list[Any]]]) -> list[Any]:
    source, _, name = path.partition(":")
    if name not in sets:
        raise DataError(f"path {path!r}: there is no such {source} set here; take {' or '.join(f'{source}:{n}' for n in sets)}")
    return sets[name]()


def _collect(config: SetConfig, allowed: tuple[str, ...], records: Records | None = None) -> tuple[list[Any], list[str]]:
    """Read and check every record; raise all complaints (the first ten) together. Also notes on how they were read."""
    unit, rows = _open(config) if records is None else ("row", _given(records))
    stem = "-".join(filter(None, (Path(config.path).stem, config.subset, config.split))) if records is None else "row"
    name, items, complaints, numbers = config.format, [], [], {}
    fields: dict[str, None] = {}
    labelled = counted = kept = 0
    for number, row in rows:
        where = f"{config.path}, {unit} {number}"
        if name == "auto" and isinstance(row, Question | Example):
            name = "plain" if isinstance(row, Question) else "text"
        if name == "auto" and isinstance(row, dict):
            name = detect(row, where)
        if name not in (*allowed, "auto"):
            use = "it is for fine-tuning with sft.target text" if name == "text" else "give prompt and response, or text"
            raise DataError(f"{where}: format {name}, where {' or '.join(allowed)} is needed: {use}")
        try:
            if isinstance(row, DataError):
                raise row
            form = FORMATS[name]
            if isinstance(row, dict):
                item = form.parse(row, f"{stem}-{number}")
                fields |= dict.fromkeys(row)
            else:
                item = checked(row, f"{stem}-{number}", Example if name == "text" else Question)
            if isinstance(item, Question):
                if numbers.setdefault(item.id, number) != number:
                    raise DataError(f"id {item.id!r} is already that of {unit} {numbers[item.id]}; give each its own, or none")
                options = unlabelled(item.options)
                labelled += options != item.options
                kept += options == item.options and brings_letters(options)
                counted += form.counted is not None and isinstance(row, dict) and not str(row[form.counted[0]]).strip().isalpha()
                item = dataclasses.replace(item, options=options)
            items.append(item)
        except DataError as e:
            alike = config.format != "auto" or not isinstance(row, dict) or any(way <= row.keys() for way in FORMATS[name].ways)
            complaints.append(f"{where}: {e}" + ("" if alike else f"; format {name} was told by the first record alone"))
            if len(complaints) == MAX_COMPLAINTS:
                complaints.append("(there may be more: reading stopped here)")
                break
    if not items and complaints and (other := files.what_else(Path(config.path).expanduser())):
        raise DataError(f"{config.path}: {other}")
    if complaints or not items:
        raise DataError("\n".join(complaints) or f"{config.path}: there is not one record in it")
    unread = [f for f in fields if f not in FORMATS[name].also and not any(f in way for way in FORMATS[name].ways)]
    notes = [f"format {name}" + (f"; not read: {', '.join(map(str, unread))}" if unread else "")]
    if counted:
        field, first = FORMATS[name].counted or ("", 0)
        notes.append(f"keys that are numbers in {field}: {counted:,}, taken as counted from {first}")
    if labelled:
        notes.append(f'questions whose options bring letters ("A. …"): {labelled:,}, taken off')
    if kept:
        notes.append(f"questions with letters on some options: {kept:,}, kept, and never shuffled")
    subjects = {q.subject for q in items} if name == "mmlu_pro" else set()
    # On the hub MMLU-Pro is one set of fourteen categories, of which Health is the paper's; a file cut to other categories is kept whole.
    if len(subjects) > 1 and "health" in subjects:
        items = [q for q in items if q.subject == "health"]
        notes.append(f"of {len(subjects)} categories, health alone is kept")
    return items, notes


# ---- reading: each reader yields (line or row number, the record's fields or what is wrong with it) ----

Rows = Iterator[tuple[int, dict[str, Any] | DataError]]


def _open(config: SetConfig) -> tuple[str, Rows]:
    """(what the records are counted in, the records)."""
    if config.path == PYTHON:
        remedy = "give them again, as train(config, data=rows), or set path to a file"
        raise DataError(f"path {PYTHON!r}: these rows were given in Python, and no file holds them; {remedy}")
    path = Path(config.path).expanduser()
    if path.suffix in READERS and path.is_file():
        unit, reader = READERS[path.suffix]
        with files.reading(path, "make it readable for this user", DataError):
            path.open("rb").close()
        return unit, reader(path)
    local = path.suffix in READERS or config.path.startswith(("/", "./", "../", "~")) or config.path.count("/") > 1
    if local or path.exists():
        what = "no such file" if not path.exists() else "a folder" if path.is_dir() else "a file of another kind"
        raise DataError(f"path {config.path!r}: {what}; give a {' '.join(READERS)} file, a hub name or embedded:train")
    return "row", _hub(config)


def _given(records: Records) -> Iterator[tuple[int, dict[str, Any] | Question | Example | DataError]]:
    """What was given in Python."""
    if (features := getattr(records, "features", None)) is not None:
        yield from _labelled(records, features)
        return
    for number, row in enumerate(records, 1):
        if isinstance(row, Question | Example):
            yield number, row
        else:
            yield number, dict(row) if isinstance(row, Mapping) else DataError(f"{reprlib.repr(row)}: a Question or a dict is needed")


def jsonl(path: Path) -> Rows:
    """One record a line; or, where the first line begins a list or an object that goes on, what `_json` reads."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if not (text := line.removeprefix(BOM).strip()):
                continue
            if text[:1] == b"[" or text == b"{":
                tree = _decode(path.read_bytes().removeprefix(BOM))
                if isinstance(tree, dict) or (isinstance(tree, list) and all(isinstance(row, dict) for row in tree)):
                    yield from _records(tree)
                    return
            yield from _lines(file, line, number)
            return


def _lines(file: BinaryIO, line: bytes, number: int) -> Rows:
    """The records from `line` on, the `number`th of the file."""
    while line:
        if len(line) > MAX_LINE:
            yield number, DataError(f"longer than {MAX_LINE >> 20} MiB: this is not a question; is the file JSONL, one record a line?")
            return
        if line.removeprefix(BOM).strip():
            yield number, _record(_decode(line.removeprefix(BOM)))
        line, number = file.readline(MAX_LINE + 1), number + 1


def _json(path: Path) -> Rows:
    """A list of records, or records by id (PubMedQA); or one record a line, as in .jsonl."""
    text = path.read_bytes().removeprefix(BOM)
    tree = _decode(text)
    if isinstance(tree, DataError):
        first, _, rest = text.strip().partition(b"\n")
        if rest and isinstance(_decode(first), dict):
            yield from jsonl(path)
            return
    yield from _records(tree)


def _records(tree: Any) -> Rows:
    if isinstance(tree, dict) and tree and all(isinstance(value, dict) for value in tree.values()):
        tree = [{"id": key} | value for key, value in tree.items()]
    yield from enumerate(map(_record, tree if isinstance(tree, list) else [tree]), 1)


def _csv(path: Path) -> Rows:
    """With a header (columns A, B, … are the options) or, as MMLU has it, without: question, A, B, C, D, letter.

    Cells are parted by commas, semicolons or tabs, whichever makes sense of the first record. A column without a name is left out: it is
    the row's number, which pandas writes unless told not to.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, line = None, 1
        subject = path.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val").replace("_", " ")
        try:
            delimiter = _delimiter(file)
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            for cells in reader:
                start, line = line, reader.line_num + 1  # a quoted cell may span lines: a record is named by its first
                if start == 1 and _is_header(cells):
                    header = [cell.strip() for cell in cells]
                    if twice := [name for name, times in Counter(filter(None, header)).items() if times > 1]:
                        yield start, DataError(f"column {twice[0]!r} is there twice; take one out")
                        return
                elif header and len(cells) == len(header):
                    yield start, _gathered({name: cell for name, cell in zip(header, cells, strict=True) if name and cell})
                elif header and cells:
                    yield start, DataError(f"{len(cells)} cells under a header of {len(header)}; quote cells that hold {delimiter!r}")
                elif len(cells) == 6:
                    yield start, {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}
                elif cells:
                    yield start, DataError(f"{len(cells)} cells; without a header there are six: question, A, B, C, D, letter")
        except (csv.Error, UnicodeDecodeError) as e:
            yield line, DataError(f"not CSV in UTF-8: {e}")


def _is_header(cells: list[str]) -> bool:
    names = {cell.strip() for cell in cells}
    return not names.isdisjoint(("response", "text", "completion")) or "question" in {name.lower() for name in names}


def _delimiter(file: TextIO) -> str:
    """That which parts the first record into a header or six cells; a comma where none does. The file is read from its start again."""
    for delimiter in ",;\t":
        cells = next(csv.reader(file, strict=True, delimiter=delimiter), [])
        file.seek(0)
        if len(cells) > 1 and (_is_header(cells) or len(cells) == 6):
            return delimiter
    return ","


def _gathered(row: dict[str, Any]) -> dict[str, Any]:
    """The columns A, B, … as `options`, in place of them."""
    options = {letter: row[letter] for letter in LETTERS if letter in row}
    return {"options": options} | {name: cell for name, cell in row.items() if name not in options} if options else row


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet
    from datasets import Features

    with files.reading(path, "it may be no parquet file, or a broken one: write it again", DataError):
        table = pyarrow.parquet.read_table(path)
        rows, features = table.to_pylist(), Features.from_arrow_schema(table.schema)
    yield from _labelled(rows, features)


READERS = {
    ".jsonl": ("line", jsonl),
    ".json": ("record", _json),
    ".csv": ("line", _csv),
    ".tsv": ("line", _csv),
    ".parquet": ("row", _parquet),
}


def _hub(config: SetConfig) -> Rows:
    import datasets  # takes seconds: only for those who use it

    asked = f"path {config.path!r}, subset {config.subset!r}, split {config.split!r}"
    with files.reading(asked, "neither a file here nor a data set that the hub gave: mend the name, or give a file", DataError):
        found = datasets.load_dataset(config.path, config.subset, split=config.split)
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"{asked}: set split to one of {', '.join(map(str, found))}")
    yield from _labelled(found, found.features)


def _labelled(rows: Any, features: Any) -> Rows:
    """Class labels become their names, so that no parser need know from which number a set counts: MedMCQA's cop is `a`, not 0 (or 1)."""
    names = {field: feature.names for field, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    for number, row in enumerate(rows, 1):
        labels = {f: n[row[f]] if row[f] is not None and 0 <= row[f] < len(n) else None for f, n in names.items()}  # -1: no label
        yield number, row | labels


def _decode(text: bytes) -> Any:
    """JSON, or a DataError (returned, not raised: the reader goes on to the next line)."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except DataError as e:
        return e
    except UnicodeDecodeError as e:
        return DataError(f"byte {e.start + 1} is not UTF-8; save the file as UTF-8")
    except ValueError as e:  # json.JSONDecodeError, and integers of more digits than Python reads
        return DataError(f"not JSON: {e}")
    except RecursionError:
        return DataError("not JSON of a question: brackets nested too deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON objects with a field given twice are refused: Python would silently keep the last."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"field {reprlib.repr(max(names, key=names.count))} is given twice")
    return dict(pairs)


def _record(value: Any) -> dict[str, Any] | DataError:
    return value if isinstance(value, dict | DataError) else DataError(f"{reprlib.repr(value)}: a record is an object with fields")


def question_hash(question: Question) -> str:
    """16 hexadecimal digits of what is asked: stem, options in the file's order, key. The id and the order shown do not count."""
    options, answer = list(question.options), question.answer
    if question.order:
        options = [options[question.order.index(letter)] for letter in LETTERS[: len(options)]]
        answer = LETTERS.index(question.order[answer])
    text = json.dumps([question.question, options, answer], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprint(rows: Iterable[Any]) -> dict[str, Any]:
    """`{"n", "sha256"}` of rows, questions or whatever JSON can hold, in their order: what a run says of the data that it used."""
    digest, n = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(to_jsonable_python(row), ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
        n += 1
    return {"n": n, "sha256": digest.hexdigest()}

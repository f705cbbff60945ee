"""Multiple-choice questions from files and the hub, checked line by line, and which of them step `step` takes.

A `SetConfig.path` is a local file (.jsonl .json .csv .parquet), `embedded:NAME`, or the name of a data set on the hub. The format is
told by the first record's fields, or set by `format`; formats.py has them.

Everything is read before anything is used, and up to ten complaints are raised at once, each naming its line.
"""

import csv
import hashlib
import itertools
import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from medrlvr_jax import world
from medrlvr_jax.config import Config, PassCountConfig, SetConfig
from medrlvr_jax.formats import FORMATS, LETTERS, DataError, Example, Question, detect

MAX_LINE = 16 * 2**20  # bytes: beyond any question, so it is some other kind of file
MAX_COMPLAINTS = 10
BOM = b"\xef\xbb\xbf"  # the mark that Windows programs put in front of UTF-8


def load(config: SetConfig) -> list[Question]:
    """The set's questions in their order; formats as in formats.py."""
    if config.path.startswith("embedded:"):
        name = _embedded(config.path, ("train", "in_distribution", "out_of_distribution", "leaking"))
        questions = world.leaking() if name == "leaking" else world.questions(name)
    else:
        questions = _collect(config, ("plain", "medqa", "mmlu_pro", "mmlu", "medmcqa", "pubmedqa"))
    questions = questions[: config.limit]
    return _by_pass_count(questions, config.pass_count) if config.pass_count else questions


def load_text(config: SetConfig) -> list[Example]:
    """The set's prompts and responses, format `text`."""
    if config.path.startswith("embedded:"):
        return {"corpus": world.corpus, "lists": world.lists}[_embedded(config.path, ("corpus", "lists"))]()[: config.limit]
    return _collect(config, ("text",))[: config.limit]


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
    for number, row in _jsonl(path):
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


def _embedded(path: str, names: tuple[str, ...]) -> str:
    name = path.removeprefix("embedded:")
    if name not in names:
        raise DataError(f"path {path!r}: there is no such embedded set here; take {' or '.join('embedded:' + n for n in names)}")
    return name


def _collect(config: SetConfig, allowed: tuple[str, ...]) -> list[Any]:
    """Read and check every record; raise all complaints (the first ten) together."""
    unit, rows = _open(config)
    stem = "-".join(filter(None, (Path(config.path).stem, config.subset, config.split)))
    form, items, complaints, numbers = config.format, [], [], {}
    for number, row in rows:
        where = f"{config.path}, {unit} {number}"
        if form == "auto" and isinstance(row, dict):
            form = detect(row, where)
        if form not in (*allowed, "auto"):
            use = "it is for fine-tuning with sft.target text" if form == "text" else "give prompt and response, or text"
            raise DataError(f"{where}: format {form}, where {' or '.join(allowed)} is needed: {use}")
        try:
            if isinstance(row, DataError):
                raise row
            item = FORMATS[form][0](row, f"{stem}-{number}")
            if isinstance(item, Question) and numbers.setdefault(item.id, number) != number:
                raise DataError(f"id {item.id!r} is already that of {unit} {numbers[item.id]}; give each its own, or none")
            items.append(item)
        except DataError as e:
            complaints.append(f"{where}: {e}")
            if len(complaints) == MAX_COMPLAINTS:
                complaints.append("(there may be more: reading stopped here)")
                break
    if complaints or not items:
        raise DataError("\n".join(complaints) or f"{config.path}: there is not one record in it")
    subjects = {q.subject for q in items} if form == "mmlu_pro" else set()
    # On the hub MMLU-Pro is one set of fourteen categories, of which Health is the paper's; a file cut to other categories is kept whole.
    return [q for q in items if q.subject == "health"] if len(subjects) > 1 and "health" in subjects else items


# ---- reading: each reader yields (line or row number, the record's fields or what is wrong with it) ----

Rows = Iterator[tuple[int, dict[str, Any] | DataError]]


def _open(config: SetConfig) -> tuple[str, Rows]:
    """(what the records are counted in, the records)."""
    path = Path(config.path).expanduser()
    if path.suffix in READERS and path.is_file():
        unit, reader = READERS[path.suffix]
        return unit, reader(path)
    local = path.suffix in READERS or config.path.startswith(("/", "./", "../", "~")) or config.path.count("/") > 1
    if local or path.exists():
        what = "no such file" if not path.exists() else "a folder" if path.is_dir() else "a file of another kind"
        raise DataError(f"path {config.path!r}: {what}; give a {' '.join(READERS)} file, a hub name or embedded:train")
    return "row", _hub(config)


def _jsonl(path: Path) -> Rows:
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                yield number, DataError(f"longer than {MAX_LINE >> 20} MiB: this is not a question; is the file JSONL, one record a line?")
                return
            if line.strip():
                yield number, _record(_decode(line.removeprefix(BOM)))


def _json(path: Path) -> Rows:
    """A list of records, or records by id (PubMedQA)."""
    tree = _decode(path.read_bytes().removeprefix(BOM))
    if isinstance(tree, dict) and tree and all(isinstance(value, dict) for value in tree.values()):
        tree = [{"id": key} | value for key, value in tree.items()]
    yield from enumerate(map(_record, tree if isinstance(tree, list) else [tree]), 1)


def _csv(path: Path) -> Rows:
    """With a header (columns A, B, … are the options) or, as MMLU has it, without: question, A, B, C, D, letter."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header, line = None, 1
        subject = path.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val").replace("_", " ")
        try:
            for cells in reader:
                start, line = line, reader.line_num + 1  # a quoted cell may span lines: a record is named by its first
                if start == 1 and not {"question", "response", "text"}.isdisjoint(cells):
                    header = cells
                elif header and len(cells) == len(header):
                    yield start, _gathered({name: cell for name, cell in zip(header, cells, strict=True) if cell})
                elif header and cells:
                    yield start, DataError(f"{len(cells)} cells under a header of {len(header)}; quote cells that hold commas")
                elif len(cells) == 6:
                    yield start, {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}
                elif cells:
                    yield start, DataError(f"{len(cells)} cells; without a header there are six: question, A, B, C, D, letter")
        except (csv.Error, UnicodeDecodeError) as e:
            yield line, DataError(f"not CSV in UTF-8: {e}")


def _gathered(row: dict[str, Any]) -> dict[str, Any]:
    options = {letter: row[letter] for letter in LETTERS if letter in row}
    return {"options": options} | row if options else row


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet
    from datasets import Features

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as e:
        raise DataError(f"{path}: not a parquet file: {e}") from e
    yield from _labelled(table.to_pylist(), Features.from_arrow_schema(table.schema))


READERS = {".jsonl": ("line", _jsonl), ".json": ("record", _json), ".csv": ("line", _csv), ".parquet": ("row", _parquet)}


def _hub(config: SetConfig) -> Rows:
    import datasets  # takes seconds: only for those who use it
    from datasets.exceptions import DatasetsError

    asked = f"path {config.path!r}, subset {config.subset!r}, split {config.split!r}"
    try:
        found = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, DatasetsError) as e:
        raise DataError(f"{asked}: neither a file here nor a data set that the hub gave: {e}") from e
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

"""A set of questions (or of texts): every record read and checked, and a report of how it was read.

`SetConfig.path` is a local file (.jsonl .json .csv .tsv .xlsx .parquet), `embedded:NAME`, or the name of a
set on the hub. The first record's fields tell the format, or `format` sets it; formats.py has the formats.

The whole set is checked before any of it is used, and up to ten errors are raised at once, each with its
line. What could be read in more than one way is reported: `read` returns a few lines for the console.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from reprlib import repr as short
from typing import Any

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.data import batches, formats, published
from medrlvr_jax.data.fields import Choice
from medrlvr_jax.data.question import DataError, Example, Question, brings_letters, unlabelled
from medrlvr_jax.data.readers import PYTHON, Records, given_records, open_records
from medrlvr_jax.data.values import KINDS
from medrlvr_jax.host import files

MAX_ERRORS = 10
WIDTH = 80  # columns of a console
SHORTEST = 24  # characters that are shown of an option, if it has more


def given(spec: SetConfig, data: Records | str | Path | None) -> tuple[SetConfig, Records | None]:
    """`spec` for what a caller gave in Python: None, a path, or records, which are returned beside it."""
    if data is None:
        return spec, None
    if isinstance(data, str | Path):
        return dataclasses.replace(spec, path=str(data)), None
    return dataclasses.replace(spec, path=PYTHON), data


def load(config: SetConfig) -> list[Question]:
    """The set's questions in their order."""
    return read(config)[0]


def read(config: SetConfig, records: Records | None = None) -> tuple[list[Question], str]:
    """The set's questions in their order, and the report: counts, keys, repeats, the first question.

    `records` replace what `config.path` names.
    """
    questions, notes = _read(config, [name for name in formats.FORMATS if name != "text"], records)
    if config.pass_count:
        questions = batches.select(questions, config.pass_count)
    return questions, _report(questions, notes)


def read_text(config: SetConfig, records: Records | None = None) -> tuple[list[Example], str]:
    """The set's prompts and responses (format `text`), and the report; `records` as in `read`."""
    examples, notes = _read(config, ["text"], records)
    first = [f"prompt: {examples[0].prompt}", f"response: {examples[0].response}"]
    return examples, "\n  ".join([f"texts: {len(examples):,}", *notes, *map(_shorten, first)])


def _read(config: SetConfig, allowed: list[str], records: Records | None) -> tuple[list[Any], list[str]]:
    source, colon, name = config.path.partition(":")
    if not colon or source not in SOURCES:
        items, notes = _collect(config, allowed, records)
        return items[: config.limit], notes
    if renamed := next((s for s in published.PARTS if getattr(config, s)), None):
        raise DataError(f"{renamed}: {config.path} has no records whose fields could be meant; take it out")
    sets = SOURCES[source].texts if allowed == ["text"] else SOURCES[source].questions
    if name not in sets:
        names = " or ".join(f"{source}:{known}" for known in sets)
        raise DataError(f"path {config.path!r}: there is no such {source} set here; take {names}")
    return sets[name]()[: config.limit], []


class Collected:
    """The items of a set as they are read, the complaints about others, and how they were read."""

    def __init__(self, config: SetConfig, unit: str, stem: str):
        self.config, self.unit, self.stem, self.name = config, unit, stem, config.format
        self.items: list[Any] = []
        self.errors: list[str] = []
        self.lines: dict[str, int] = {}  # by id
        self.fields: dict[str, None] = {}
        self.tally = Counter[str]()

    def add(self, number: int, row: Any, allowed: list[str]) -> None:
        """Check one row, by the format that the first row tells if the setting is `auto`."""
        where = f"{self.config.path}, {self.unit} {number}"
        self.name = _format(self.name, row, where, allowed)
        try:
            item = _item(row, self.name, f"{self.stem}-{number}")
            if isinstance(item, Question):
                if self.lines.setdefault(item.id, number) != number:
                    problem = f"id {item.id!r} is already that of {self.unit} {self.lines[item.id]}"
                    raise DataError(f"{problem}; give each its own, or none")
                item = _without_letters(item, self.tally)
            item = _beside(item, self.config)
        except DataError as e:
            auto = self.config.format == "auto" and isinstance(row, dict)
            unlike = auto and not formats.fits(row, self.name)
            note = f"; format {self.name} was told by the first record alone" * unlike
            self.errors.append(f"{where}: {e}{note}")
            return
        self.items.append(item)
        if isinstance(row, dict):
            self.fields |= dict.fromkeys(row)
            number_field = formats.FORMATS[self.name].number
            self.tally["numbers"] += bool(number_field) and not str(row[number_field[0]]).strip().isalpha()


def _collect(config: SetConfig, allowed: list[str], records: Records | None) -> tuple[list[Any], list[str]]:
    """Read and check every record; raise the first ten errors together. Also notes on how they were read."""
    known_as, config = config.format, published.resolved(config)
    if records is None:
        unit, rows, revision = open_records(config)
        stem = "-".join(filter(None, (Path(config.path).stem, config.subset, config.split)))
    else:
        unit, rows, revision, stem = "row", given_records(records), None, "row"
    read, choice = Collected(config, unit, stem), Choice(config)
    for number, row in choice.records(rows):
        read.add(number, row, allowed)
        if len(read.errors) == MAX_ERRORS and config.on_bad == "refuse":
            read.errors.append("(there may be more: reading stopped here)")
            break
    if not read.items and read.errors and (damage := files.diagnose(Path(config.path).expanduser())):
        raise DataError(f"{config.path}: {damage}")
    if read.errors and (config.on_bad == "refuse" or not read.items):
        raise DataError("\n".join(read.errors[: MAX_ERRORS + 1]))
    if not read.items:
        why = choice.nothing() if choice.left_out else "there is not one record in it"
        raise DataError(f"{config.path}: {why}")
    notes = [f"revision {revision}"] if revision else []
    unread = [field for field in formats.unread(read.fields, read.name) if field not in choice.read]
    notes += _notes(read.name, unread, read.tally)
    if known_as in published.SETS:
        notes.insert(0, f"published set {known_as}, as data/published.py reads it")
    if choice.left_out:
        notes.append(f"records that where leaves out: {choice.left_out:,}")
    if read.errors:
        first = read.errors[0].removeprefix(f"{config.path}, ")
        notes += [f"skipped, since they cannot be read: {len(read.errors):,}", f"the first skipped: {first}"]
    items = read.items
    # On the hub MMLU-Pro is one set of 14 categories, of which the paper uses Health.
    categories = {q.subject for q in items} if read.name == "mmlu_pro" else set()
    if len(categories) > 1 and "health" in categories:
        items = [q for q in items if q.subject == "health"]
        notes.append(f"of {len(categories)} categories, only health is used")
    return items, notes


def _format(name: str, row: Any, where: str, allowed: list[str]) -> str:
    """The set's format, which `auto` takes from the first row; checked against those that are allowed."""
    if name == "auto" and isinstance(row, dict):
        name = formats.detect(row, where)
    elif name == "auto" and isinstance(row, Question | Example):
        name = "plain" if isinstance(row, Question) else "text"
    if name not in (*allowed, "auto"):
        remedy = "give prompt and response, or text"
        if name == "text":
            remedy = "it is for fine-tuning with sft.target text"
        raise DataError(f"{where}: format {name}, where {' or '.join(allowed)} is needed: {remedy}")
    return name


def _beside(question: Question | Example, config: SetConfig) -> Question | Example:
    """The question or text with its images' paths from here, which a file gives from its own folder on."""
    if not question.images:
        return question
    path = Path(config.path).expanduser()
    folder = (path.parent if path.is_file() else Path()) / Path(config.image_folder or "").expanduser()
    paths = (s if isinstance(s, bytes) else str(folder / Path(s).expanduser()) for s in question.images)
    return dataclasses.replace(question, images=tuple(paths))


def _item(row: Any, name: str, default_id: str) -> Question | Example:
    """The checked item of one row; `name` is the format."""
    if isinstance(row, DataError):
        raise row
    if isinstance(row, dict):
        return formats.parse(row, name, default_id)
    if isinstance(row, Question) and name != "text":
        return formats.check_question(row, default_id)
    if isinstance(row, Example) and name == "text":
        return formats.parse_example(vars(row))
    kind = "Example" if name == "text" else "Question"
    raise DataError(f"{short(row)}: the rows before it are of the kind {kind}; give only one kind")


def _without_letters(question: Question, tally: Counter[str]) -> Question:
    """The question without letters that its options bring; `tally` counts what was removed and what kept."""
    options = unlabelled(question.options)
    tally["removed"] += options != question.options
    tally["kept"] += options == question.options and brings_letters(options)
    return question if options == question.options else dataclasses.replace(question, options=options)


def _notes(name: str, unread: list[str], tally: Counter[str]) -> list[str]:
    notes = [f"format {name}" + (f"; not read: {', '.join(map(str, unread))}" if unread else "")]
    if tally["numbers"]:
        field, first = formats.FORMATS[name].number or ("", 0)
        notes.append(f"keys that are numbers in {field}: {tally['numbers']:,}, taken as counted from {first}")
    if tally["removed"]:
        notes.append(f'questions whose options bring letters ("A. …"): {tally["removed"]:,}, removed')
    if tally["kept"]:
        notes.append(f"questions with letters on some options: {tally['kept']:,}, kept, and never shuffled")
    return notes


def _report(questions: list[Question], notes: list[str]) -> str:
    """How a set was read, in a few lines of at most `WIDTH` columns, however long its texts are."""
    n, sizes, first = len(questions), sorted({len(q.options) for q in questions}), questions[0]
    size = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    size = f"of {size} options" if sizes[-1] else "open"
    shares = Counter(q.reference if q.value is None else q.kind for q in questions)
    kinds = [kind for kind in ("choices", *KINDS) if kind in shares]
    names = [*max(q.letters for q in questions), *kinds]
    mark, end = (", %: ", "") if len(names) > 6 else (" ", " %")
    lines = [f"keys{mark}" + ", ".join(f"{name} {100 * shares[name] / n:.0f}{end}" for name in names)]
    right_texts: dict[tuple, set[str]] = {}  # by question, images and options in any order
    for q in questions:
        right_texts.setdefault((q.question, q.images, *sorted(q.options)), set()).add(q.right_text)
    if again := n - len(right_texts):
        differ = f"{sum(len(texts) > 1 for texts in right_texts.values()):,}"
        lines.append(f"repeats of an earlier question: {again:,}; questions with more than one key: {differ}")
    others = ((q, q.options[: q.answer] + q.options[q.answer + 1 :]) for q in questions)
    if both := sum(q.reference in [option.upper() for option in options] for q, options in others):
        lines.append(f"keys that are also the text of another option: {both:,}, taken as letters")
    options = [" ".join(option.split()) for option in first.lettered]
    if len("  ".join(options)) > WIDTH - 4:
        share = max((WIDTH - 2) // len(options) - 2, SHORTEST)
        options = [option if len(option) <= share else f"{option[: share - 1]}…" for option in options]
    lines = [*map(_shorten, [*lines, *notes, f"first: {first.question}"])]
    lines += [f"  {line}" for line in _rows(options)]
    reasons = [q.rationale for q in questions if q.rationale is not None]
    reason = _shorten(f"rationales: {len(reasons):,}" + (f", the first: {reasons[0]}" if reasons else ""))
    lines = [f"questions: {n:,}, {size}", *lines, f"  its key: {first.reference}", reason]
    return "\n  ".join(lines)


def _rows(options: list[str]) -> list[str]:
    """The options side by side, in as many lines as they need."""
    rows: list[str] = []
    for option in options:
        if rows and len(rows[-1]) + len(option) + 2 <= WIDTH - 4:
            rows[-1] += f"  {option}"
        else:
            rows.append(option)
    return rows


def _shorten(text: str) -> str:
    """One line of the console, indented by 2; a longer text keeps its beginning and its end."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH - 2 else f"{line[: WIDTH - 35]} … {line[-30:]}"

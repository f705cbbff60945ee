"""A set of questions (or of texts): every record read and checked, and a report of how it was read.

`SetConfig.path` is a local file (.jsonl .json .csv .tsv .xlsx .parquet), `embedded:NAME`, or the name of a
set on the hub. The first record's fields tell the format, or `format` sets it; formats.py has the formats.

The whole set is checked before any of it is used, and up to ten errors are raised at once, each with its
line. What could be read in more than one way is reported: `read` returns a few lines for the console.
"""

import dataclasses
import textwrap
from collections import Counter
from pathlib import Path
from reprlib import repr as short
from typing import Any

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.data import batches, formats, published
from medrlvr_jax.data.fields import Choice
from medrlvr_jax.data.question import DataError, Example, Question, brings_letters, unlabelled
from medrlvr_jax.data.readers import PYTHON, Records, open_records
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
    questions, notes = _read(config, records, texts=False)
    if config.pass_count:
        questions = batches.select(questions, config.pass_count)
    return questions, _report(questions, notes)


def read_text(config: SetConfig, records: Records | None = None) -> tuple[list[Example], str]:
    """The set's prompts and responses (format `text`), and the report; `records` as in `read`."""
    examples, notes = _read(config, records, texts=True)
    first = [f"prompt: {examples[0].prompt}", f"response: {examples[0].response}"]
    return examples, "\n  ".join([f"texts: {len(examples):,}", *notes, *map(_shorten, first)])


def _read(config: SetConfig, records: Records | None, texts: bool) -> tuple[list[Any], list[str]]:
    """The items of a set, at most `limit`, and how they were read."""
    source, colon, name = config.path.partition(":")
    if not colon or source not in SOURCES:
        reading = Reading(config, records, texts)
        reading.run()
        return reading.used()[: config.limit], reading.notes
    if renamed := next((s for s in published.PARTS if getattr(config, s)), None):
        raise DataError(f"{renamed}: {config.path} has no records whose fields could be meant; take it out")
    sets = SOURCES[source].texts if texts else SOURCES[source].questions
    if name not in sets:
        names = " or ".join(f"{source}:{known}" for known in sets)
        raise DataError(f"path {config.path!r}: there is no such {source} set here; take {names}")
    return sets[name]()[: config.limit], []


class Reading:
    """The items of a set as its records are read, the complaints about others, and how they were read."""

    def __init__(self, config: SetConfig, records: Records | None, texts: bool):
        self.texts, self.config = texts, published.resolved(config)
        self.source, self.choice = open_records(self.config, records), Choice(self.config)
        self.format = self.config.format
        known = f"published set {config.format}, as data/published.py reads it"
        self.notes = [known] if config.format in published.SETS else []
        self.items: list[Any] = []
        self.errors: list[str] = []
        self.lines: dict[str, int] = {}  # by id
        self.fields: dict[str, None] = {}
        self.tally = Counter[str]()

    def run(self) -> None:
        """Read and check every record; raise the first ten errors together."""
        path, refuse = self.config.path, self.config.on_bad == "refuse"
        for number, row in self.choice.records(self.source.rows):
            self._add(number, row)
            if len(self.errors) == MAX_ERRORS and refuse:
                self.errors.append("(there may be more: reading stopped here)")
                break
        if not self.items and self.errors and (damage := files.diagnose(Path(path).expanduser())):
            raise DataError(f"{path}: {damage}")
        if self.errors and (refuse or not self.items):
            raise DataError("\n".join(self.errors[: MAX_ERRORS + 1]))
        if not self.items:
            why = self.choice.nothing() if self.choice.left_out else "there is not one record in it"
            raise DataError(f"{path}: {why}")

    def _add(self, number: int, row: Any) -> None:
        """Check one row, by the format that the first row tells if the setting is `auto`."""
        where = f"{self.config.path}, {self.source.unit} {number}"
        self.format = _format(self.format, row, where, self.texts)
        try:
            item = _item(row, self.format, f"{self.source.stem}-{number}")
            if isinstance(item, Question):
                if self.lines.setdefault(item.id, number) != number:
                    problem = f"id {item.id!r} is already that of {self.source.unit} {self.lines[item.id]}"
                    raise DataError(f"{problem}; give each its own, or none")
                item = _without_letters(item, self.tally)
            self.items.append(_beside(item, self.config))
        except DataError as e:
            auto = self.config.format == "auto" and isinstance(row, dict)
            unlike = auto and not formats.fits(row, self.format)
            note = f"; format {self.format} was told by the first record alone" * unlike
            self.errors.append(f"{where}: {e}{note}")
            return
        if isinstance(row, dict):
            self.fields |= dict.fromkeys(row)
            if number_field := formats.FORMATS[self.format].number:
                self.tally["numbers"] += not str(row[number_field[0]]).strip().isalpha()

    def used(self) -> list[Any]:
        """The items that are used; adds to `notes` how all were read."""
        form, tally = formats.FORMATS[self.format], self.tally
        unread = [field for field in self.fields if field not in form.fields | self.choice.read]
        notes = [f"revision {self.source.revision}"] if self.source.revision else []
        notes += [f"format {self.format}" + (f"; not read: {', '.join(map(str, unread))}" if unread else "")]
        if form.number and tally["numbers"]:
            field, first = form.number
            notes += [
                f"keys that are numbers in {field}: {tally['numbers']:,}, taken as counted from {first}"
            ]
        if tally["removed"]:
            notes += [f'questions whose options bring letters ("A. …"): {tally["removed"]:,}, removed']
        if tally["kept"]:
            notes += [f"questions with letters on some options: {tally['kept']:,}, kept, and never shuffled"]
        if self.choice.left_out:
            notes += [f"records that where leaves out: {self.choice.left_out:,}"]
        if self.errors:
            first = self.errors[0].removeprefix(f"{self.config.path}, ")
            notes += [
                f"skipped, since they cannot be read: {len(self.errors):,}",
                f"the first skipped: {first}",
            ]
        self.notes += notes
        # On the hub MMLU-Pro is one set of 14 categories, of which the paper uses Health.
        categories = {q.subject for q in self.items} if self.format == "mmlu_pro" else set()
        if len(categories) < 2 or "health" not in categories:
            return self.items
        self.notes.append(f"of {len(categories)} categories, only health is used")
        return [q for q in self.items if q.subject == "health"]


def _format(name: str, row: Any, where: str, texts: bool) -> str:
    """The set's format, which `auto` takes from the first row; checked against what is needed."""
    if name == "auto" and isinstance(row, dict):
        name = formats.detect(row, where)
    elif name == "auto" and isinstance(row, Question | Example):
        name = "plain" if isinstance(row, Question) else "text"
    if name != "auto" and (name == "text") != texts:
        needed, remedy = "text", "give prompt and response, or text"
        if not texts:
            needed = " or ".join(other for other in formats.FORMATS if other != "text")
            remedy = "it is for fine-tuning with sft.target text"
        raise DataError(f"{where}: format {name}, where {needed} is needed: {remedy}")
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
    """The options side by side, in as many lines as they need; a line breaks only between two."""
    line = "  ".join(option.replace(" ", "\xa0") for option in options)
    lines = textwrap.wrap(line, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _shorten(text: str) -> str:
    """One line of the console, indented by 2; a longer text keeps its beginning and its end."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH - 2 else f"{line[: WIDTH - 35]} … {line[-30:]}"

"""Read a set of questions (or of texts), check every record, and report how the set was read.

`SetConfig.path` is a local file (.jsonl .json .csv .tsv .xlsx .parquet), `embedded:NAME`, or the name of a
set on the hub. A record of a file or of the hub passes through these modules, in this order:

1. readers.py yields the record as a dict, with the number of its line.
2. fields.py applies the settings `where`, `patterns`, `fields` and `constants`.
3. formats.py turns it into a `Question`. record.py checks single fields, published.py knows published sets.
4. Here, ids must be unique, labels inside options are removed, and image paths start at the file's folder.

All records are checked before any is used. Up to ten errors are raised together, each with its line.
summary.py writes the report, which names every choice that was made between two readings.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from reprlib import repr as short
from typing import Any

from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.data import batches, formats, published
from medrlvr_jax.data.fields import FieldMapping
from medrlvr_jax.data.question import DataError, Example, Question, have_letters, strip_labels
from medrlvr_jax.data.readers import PYTHON, Records, open_records
from medrlvr_jax.data.summary import summarise, summarise_texts
from medrlvr_jax.host import files

MAX_ERRORS = 10


def resolve_data(spec: SetConfig, data: Records | str | Path | None) -> tuple[SetConfig, Records | None]:
    """Resolve the argument `data` of the Python API, which replaces `spec.path`: a path, records, or None.

    Returns the settings to read by, and the records if `data` holds them.
    """
    if data is None:
        return spec, None
    if isinstance(data, str | Path):
        return dataclasses.replace(spec, path=str(data)), None
    return dataclasses.replace(spec, path=PYTHON), data


def load(config: SetConfig) -> list[Question]:
    """Return the set's questions in their order."""
    return read(config)[0]


def read(config: SetConfig, records: Records | None = None) -> tuple[list[Question], str]:
    """Return the set's questions in their order, and the report. `records` replace what `path` names."""
    questions, notes = _read(config, records, texts=False)
    if config.pass_count:
        questions = batches.select(questions, config.pass_count)
    return questions, summarise(questions, notes)


def read_text(config: SetConfig, records: Records | None = None) -> tuple[list[Example], str]:
    """Return the set's prompts and responses (format `text`), and the report; `records` as in `read`."""
    examples, notes = _read(config, records, texts=True)
    return examples, summarise_texts(examples, notes)


def _read(config: SetConfig, records: Records | None, texts: bool) -> tuple[list[Any], list[str]]:
    """Return the first `limit` items of a set, and notes on how it was read."""
    source, colon, name = config.path.partition(":")
    if not colon or source not in SOURCES:
        reader = SetReader(config, records, texts)
        reader.read()
        items, notes = reader.used_items()
        return items[: config.limit], notes
    if setting := next((s for s in published.FIELD_SETTINGS if getattr(config, s)), None):
        raise DataError(f"{setting}: {config.path} has no records with fields; remove this setting")
    sets = SOURCES[source].texts if texts else SOURCES[source].questions
    if name not in sets:
        names = " or ".join(f"{source}:{known}" for known in sets)
        raise DataError(f"path {config.path!r}: there is no such {source} set here; use {names}")
    return sets[name]()[: config.limit], []


class SetReader:
    """Read and check the records of one set; collect items, errors and counts for the report."""

    def __init__(self, config: SetConfig, records: Records | None, texts: bool):
        self.texts, self.config = texts, published.resolve(config)
        self.source, self.mapping = open_records(self.config, records), FieldMapping(self.config)
        self.format = self.config.format
        self.published = config.format if config.format in published.SETS else None
        self.items: list[Any] = []
        self.errors: list[str] = []
        self.lines: dict[str, int] = {}  # the line of each id
        self.fields: dict[str, None] = {}  # all fields that records have
        self.counts = Counter[str]()

    def read(self) -> None:
        """Read every record. Raises `DataError` with the first ten errors, or if there is no item."""
        path, refuse = self.config.path, self.config.on_bad == "refuse"
        for number, row in self.mapping.apply(self.source.rows):
            self._add(number, row)
            if len(self.errors) == MAX_ERRORS and refuse:
                self.errors.append("(there may be more: reading stopped here)")
                break
        if not self.items and self.errors and (damage := files.diagnose(Path(path).expanduser())):
            raise DataError(f"{path}: {damage}")
        if self.errors and (refuse or not self.items):
            raise DataError("\n".join(self.errors[: MAX_ERRORS + 1]))
        if not self.items:
            why = self.mapping.explain_empty() if self.mapping.left_out else "it has no record"
            raise DataError(f"{path}: {why}")

    def _add(self, number: int, row: Any) -> None:
        """Check one row. If the setting `format` is `auto`, the first row decides the format."""
        where = f"{self.config.path}, {self.source.unit} {number}"
        self.format = _format_of(self.format, row, where, self.texts)
        try:
            self.items.append(self._item(number, row))
        except DataError as e:
            detected = self.config.format == "auto" and isinstance(row, dict)
            unlike = detected and not formats.has_fields(row, self.format)
            note = f"; the format {self.format} was detected from the first record only" * unlike
            self.errors.append(f"{where}: {e}{note}")
        else:
            self.fields |= dict.fromkeys(row if isinstance(row, dict) else ())

    def _item(self, number: int, row: Any) -> Question | Example:
        item = _parse(row, self.format, f"{self.source.stem}-{number}")
        if isinstance(item, Question):
            if (line := self.lines.setdefault(item.id, number)) != number:
                problem = f"id {item.id!r} is already that of {self.source.unit} {line}"
                raise DataError(f"{problem}; give each record its own, or none")
            if (options := strip_labels(item.options)) != item.options:
                self.counts["stripped"] += 1
                item = dataclasses.replace(item, options=options)
            else:
                self.counts["lettered"] += have_letters(options)
        return _with_image_paths(item, self.config)

    def used_items(self) -> tuple[list[Any], list[str]]:
        """Return the items, of MMLU-Pro only its category health, and notes on how all were read."""
        notes = self._notes()
        # On the hub MMLU-Pro is one set of 14 categories, of which the paper uses Health.
        categories = {q.subject for q in self.items} if self.format == "mmlu_pro" else set()
        if len(categories) < 2 or "health" not in categories:
            return self.items, notes
        notes.append(f"of {len(categories)} categories, only health is used")
        return [q for q in self.items if q.subject == "health"], notes

    def _notes(self) -> list[str]:
        read, counts = formats.FORMATS[self.format].fields | self.mapping.read, self.counts
        unread = [str(field) for field in self.fields if field not in read]
        notes = [f"published set {self.published}, as data/published.py reads it"] if self.published else []
        notes += [f"revision {self.source.revision}"] if self.source.revision else []
        notes += [f"format {self.format}" + (f"; not read: {', '.join(unread)}" if unread else "")]
        if n := counts["stripped"]:
            notes += [f'questions whose options have their own letters ("A. …"): {n:,}, removed']
        if n := counts["lettered"]:
            notes += [f"questions with letters on some options: {n:,}, kept, and never shuffled"]
        if n := self.mapping.left_out:
            notes += [f"records that where leaves out: {n:,}"]
        if self.errors:
            first_error = self.errors[0].removeprefix(f"{self.config.path}, ")
            notes += [f"records skipped, since they cannot be read: {len(self.errors):,}"]
            notes += [f"the first skipped: {first_error}"]
        return notes


def _format_of(name: str, row: Any, where: str, texts: bool) -> str:
    """Return the set's format; this row resolves `auto`. Raises `DataError` for questions in place of texts,
    or texts in place of questions.
    """
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


def _parse(row: Any, name: str, default_id: str) -> Question | Example:
    """Return the checked item of one row in the format `name`."""
    if isinstance(row, DataError):
        raise row
    if isinstance(row, dict):
        return formats.parse(row, name, default_id)
    if isinstance(row, Question) and name != "text":
        return formats.check_question(row, default_id)
    if isinstance(row, Example) and name == "text":
        return formats.parse_example(vars(row))
    kind = "Example" if name == "text" else "Question"
    raise DataError(f"{short(row)}: the rows before it are of the type {kind}; give only one type")


def _with_image_paths(item: Question | Example, config: SetConfig) -> Question | Example:
    """Make image paths relative to the working directory; files give them relative to their own folder."""
    if not item.images:
        return item
    path = Path(config.path).expanduser()
    folder = (path.parent if path.is_file() else Path()) / Path(config.image_folder or "").expanduser()
    images = (s if isinstance(s, bytes) else str(folder / Path(s).expanduser()) for s in item.images)
    return dataclasses.replace(item, images=tuple(images))

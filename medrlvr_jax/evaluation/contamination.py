"""Find test questions that the training set holds, exactly or nearly: `medrlvr contamination TRAIN TEST …`.

The stem is the question without its options, in lower-case words without punctuation or accents. A test
question is contaminated by a training question if one of two conditions holds:

    containment   more than `THRESHOLD` of the 8-grams of the shorter stem are in the longer stem
    same stem     both stems have the same words in the same order; this covers stems of fewer than 8 words

8-grams in more than 1 % of all stems ("which of the following is the most likely …") are ignored. If the
shorter stem has fewer than `DISTINCT` other 8-grams, the questions must also have an option in common.

Each training question is compared with the training questions before it. The index of 8-grams makes the time
linear in the length of the text.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medrlvr_jax.config.load import find_config, load
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data.question import Question
from medrlvr_jax.evaluation import stats
from medrlvr_jax.evaluation.answers import percent, read
from medrlvr_jax.evaluation.stats import Interval
from medrlvr_jax.host import tables
from medrlvr_jax.host.errors import ConfigError

GRAM = 8  # words
THRESHOLD = 0.5
FREQUENT, AT_LEAST = 0.01, 10  # an 8-gram in more than this share and number of stems is ignored
DISTINCT = 5  # 8-grams, which are 12 words in a row


class Overlap(NamedTuple):
    """A contaminated question, and the training question that it overlaps with most."""

    id: str
    train_id: str
    containment: float
    same_stem: bool
    options_in_common: int


def words(stem: str) -> list[str]:
    """Return the lower-case words of a text. "Crohn's" equals "Crohn’s", and "naïve" equals "naive"."""
    letters = [c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c)]
    return re.findall(r"[^\W_]+", re.sub("['’]", "", "".join(letters).lower()))


def grams(stem: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(stem[i:] for i in range(GRAM)), strict=False))


def option_words(question: Question) -> set[tuple[str, ...]]:
    return {tuple(words(option)) for option in question.options} - {()}


def boilerplate(questions: Iterable[Question]) -> set[tuple[str, ...]]:
    """Return the 8-grams that are in too many of the distinct stems to identify a question."""
    stems = {tuple(words(q.question)) for q in questions}
    counts = Counter(gram for stem in stems for gram in grams(list(stem)))
    return {gram for gram, count in counts.items() if count > max(AT_LEAST, FREQUENT * len(stems))}


class Index:
    """An inverted index of the stems of a training set, without the 8-grams in `ignored`."""

    def __init__(self, ignored: set[tuple[str, ...]]) -> None:
        self._ignored = ignored
        self._questions: list[tuple[Question, int]] = []  # with their number of 8-grams that are not ignored
        self._grams: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._stems: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, question: Question) -> None:
        stem, number = words(question.question), len(self._questions)
        counted = grams(stem) - self._ignored
        self._questions.append((question, len(counted)))
        self._stems[tuple(stem)].append(number)
        for gram in counted:
            self._grams[gram].append(number)

    def look_up(self, question: Question) -> Overlap | None:
        """Return the training question that contaminates this one, or None if there is none.

        Of several, one with the same stem comes first, then the one with the largest containment.
        """
        stem, options = words(question.question), option_words(question)
        counted, same = grams(stem) - self._ignored, self._stems.get(tuple(stem), [])
        shared = Counter(number for gram in counted for number in self._grams.get(gram, ()))
        matches: list[tuple[bool, float, int, Overlap]] = []
        for number in {*same, *shared}:
            other, size = self._questions[number]
            shorter = min(len(counted), size)
            share = 1.0 if number in same else shared[number] / shorter
            if share > THRESHOLD:
                common = len(options & option_words(other))
                overlap = Overlap(question.id, other.id, share, number in same, common)
                if shorter >= DISTINCT or common:
                    matches.append((number in same, share, -number, overlap))
        return max(matches)[-1] if matches else None


def overlaps(train: list[Question], tests: dict[str, list[Question]]) -> dict[str, list[Overlap]]:
    """Return the contaminated questions of each test set, and under `(train)` those of the training set."""
    index, within = Index(boilerplate(chain(train, *tests.values()))), []
    for question in train:
        within.append(index.look_up(question))
        index.add(question)
    of_tests = {name: map(index.look_up, questions) for name, questions in tests.items()}
    return {name: [o for o in results if o] for name, results in {"(train)": within, **of_tests}.items()}


def clean_scores(
    folder: Path, overlapping: dict[str, list[Overlap]], tests: dict[str, list[Question]]
) -> dict[str, Any]:
    """Return, for each set of an evaluation that is in `tests`, the accuracy with and without contaminated
    questions. Raises `ConfigError` if the folder holds answers to none of them.
    """
    out, ids = {}, {name: {q.id for q in questions} for name, questions in tests.items()}
    for path in sorted(folder.glob("*.jsonl")):
        a, names = read(path), sorted(tests, key=lambda name: name != path.stem)
        name = next((name for name in names if set(a.ids.tolist()) <= ids[name]), None)
        if name is None:
            continue
        clean = ~np.isin(a.ids, [o.id for o in overlapping[name]])
        scores = {"n": len(clean), "all": stats.accuracy(a.correct)._asdict(), "n_clean": int(clean.sum())}
        scores["clean"] = stats.accuracy(a.correct[clean])._asdict() if clean.any() else None
        out[path.stem] = scores
    if not out:
        remedy = "give a folder that `medrlvr eval` wrote of them"
        raise ConfigError(f"{folder}: no set of answers there is of {', '.join(tests)}; {remedy}")
    return out


def read_sets(paths: list[str]) -> tuple[list[Question], dict[str, list[Question]]]:
    """Return the training set and the test sets at `paths`, or those of one config or run."""
    source = Path(paths[0])
    config_file = source / "config.yaml" if source.is_dir() else find_config(source)
    if len(paths) == 1 and config_file.is_file() and config_file.suffix in (".yaml", ".yml"):
        config = load(config_file)
        return data.load(config.data), {name: data.load(spec) for name, spec in config.eval.sets.items()}
    train, *tests = (data.load(SetConfig(path=path)) for path in paths)
    names = [Path(path).stem for path in paths[1:]]
    if len(set(names)) < len(names):
        names = paths[1:]
    return train, dict(zip(names, tests, strict=True))


def contamination(paths: list[str], folder: Path | None) -> dict[str, Any]:
    """Return each set's size and contaminated questions, and an evaluation's `clean_scores`, for JSON."""
    train, tests = read_sets(paths)
    overlapping, questions = overlaps(train, tests), {"(train)": train, **tests}
    sets = {
        name: {"n": len(questions[name]), "found": [overlap._asdict() for overlap in overlaps_of_set]}
        for name, overlaps_of_set in overlapping.items()
    }
    return {"sets": sets} | ({"scores": clean_scores(folder, overlapping, tests)} if folder else {})


def show(result: dict[str, Any]) -> str:
    """Return the result of `contamination` as tables."""
    rows = []
    for name, s in result["sets"].items():
        n, same = len(s["found"]), sum(o["same_stem"] for o in s["found"])
        other = sum(not o["options_in_common"] for o in s["found"])  # perhaps another question on one case
        share = f"{n:,} ({100 * n / s['n']:.1f} %)"
        rows.append([name, f"{s['n']:,}", f"{same:,}", f"{n - same:,}", share, f"{other:,}"])
    signs = ("same stem", f"8-grams > {THRESHOLD:.0%}", "together", "of these no option in common")
    out = [tables.plain(("set", "questions", *signs), rows)]
    if "scores" in result:
        rows = []
        for name, s in result["scores"].items():
            shares = [percent(Interval(**s[key])) if s[key] else "–" for key in ("all", "clean")]
            rows.append([name, f"{s['n']:,}", shares[0], f"{s['n_clean']:,}", shares[1]])
        out.append(tables.plain(("answers", "questions", "accuracy", "clean", "accuracy"), rows))
    return "\n".join(out)

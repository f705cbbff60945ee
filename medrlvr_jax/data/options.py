"""Shuffle options, so that an answer does not depend on the letter of an option.

Options whose meaning depends on places are not moved (`fixed_places`): "none of the above", "all of these",
and "both A and C" together with the options A and C that it names by letter or number. No option crosses one
that says "above". An option that says "the first two options", and several options with letters of their own,
fix the whole question. In doubt an option stays: this costs a little variety, while moving an option that
another one names makes the key wrong.

An order depends only on (seed, draw, the question's id): it is the same in every batch, on every mesh and
after every resumption.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from medrlvr_jax.data.question import LETTERS, Question, choices_reference, have_letters

QUANTIFIER = r"(?:all|none|any|both|neither|either|each|some|one|two|more than one)"
REFERS_TO_OTHERS = re.compile(  # "all of the above", "Both", "none of the others"; not "above the knee"
    r"\bof (?:the )?(?:above|preceding|foregoing|below)\b(?![-\w]| \d)"
    rf"|\b{QUANTIFIER}(?: the)? (?:above|preceding|foregoing)\b"
    r"|\b(?:options?|choices?|answers?) (?:above|below)\b"
    rf"|^{QUANTIFIER} of (?:these|those|them|the (?:\w+ )?(?:options|choices|answers|others?|rest))\b"
    r"|^(?:all|none|any|both|neither|either)[.!]?$",
    re.I,
)
ORDINAL = r"(?:first|second|third|fourth|fifth|last|former|latter|previous)"
REFERS_BY_ORDINAL = re.compile(  # "the first two options"
    rf"\bthe {ORDINAL}(?: (?:and|or|two|three|{ORDINAL}))* (?:options?|choices?|answers?)\b", re.I
)
NAME = r"(?:\(?[a-hj]\)?|[1-9]|10)(?![\w'’-])"  # of an option; I is skipped, since it is a Roman numeral
CONJUNCTION = r"(?: ?, ?(?:and |or )?| ?[/+&] ?| and | or | nor | but not | with )"
NAMES_AFTER_NOUN = re.compile(  # "options 1 and 3", "Same as option A"
    rf"\b(?:options?|choices?|answers?):? ({NAME}(?:{CONJUNCTION}{NAME})*)", re.I
)
CAPITAL = r"\(?([A-HJ])\)?(?![\w'’-])"
NAME_AT_START = re.compile(  # "B plus warfarin"; not "A swollen leg"
    rf"^{CAPITAL} ?(?:[+&] ?\w|(?:and|or|plus|but|then|followed by|as well as)\b)"
)
NAME_AT_END = re.compile(  # "Everything except C"
    rf"\b(?:except|but|not|same as|as in|other than|excluding|without) {CAPITAL}\.?$"
)
# Words of options that only name others: "Both (a) & (c)", "B is right, D is not".
FILLER_WORDS = frozenset(
    """all any both each either neither none of the above below these those except excepting excluding but not
    and or nor only alone together with without then than before after followed by plus same as like other is
    are true false correct incorrect right wrong possible option options answer answers choice
    choices""".split()
)


def named_options(option: str, n: int) -> tuple[set[int], bool]:
    """Return the indices of the options, of n, that an option names, and whether it names them by bare
    numbers, which may number a list in the stem.
    """
    words = re.findall(r"[^\W_]+", option.lower())
    content = {word for word in words if word not in FILLER_WORDS}
    letters = {word for word in words if re.fullmatch("[a-hj]|[a-h]{2}", word)}
    numbers = {word for word in words if re.fullmatch("[1-9]|10", word) and int(word) <= n}
    if len(words) > 1 and not re.search(r"\w['’-]\w|\d\.\d|\w[-+](?:,|$)", option):  # neither 2.5 nor A+
        if letters and content <= letters:
            return _indices("".join(letters), n), False
        if content == numbers and (len(numbers) > 1 or {"only", "alone", "except", "but"} & {*words}):
            return _indices(numbers, n), True
    lists = " ".join(match[1] for match in NAMES_AFTER_NOUN.finditer(option))
    names = re.findall(r"\b(?:[a-hj]|[1-9]|10)\b", lists, re.I)
    names += [match[1] for pattern in (NAME_AT_START, NAME_AT_END) for match in pattern.finditer(option)]
    return _indices(names, n), False


def _indices(names: Iterable[str], n: int) -> set[int]:
    """The indices, below n, that letters or numbers name."""
    indices = {int(name) - 1 if name.isdigit() else LETTERS.index(name.upper()) for name in names}
    return {i for i in indices if i < n}


def fixed_places(options: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """Return the indices of the options that must stay, and those among them that no option may cross."""
    n, texts = len(options), [option.strip() for option in options]
    if any(map(REFERS_BY_ORDINAL.search, texts)) or have_letters(options):
        return set(range(n)), set()
    fixed, barriers = set(), set()
    names = [named_options(text, n) for text in texts]
    for i, (text, (named, by_number)) in enumerate(zip(texts, names, strict=True)):
        if REFERS_TO_OTHERS.search(text):
            barriers.add(i)
            capitals = re.findall(r"(?<![\w'’-])(?:(?!^)A|[B-HJ])(?![\w'’-])", text)
            fixed |= {i} | named | _indices(capitals, n)
        # If several options are bare numbers, these number a list in the stem, and not the options.
        elif named and not (by_number and any(names[j][1] for j in named)):
            fixed |= {i} | named
    return fixed, barriers


def draw_order(question: Question, seed: int, draw: int) -> list[int]:
    """Return the index of the option at each place: uniform over all orders that `fixed_places` allows."""
    n = len(question.options)
    fixed, barriers = fixed_places(question.options)
    words = np.random.Philox(np.random.SeedSequence([seed, draw, *question.id.encode()])).random_raw(n)
    out, start = list(range(n)), 0
    for barrier in [*sorted(barriers), n]:
        free = [i for i in range(start, barrier) if i not in fixed]
        for place, i in zip(free, sorted(free, key=lambda i: words[i]), strict=True):
            out[place] = i
        start = barrier + 1
    return out


def shuffle_options(question: Question, seed: int, draw: int) -> Question:
    """Return the question with its options in the order of `draw`, an epoch or a sample."""
    if not question.options:
        return question
    places = draw_order(question, seed, draw)
    options, letters = tuple(question.options[i] for i in places), "".join(LETTERS[i] for i in places)
    right = [places.index(i) for i in question.right_indices]
    key: dict[str, Any] = {"answer": right[0]}
    if question.value is not None:
        key = {"value": choices_reference(right, len(options))}
    return dataclasses.replace(question, options=options, order=letters, **key)

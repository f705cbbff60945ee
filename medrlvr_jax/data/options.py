"""Shuffled options: what a model knows should not depend on the letter that an option stands under.

Options whose meaning depends on places stay where they are (`anchored`): "none of the above", "all of
these", and "both A and C" together with the options A and C that it names, by letter or by number. No
option crosses one that says "above". An option that says "the first two options", or several that bring
their own letters, fix the whole question. In doubt an option stays: that costs a little variety, while
moving a named option makes the key wrong.

An order depends only on (seed, draw, the question's id): it is the same in every batch, on every mesh and
after every resumption.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from medrlvr_jax.data.question import LETTERS, Question, choices_reference, have_letters

SOME = r"(?:all|none|any|both|neither|either|each|some|one|two|more than one)"
ABOVE = re.compile(  # "all of the above", "Both", "none of the others", "All above"; not "above the knee"
    r"\bof (?:the )?(?:above|preceding|foregoing|below)\b(?![-\w]| \d)"
    rf"|\b{SOME}(?: the)? (?:above|preceding|foregoing)\b"
    r"|\b(?:options?|choices?|answers?) (?:above|below)\b"
    rf"|^{SOME} of (?:these|those|them|the (?:\w+ )?(?:options|choices|answers|others?|rest))\b"
    r"|^(?:all|none|any|both|neither|either)[.!]?$",
    re.I,
)
PLACE = r"(?:first|second|third|fourth|fifth|last|former|latter|previous)"
PLACES = re.compile(  # "the first two options"
    rf"\bthe {PLACE}(?: (?:and|or|two|three|{PLACE}))* (?:options?|choices?|answers?)\b", re.I
)
NAME = r"(?:\(?[a-hj]\)?|[1-9]|10)(?![\w'’-])"  # of an option; I is a Roman one
JOIN = r"(?: ?, ?(?:and |or )?| ?[/+&] ?| and | or | nor | but not | with )"
NOUN = re.compile(  # "options 1 and 3", "Same as option A"
    rf"\b(?:options?|choices?|answers?):? ({NAME}(?:{JOIN}{NAME})*)", re.I
)
CAPITAL = r"\(?([A-HJ])\)?(?![\w'’-])"
FIRST = re.compile(  # "B plus warfarin"; not "A swollen leg"
    rf"^{CAPITAL} ?(?:[+&] ?\w|(?:and|or|plus|but|then|followed by|as well as)\b)"
)
LAST = re.compile(  # "Everything except C"
    rf"\b(?:except|but|not|same as|as in|other than|excluding|without) {CAPITAL}\.?$"
)
GLUE = frozenset(  # words of an option that only names others: "Both (a) & (c)", "B is right, D is not"
    """all any both each either neither none of the above below these those except excepting excluding but not
    and or nor only alone together with without then than before after followed by plus same as like other is
    are true false correct incorrect right wrong possible option options answer answers choice
    choices""".split()
)


def named(option: str, n: int) -> tuple[set[int], bool]:
    """(places of the options that this one, of n, names; whether by numbers, which may be the stem's)."""
    words = re.findall(r"[^\W_]+", option.lower())
    content = {word for word in words if word not in GLUE}
    letters = {word for word in words if re.fullmatch("[a-hj]|[a-h]{2}", word)}
    numbers = {word for word in words if re.fullmatch("[1-9]|10", word) and int(word) <= n}
    if len(words) > 1 and not re.search(r"\w['’-]\w|\d\.\d|\w[-+](?:,|$)", option):  # neither 2.5 nor A+
        if letters and content <= letters:
            return _places("".join(letters), n), False
        if content == numbers and (len(numbers) > 1 or {"only", "alone", "except", "but"} & {*words}):
            return {int(word) - 1 for word in numbers}, True
    lists = " ".join(match[1] for match in NOUN.finditer(option))
    names = re.findall(r"\b(?:[a-hj]|[1-9]|10)\b", lists, re.I)
    names += [match[1] for pattern in (FIRST, LAST) for match in pattern.finditer(option)]
    return _places(names, n), False


def _places(names: Iterable[str], n: int) -> set[int]:
    """The places, of n, that letters or numbers name."""
    places = {int(name) - 1 if name.isdigit() else LETTERS.index(name.upper()) for name in names}
    return {place for place in places if place < n}


def anchored(options: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """(places of the options that must stay, those among them that say "above": none may cross these)."""
    n, texts = len(options), [option.strip() for option in options]
    if any(map(PLACES.search, texts)) or have_letters(options):
        return set(range(n)), set()
    stay, walls = set(), set()
    names = [named(text, n) for text in texts]
    for i, (text, (places, by_number)) in enumerate(zip(texts, names, strict=True)):
        if ABOVE.search(text):
            walls.add(i)
            capitals = re.findall(r"(?<![\w'’-])(?:(?!^)A|[B-HJ])(?![\w'’-])", text)
            stay |= {i} | places | _places(capitals, n)
        elif places and not (by_number and any(names[place][1] for place in places)):
            stay |= {
                i
            } | places  # several options of bare numbers are left out: they number what the stem lists
    return stay, walls


def order(question: Question, seed: int, draw: int) -> list[int]:
    """Which option stands at each place: even over all orders that `anchored` leaves."""
    n = len(question.options)
    stay, walls = anchored(question.options)
    words = np.random.Philox(np.random.SeedSequence([seed, draw, *question.id.encode()])).random_raw(n)
    out, start = list(range(n)), 0
    for wall in [*sorted(walls), n]:
        free = [i for i in range(start, wall) if i not in stay]
        for place, i in zip(free, sorted(free, key=lambda i: words[i]), strict=True):
            out[place] = i
        start = wall + 1
    return out


def shuffled(question: Question, seed: int, draw: int) -> Question:
    """The question with its options in the order of `draw` (an epoch or a sample)."""
    if not question.options:
        return question
    places = order(question, seed, draw)
    options, letters = tuple(question.options[i] for i in places), "".join(LETTERS[i] for i in places)
    right = [places.index(i) for i in question.right_indices]
    key: dict[str, Any] = {"answer": right[0]}
    if question.value is not None:
        key = {"value": choices_reference(right, len(options))}
    return dataclasses.replace(question, options=options, order=letters, **key)

"""Options in another order, where their places mean nothing: what a model knows does not depend on the letter it stands under.

Some options do mean places, and stay where they are (`anchored`): "none of the above", "all of these", and "both A and C", together with
the options A and C that it names. An option that says "above" also bars the others from changing sides. An order is a function of
(seed, which draw, the question's id) alone: the same in every batch, on every mesh, after every resumption.
"""

import dataclasses
import re

import numpy as np

from medrlvr_jax.formats import LETTERS, Question

SOME = r"(?:all|none|any|both|neither|either|each|some|one|two|more than one)"
ABOVE = re.compile(  # "all of the above", "Both", "none of these", "neither of the other options", "All above"; but not "above the knee"
    r"\bof (?:the )?(?:above|preceding|foregoing|below)\b(?![-\w]| \d)"
    rf"|\b{SOME}(?: the)? (?:above|preceding|foregoing)\b"
    rf"|^{SOME} of (?:these|those|them|the (?:\w+ )?(?:options|choices|answers|others?|rest))\b"
    r"|^(?:all|none|any|both|neither|either)[.!]?$",
    re.I,
)
NAME = r"\(?[a-hj]\)?"  # I is a Roman one
JOIN = r"(?:, ?|/| ?\+ ?| ?& ?|,? (?:and|or|nor|but not|with) )"
NAMES = (
    re.compile(  # "A and B", "Both (a) & (c)", "Neither A nor B", "A, B and D only", "Option C", "Both AB"; but not "A", "Vitamins A and D"
        r"^(?:both |either |neither |only |all |all except |all but |(?:options?|answers?|choices?) )*"
        rf"(?:{NAME}(?:{JOIN}{NAME})+|(?<=\w ){NAME}|{NAME}(?= (?:only|alone))|(?<=both )[a-h]{{2}}|(?<=either )[a-h]{{2}})"
        r"(?: (?:only|alone|both|together|(?:are|is) (?:correct|true|right|false|wrong|incorrect)))*\.?$",
        re.I,
    )
)


def anchored(options: tuple[str, ...]) -> tuple[set[int], set[int]]:
    """(places of the options that must stay, those among them that say "above": none may cross these)."""
    stay, walls = set(), set()
    for i, option in enumerate(map(str.strip, options)):
        if ABOVE.search(option):
            stay.add(i)
            walls.add(i)
        elif NAMES.search(option):
            named = {LETTERS.index(letter.upper()) for word in re.findall(r"\b[a-hj]{1,2}\b", option, re.I) for letter in word}
            stay |= {i} | {place for place in named if place < len(options)}
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
    """The question with its options in the order of `draw`, an epoch or a sample; `order` holds their letters in the file."""
    places = order(question, seed, draw)
    options = tuple(question.options[i] for i in places)
    return dataclasses.replace(question, options=options, answer=places.index(question.answer), order="".join(LETTERS[i] for i in places))

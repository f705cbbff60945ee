"""Penalties for hacks of the format: the composite reward of arXiv 2509.15557, as rules on strings.

leak    The first thought states the answer, by the pattern `LEAK`. (The paper compares sentences with such
        phrases by an encoder; its penalty is 0.5.)
before  More than 15 words stand before <think>, words being runs of anything but white space (penalty 0.3).
"""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

WORDS_BEFORE = 15


def _statement(look: bool) -> str:
    """The pattern of a statement of the answer: a subject, a verb that asserts it, no denial or condition.

    `look`: with lookarounds, which RE2 does not have. Without them it matches wherever the full pattern does.
    """
    unless = (lambda what: what) if look else lambda what: ""
    verb = r"(?:\s+(?:is|must\s+be|has\s+to\s+be|should\s+be|would\s+be|will\s+be)|'s|’s)"
    surely = (
        r"(?:\s+(?:clearly|definitely|obviously|certainly|surely|probably|likely|therefore|thus|then|indeed"
        r"|option|answer|choice)){0,3}"
    )
    letter = r"\(?(?-i:[A-J])\b\)?" + unless(r"(?![\w'’-])")
    lower = unless(r"(?!\s?(?-i:[a-z]))")
    # Not "B cells".
    clause_end = rf"(?:\s*(?:$|[,;:!?])|\.{lower}|\s+(?:and|because|since|as|so|for|by|given)\b)"
    denied = unless(  # "the answer is not A", "the right choice is between A and B", "the answer is unclear"
        r"(?!\s+(?:definitely\s+|clearly\s+|probably\s+)?(?:not|never|neither|nor|between|among|either"
        r"|one\s+of|un\w+|less|hard|difficult|what|which|whether|how"
        r"|determined|decided|found|based|given|in|somewhere)\b)"
    )
    asked = unless(
        "".join(rf"(?<!\b{word} )" for word in ("if", "should", "would", "will", "can", "do", "did"))
    )
    judged = r"(?:(?:correct|final|best|right|only|most\s+\w+)\s+){1,3}"
    ways = (
        # "the answer is C", "correct choice must be heparin"
        rf"\b(?:(?:the|my)\s|(?:the\s+|my\s+)?{judged})\s*"
        rf"\b(?:answer|option|choice)(?:\s+here)?{verb}\b{denied}",
        # "Answer: C"
        r"\b(?:answer|choice)\s*:" + unless(r"(?!\s*(?:not|unclear|\?))"),
        # "option C is correct", "C must be the answer"; not "option A is unlikely", which weighs it
        rf"\b{letter}{verb}{surely}(?:\s+(?:the|our|my|only)){{0,2}}"
        r"\s+(?:correct|right|best|answer|choice|solution|most\s+\w+)\b",
        # "it must be B"
        rf"\b(?:it|this|that|which){verb}{surely}\s+{letter}{clause_end}",
        # "Hence B."
        rf"\b(?:so|thus|hence|therefore),?(?:\s+the)?(?:\s+(?:answer|option|choice))?\s+{letter}{clause_end}",
        # "I choose C"
        rf"{asked}\b(?:i|we)(?:\s+will|'ll|’ll)?\s+(?:now\s+)?(?:choose|pick|select|go\s+with)\b",
        r"\b(?:i\s+am|we\s+are|i'm|we're|i’m|we’re)\s+(?:choosing|picking|selecting|going\s+with)\b",
        # "I would pick C", not "I would pick it if …"
        r"\b(?:i|we)(?:\s+would|'d|’d)\s+(?:choose|pick|select|go\s+with)\b"
        + unless(r"(?!(?:\s+[^\s.;!?]+){0,8}\s+(?:if|unless)\b)"),
        # a thought that begins "B. Because …"
        rf"^\s*(?:option\s+)?{letter}[.,:]?\s+(?:because|since)\b",
    )
    return "|".join(ways)


LEAK = re.compile(_statement(look=True), re.IGNORECASE | re.ASCII)


def leaks(thoughts: Sequence[str]) -> list[re.Match[str] | None]:
    """Where each thought first states the answer, by LEAK. RE2 finds the few that may, 100 times as fast."""
    rows = pa.array([thought.encode("utf-8", "surrogatepass") for thought in thoughts], pa.large_binary())
    match = pc.match_substring_regex  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
    candidates = match(rows, _statement(look=False), ignore_case=True).to_pylist()
    return [LEAK.search(thought) if may else None for thought, may in zip(thoughts, candidates, strict=True)]


def much_before(texts: Sequence[str]) -> list[bool]:
    """Whether each text before <think> has over `WORDS_BEFORE` words."""
    # Bytes are split at ASCII's white space; a str would be split at Unicode's.
    words = (text.encode("utf-8", "surrogatepass").split(None, WORDS_BEFORE) for text in texts)
    return [len(row) > WORDS_BEFORE for row in words]

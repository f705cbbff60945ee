"""Penalties that are rules on a completion's words.

leak        The first thought states the answer, by the pattern `LEAK`. arXiv 2509.15557 compares sentences
            with such phrases by an encoder, and subtracts 0.5.
before      More than 15 words stand before <think> (arXiv 2509.15557, where it is 0.3). White space separates
            words.
repetition  The same 10 words in a row occur at least 10 times (RLPR, arXiv 2506.18254, where it is 1).
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

MAX_WORDS_BEFORE = 15


def _leak_pattern(lookaround: bool) -> str:
    """Return the pattern of a statement of the answer: a subject and a verb, without denial or condition.

    RE2 has no lookarounds. The pattern without them matches wherever the full pattern does, and elsewhere.
    """
    unless = (lambda pattern: pattern) if lookaround else lambda pattern: ""
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
    question = unless(
        "".join(rf"(?<!\b{word} )" for word in ("if", "should", "would", "will", "can", "do", "did"))
    )
    adjective = r"(?:(?:correct|final|best|right|only|most\s+\w+)\s+){1,3}"
    statements = (
        # "the answer is C", "correct choice must be heparin"
        rf"\b(?:(?:the|my)\s|(?:the\s+|my\s+)?{adjective})\s*"
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
        rf"{question}\b(?:i|we)(?:\s+will|'ll|’ll)?\s+(?:now\s+)?(?:choose|pick|select|go\s+with)\b",
        r"\b(?:i\s+am|we\s+are|i'm|we're|i’m|we’re)\s+(?:choosing|picking|selecting|going\s+with)\b",
        # "I would pick C", not "I would pick it if …"
        r"\b(?:i|we)(?:\s+would|'d|’d)\s+(?:choose|pick|select|go\s+with)\b"
        + unless(r"(?!(?:\s+[^\s.;!?]+){0,8}\s+(?:if|unless)\b)"),
        # a thought that begins "B. Because …"
        rf"^\s*(?:option\s+)?{letter}[.,:]?\s+(?:because|since)\b",
    )
    return "|".join(statements)


LEAK = re.compile(_leak_pattern(lookaround=True), re.IGNORECASE | re.ASCII)


def find_leaks(thoughts: Sequence[str]) -> list[re.Match[str] | None]:
    """Return the first match of `LEAK` in each thought, or None.

    RE2 is 100 times as fast as `re`, so it first selects the few thoughts that may match.
    """
    rows = pa.array([thought.encode("utf-8", "surrogatepass") for thought in thoughts], pa.large_binary())
    match = pc.match_substring_regex  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
    candidates = match(rows, _leak_pattern(lookaround=False), ignore_case=True).to_pylist()
    pairs = zip(thoughts, candidates, strict=True)
    return [LEAK.search(thought) if candidate else None for thought, candidate in pairs]


def has_preamble(texts: Sequence[str]) -> list[bool]:
    """Return whether each text, which stands before <think>, has over `MAX_WORDS_BEFORE` words."""
    # Bytes are split at ASCII's white space; a str would be split at Unicode's.
    words = (text.encode("utf-8", "surrogatepass").split(None, MAX_WORDS_BEFORE) for text in texts)
    return [len(row) > MAX_WORDS_BEFORE for row in words]


def find_repetition(texts: Sequence[str], window: int, times: int) -> Bool[np.ndarray, " N"]:
    """Return whether in each text some run of `window` words occurs at least `times` times.

    Runs may overlap. Words are split at ASCII's white space and at `_`.
    """
    out = np.zeros(len(texts), bool)
    for i, text in enumerate(texts):
        words = text.replace("_", " ").encode("utf-8", "replace").split()
        runs = Counter(zip(*(words[k:] for k in range(window)), strict=False))
        out[i] = max(runs.values(), default=0) >= times
    return out

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
from jaxtyping import Bool, Int

MAX_WORDS_BEFORE = 15
SPACE = np.isin(np.arange(256), list(b" \t\n\v\f\r"))
FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # masks of a word's first n bytes
BLOCK = 64  # texts whose words are counted at a time, so that they fit the processor's cache


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

    Runs may overlap. Words are split at ASCII's white space and at `_`. Counting in Python takes 0.1 ms for a
    text, so only texts that may have such a run are counted.
    """
    out = np.zeros(len(texts), bool)
    rows = [text.replace("_", " ").encode("utf-8", "replace") for text in texts]
    for start in range(0, len(rows), BLOCK):
        for i in repetition_candidates(rows[start : start + BLOCK], window, times) + start:
            words = rows[i].split()
            runs = Counter(zip(*(words[k:] for k in range(window)), strict=False))
            out[i] = max(runs.values(), default=0) >= times
    return out


def repetition_candidates(rows: Sequence[bytes], window: int, times: int) -> Int[np.ndarray, " M"]:
    """Return the numbers of the rows that may have a run of `window` words which occurs `times` times.

    A candidate has `window` words in a row, each of which occurs at least `times` times in the row. Words are
    hashed by their first eight bytes: equal words always count as equal, different ones seldom do.
    """
    data = np.frombuffer(b" ".join([b"", *rows, bytes(8)]), np.uint8)
    space = SPACE[data]
    first = np.flatnonzero(space[:-1] > space[1:]) + 1  # of each word; the last word is the eight zeros
    size = np.flatnonzero(space[:-1] < space[1:]) + 1 - first[:-1]
    eight = np.lib.stride_tricks.sliding_window_view(data, 8)[first[:-1]].view("<u8")[:, 0]
    words = eight & FIRST_BYTES[np.minimum(size, 8)]
    ends = np.searchsorted(first, np.cumsum([1 + len(row) for row in rows]))
    row = np.repeat(np.arange(len(rows)), np.diff(ends, prepend=0))
    bits = len(words).bit_length() + 2
    spread = (words + row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    bucket = (spread >> np.uint64(64 - bits)).astype(np.int64)
    often = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=1 << bits)[bucket] >= times)])
    return np.unique(row[np.flatnonzero(often[window:] - often[:-window] == window)])

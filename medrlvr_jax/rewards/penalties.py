"""Penalties that look at a completion's words: two for hacks of the format, by the composite reward of arXiv
2509.15557, as rules on strings; and one for repetition.

leak    The first thought states the answer, by the pattern `LEAK`. (The paper compares sentences with such
        phrases by an encoder; its penalty is 0.5.)
before  More than 15 words stand before <think>, words being runs of anything but white space (penalty 0.3).
repeats A run of words occurs again and again: 10 words, 10 times (RLPR, arXiv 2506.18254; penalty 1).
"""

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

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


def repeats(texts: Sequence[str], window: int, times: int) -> Bool[np.ndarray, " N"]:
    """Whether in each text some run of `window` words occurs at least `times` times; runs may overlap.

    Words are split at ASCII's white space and at `_`. A run is known by a 64-bit hash of its words and of its
    row, for all rows at once: one row alone takes Python 0.1 ms.
    """
    out = np.zeros(len(texts), bool)
    # A surrogate becomes "?", for Arrow holds UTF-8.
    rows = pa.array([t.replace("_", " ").encode("utf-8", "replace") for t in texts], pa.large_string())
    words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(rows))  # pyright: ignore
    codes, ends = words.values.dictionary_encode().indices.to_numpy(), words.offsets.to_numpy()
    row = np.repeat(np.arange(len(texts)), np.diff(ends))
    starts = np.flatnonzero(np.arange(len(codes)) + window <= ends[1:][row])
    if len(starts) < times:
        return out
    rows_hash = _mixed(~row[starts].astype(np.uint64))  # `~`: other numbers than any code
    hashes = _run_hashes(_mixed(codes.astype(np.uint64)), window)[starts] ^ rows_hash
    ordered = np.sort(hashes)
    often = np.unique(ordered[times - 1 :][ordered[times - 1 :] == ordered[: len(ordered) - times + 1]])
    maybe = np.zeros(1 << 16, bool)  # by the last 16 bits, which leaves few to search for
    maybe[often & np.uint64(0xFFFF)] = True
    candidates = np.flatnonzero(maybe[hashes & np.uint64(0xFFFF)])
    out[row[starts[candidates[np.isin(hashes[candidates], often)]]]] = True
    return out


def _run_hashes(words: np.ndarray, window: int) -> np.ndarray:
    """Of hashes of words uint64 [W], those of all runs of `window` words, Σ word·baseⁱ modulo 2⁶⁴."""
    base, length, hashes = 0x9E3779B97F4A7C15, 1, words
    for bit in f"{window:b}"[1:]:  # runs of doubled length from two, and one word more where the bit is set
        factor = np.uint64(pow(base, length, 1 << 64))
        hashes, length = hashes[:-length] * factor + hashes[length:], 2 * length
        if bit == "1":
            hashes, length = hashes[:-1] * np.uint64(base) + words[length:], length + 1
    return hashes


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that scatters them (SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Replace the end of a sampled response: keep its first tokens, and append the tokens of another text.

The policy's opinion of an answer that it did not give is the log-probability of that answer behind its own
thought. The row that is scored must begin with the sampled tokens: encoding their text again may give other
tokens. So the new text is appended behind the last token that ends at or before the given character. If a
token reaches across that character (`>B`, or ` heparin` with its space), it is left out, and its characters
up to there are encoded together with the new text. A token belongs to the new text if any of its characters
does.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, count
from typing import NamedTuple

from medrlvr_jax.build import Parts
from medrlvr_jax.data.prompts import response_prefix
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.rewards.parse import ANSWER, END_THINK, THINK, WHITE, graded_prefix
from medrlvr_jax.rollout.rollout import Scored


class Positions(NamedTuple):
    """Positions in a completion, in characters."""

    thought: tuple[int, int]  # from behind <think> to </think>
    answer: int  # the first character of the answer, behind <answer> and white space


class Replacement(NamedTuple):
    """A new end of a text."""

    keep: int  # characters of the text that stay; 0 or less: none
    lead: str  # what stands between them and the new text
    text: str  # the new text, whose tokens are scored


class Ending(NamedTuple):
    """A row to score: the first `prefix` tokens of a response, then `ids`."""

    prefix: int
    ids: list[int]
    start: int  # index of the first of `ids` that belongs to the new text


def find_positions(completion: str) -> Positions | None:
    """Return where thought and answer stand, under RLPR's condition (arXiv 2506.18254), else None.

    The condition is that <think>, </think> and <answer> occur once each, in this order, and that some text
    follows.
    """
    tags = (THINK, END_THINK, ANSWER)
    if any(completion.count(tag) != 1 for tag in tags):
        return None
    think, end, answer = (completion.index(tag) for tag in tags)
    after = completion[answer + len(ANSWER) :].lstrip(WHITE)
    if not think < end < answer or not after:
        return None
    return Positions((think + len(THINK), end), len(completion) - len(after))


def thought_prefixes(thought: str) -> list[str]:
    """Return the thought up to the end of each sentence, clause or line. The last is the whole thought."""
    ends = [m.end() for m in re.finditer(r"[.!?;](?=\s)|\n", thought)]
    pieces = zip([0, *ends], [*ends, len(thought)], strict=True)
    out = [thought[:end] for start, end in pieces if re.search(r"\w", thought[start:end])]
    return [*out[:-1], thought] if out else []


def make_endings(
    parts: Parts, scored: Scored, replacements: Mapping[int, Replacement]
) -> list[Ending | None]:
    """Return the endings of N scored rows by the replacements of their completions, None for the others."""
    prefix = response_prefix(parts.tokenizer, parts.config.prompt)
    begun = len(graded_prefix(prefix, parts.config.reward.mode))
    sizes = scored.lengths - scored.stopped  # without the stop token
    rows = [scored.tokens[i, : sizes[i]].tolist() for i in replacements]
    texts = [scored.completions[i][begun:] for i in replacements]
    sampled = [new._replace(keep=new.keep - begun) for new in replacements.values()]
    out: list[Ending | None] = [None] * len(scored.completions)
    for i, ending in zip(replacements, encode_endings(parts.tokenizer, rows, texts, sampled), strict=True):
        out[i] = ending
    return out


def encode_endings(
    tokenizer: Tokenizer,
    rows: Sequence[list[int]],
    texts: Sequence[str],
    replacements: Sequence[Replacement],
) -> list[Ending]:
    """Return the ending of each response. `rows` are the responses' tokens, which decode to `texts`."""
    ends = [new.keep for new in replacements]
    prefix, sizes = _kept_tokens(tokenizer, rows, texts, ends)
    between = [text[size : max(end, 0)] for text, size, end in zip(texts, sizes, ends, strict=True)]
    pairs = [(before + new.lead, new.text) for before, new in zip(between, replacements, strict=True)]
    encoded = _encode_pairs(tokenizer, list(dict.fromkeys(pairs)))
    return [Ending(n, *encoded[pair]) for n, pair in zip(prefix, pairs, strict=True)]


def _kept_tokens(
    tokenizer: Tokenizer, rows: Sequence[list[int]], texts: Sequence[str], ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return for each row the largest number of tokens whose text ends at or before `end`, and its length.

    The text of a row's first n tokens grows with n, so n is found by bisection. The first guess adds the
    lengths of the single tokens. It is right unless a character has several tokens.
    """
    decode = lambda rows: tokenizer.trusted.decode_batch(rows, skip_special_tokens=False)
    ids = sorted(set().union(*rows))
    sizes = dict(zip(ids, map(len, decode([[i] for i in ids])), strict=True))
    guesses = [
        bisect_right(list(accumulate(sizes[i] for i in row)), end)
        for row, end in zip(rows, ends, strict=True)
    ]
    low, high, starts = [0] * len(rows), [len(row) for row in rows], [""] * len(rows)
    for attempt in count():
        open_rows = [i for i in range(len(rows)) if low[i] < high[i]]
        if not open_rows:
            break
        tries = [guesses[i] + attempt if attempt < 2 else (low[i] + high[i] + 1) // 2 for i in open_rows]
        tries = [min(max(n, low[i] + 1), high[i]) for i, n in zip(open_rows, tries, strict=True)]
        decoded = decode([rows[i][:n] for i, n in zip(open_rows, tries, strict=True)])
        for i, n, text in zip(open_rows, tries, decoded, strict=True):
            if len(text) > ends[i]:
                high[i] = n - 1
            else:
                low[i], starts[i] = n, text
    for i, text in enumerate(texts):
        while not text.startswith(starts[i]):  # the last token ends within a character, decoded as U+FFFD
            low[i] -= 1
            starts[i] = decode([rows[i][: low[i]]])[0]
    return low, list(map(len, starts))


def _encode_pairs(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], tuple[list[int], int]]:
    """Return for each (text before, new text) the tokens of both, and the index of the new text's first."""
    out = {}
    for pair, row in zip(pairs, tokenizer.encode_with_offsets(list(map("".join, pairs))), strict=True):
        start = next((i for i, (_, end) in enumerate(row.offsets) if end > len(pair[0])), len(row.ids))
        out[pair] = row.ids, start
    return out

"""Another ending for a sampled response: its tokens up to a place in its text, then tokens of a new text.

What a policy thinks of an answer that it did not give is that answer's log-prob after its own thought.
The row that is scored must begin with the very tokens that were drawn: a text that is encoded again may
be cut into other tokens. So a row is joined by ids, after the last token that ends at or before the
place. Where a token covers the place (`>B`, or ` heparin` with its space), the join is before that token,
and the characters between join and place are spelled together with the new text. A token counts as the
new text's if any of its characters is of the new text.
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


class Places(NamedTuple):
    """Characters of a completion."""

    thought: tuple[int, int]  # from after <think> to before </think>
    answer: int  # the first of the answer: after <answer> and the white space that follows it


class Join(NamedTuple):
    """Tokens: the first `prefix` of a response, then `ids`; those from `start` on are the new text's."""

    prefix: int
    ids: list[int]
    start: int


def places(completion: str) -> Places | None:
    """Where thought and answer stand; None unless <think>, </think> and <answer> occur once each, in this
    order, and something follows (RLPR's condition, arXiv 2506.18254)."""
    tags = (THINK, END_THINK, ANSWER)
    if any(completion.count(tag) != 1 for tag in tags):
        return None
    think, end, answer = (completion.index(tag) for tag in tags)
    after = completion[answer + len(ANSWER) :].lstrip(WHITE)
    if not think < end < answer or not after:
        return None
    return Places((think + len(THINK), end), len(completion) - len(after))


def sentences(thought: str) -> list[str]:
    """The thought up to the end of each sentence, clause or line, the last being all of it."""
    ends = [m.end() for m in re.finditer(r"[.!?;](?=\s)|\n", thought)]
    pieces = [thought[a:b] for a, b in zip([0, *ends], [*ends, len(thought)], strict=True)]
    out, so_far = [], ""
    for piece in pieces:
        so_far += piece
        if re.search(r"\w", piece):
            out.append(so_far)
    return [*out[:-1], thought] if out else []


def joined(
    parts: Parts, scored: Scored, wanted: Mapping[int, tuple[int, tuple[str, str]]]
) -> list[Join | None]:
    """For each of N scored rows a join, if `wanted` names it: by the character of its completion up to which
    it stays, and the ending; None for the others.
    """
    prefix = response_prefix(parts.tokenizer, parts.config.prompt)
    begun = len(graded_prefix(prefix, parts.config.reward.mode))
    sizes = scored.lengths - scored.stopped  # without the stop token
    rows = [scored.tokens[i, : sizes[i]].tolist() for i in wanted]
    texts = [scored.completions[i][begun:] for i in wanted]
    ends, endings = [end - begun for end, _ in wanted.values()], [ending for _, ending in wanted.values()]
    out: list[Join | None] = [None] * len(scored.completions)
    for i, row in zip(wanted, join(parts.tokenizer, rows, texts, ends, endings), strict=True):
        out[i] = row
    return out


def join(
    tokenizer: Tokenizer,
    rows: Sequence[list[int]],
    responses: Sequence[str],
    ends: Sequence[int],
    endings: Sequence[tuple[str, str]],
) -> list[Join]:
    """Each response up to character `end`, then its ending: a text that leads over, and the new text.

    `rows` are the responses' tokens and `responses` what they decode to. An `end` of 0 or less keeps no
    token: the ending then follows the prompt.
    """
    prefix, starts = _boundaries(tokenizer, rows, responses, ends)
    between = [text[size : max(end, 0)] for text, size, end in zip(responses, starts, ends, strict=True)]
    pairs = [(before + lead, new) for before, (lead, new) in zip(between, endings, strict=True)]
    spelled = _spell(tokenizer, list(dict.fromkeys(pairs)))
    return [Join(n, *spelled[pair]) for n, pair in zip(prefix, pairs, strict=True)]


def _boundaries(
    tokenizer: Tokenizer, rows: Sequence[list[int]], responses: Sequence[str], ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """For each row the largest number of tokens whose text ends at or before `end`, and that text's length.

    The text of a row's first tokens grows with their number, so bisection finds it. The lengths of single
    tokens make the first guess: right but where a character has several tokens.
    """
    decode = lambda rows: tokenizer.trusted.decode_batch(rows, skip_special_tokens=False)
    ids = sorted(set().union(*rows))
    sizes = dict(zip(ids, map(len, decode([[i] for i in ids])), strict=True))
    guesses = [
        bisect_right(list(accumulate(sizes[i] for i in row)), end)
        for row, end in zip(rows, ends, strict=True)
    ]
    prefix, most, starts = [0] * len(rows), [len(row) for row in rows], [""] * len(rows)
    for attempt in count():
        rest = [i for i in range(len(rows)) if prefix[i] < most[i]]
        if not rest:
            break
        tries = [guesses[i] + attempt if attempt < 2 else (prefix[i] + most[i] + 1) // 2 for i in rest]
        tries = [min(max(n, prefix[i] + 1), most[i]) for i, n in zip(rest, tries, strict=True)]
        texts = decode([rows[i][:n] for i, n in zip(rest, tries, strict=True)])
        for i, n, text in zip(rest, tries, texts, strict=True):
            if len(text) > ends[i]:
                most[i] = n - 1
            else:
                prefix[i], starts[i] = n, text
    for i, response in enumerate(responses):
        while not response.startswith(starts[i]):  # it ends within a character, as U+FFFD
            prefix[i] -= 1
            starts[i] = decode([rows[i][: prefix[i]]])[0]
    return prefix, list(map(len, starts))


def _spell(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], tuple[list[int], int]]:
    """For each (text before, new text): the tokens of both, and the first with a character of the new."""
    texts = [before + new for before, new in pairs]
    out = {}
    for pair, row in zip(pairs, tokenizer.encode_with_offsets(texts), strict=True):
        start = next((i for i, (_, end) in enumerate(row.offsets) if end > len(pair[0])), len(row.ids))
        out[pair] = row.ids, start
    return out

"""Med-RLVR's verifiable reward: the format first, then the letter. One function scores training and evaluation.

Two rules (arXiv 2502.19655), and one for answers without a thought. White space is ASCII's six, space \\t \\n \\v \\f \\r; tags count
only as spelled here, lower case, nothing inside; letters are the capitals A.. of the question's own options, ASCII only, so look-alikes
of other scripts are not letters.

paper   the lenient rule, loopholes included: the first match anywhere of
            <think> at least one character, whatever it is </think> white space <answer> white space X white space </answer>
        for X an option's letter and white space possibly none. It is the leftmost shortest match of the regular expression
        `(?s)<think>.+?</think>\\s*<answer>\\s*([A-E])\\s*</answer>`. So a thought of blanks is a thought; a thought may hold tags, since
        it runs from the first `<think>`; and a letter that is no option makes its place no place, and the search goes on.
strict  the whole completion is one <think> with more than white space in it, closed, and one <answer> that holds X, or X with `.`, `)`
        or `:` and this option's own text, spelled the same. White space may stand around the tags and the answer, nothing else;
        each of the four tags stands exactly once.
direct  `strict` for a completion that is to be the answer alone: one <answer> as there, no thought, nothing else.

With `leak_penalty` or `before_penalty` above 0, the composite reward of arXiv 2509.15557 in string rules: wherever there is a <think>,
R − leak_penalty if the first thought states the answer by the rule `LEAK` (there: nearness to such phrases by a sentence encoder), and
R − before_penalty if more than 15 words, runs of anything but white space, stand before it. There the two are 0.5 and 0.3.

How: Arrow lays a block of completions out as one run of UTF-8 bytes; one pass finds every `<`, and those that begin a tag become a
table in the order of the text. All rules are arithmetic on that table; the bytes between tags are looked at again only where white
space must be stepped over, long runs of it by Arrow's RE2 kernel. Every step is linear in the bytes, whatever they are. (Why no string
kernel for the tags: one call tells of one tag, at 0.2 µs a row, and a rule needs five; and the plain `find_substring` reads 0.5 GB/s.)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medrlvr_jax.config.schema import RewardConfig
from medrlvr_jax.data.question import EMPTY_THOUGHT, LETTERS, DataError

WHITE = b" \t\n\v\f\r"
DEFAULT = RewardConfig()
BLOCK = 4096  # rows judged at once: their 5 MB and what is computed of them stay in the cache, which halves the time
TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>")
THINK, END_THINK, ANSWER, END_ANSWER = 1, 2, 3, 4  # the kinds of tag; 0 is no tag
LAYOUTS = {"strict": (THINK, END_THINK, ANSWER, END_ANSWER), "direct": (ANSWER, END_ANSWER)}  # all tags of a completion, in order


def _statement(look: bool) -> str:
    """The pattern of a statement of the answer: a subject, a verb that asserts, and nothing that takes it back or makes it conditional.

    `look`: with what may not stand before and after, which RE2 cannot look at; without, it matches wherever the whole does.
    """
    unless = (lambda what: what) if look else lambda what: ""
    verb = r"(?:\s+(?:is|must\s+be|has\s+to\s+be|should\s+be|would\s+be|will\s+be)|'s|’s)"
    surely = (
        r"(?:\s+(?:clearly|definitely|obviously|certainly|surely|probably|likely|therefore|thus|then|indeed|option|answer|choice)){0,3}"
    )
    letter = r"\(?(?-i:[A-J])\b\)?" + unless(r"(?![\w'’-])")
    end = r"(?:\s*(?:$|[,;:!?])|\." + unless(r"(?!\s?(?-i:[a-z]))") + r"|\s+(?:and|because|since|as|so|for|by|given)\b)"  # not "B cells"
    denied = unless(  # "the answer is not A", "the right choice is between A and B", "the answer is unclear"
        r"(?!\s+(?:definitely\s+|clearly\s+|probably\s+)?(?:not|never|neither|nor|between|among|either|one\s+of|un\w+|less|hard|difficult"
        r"|what|which|whether|how|determined|decided|found|based|given|in|somewhere)\b)"
    )
    asked = unless("".join(rf"(?<!\b{word} )" for word in ("if", "should", "would", "will", "can", "do", "did")))
    ways = (
        # "the answer is C", "correct choice must be heparin"
        r"\b(?:(?:the|my)\s|(?:the\s+|my\s+)?(?:(?:correct|final|best|right|only|most\s+\w+)\s+){1,3})\s*"
        rf"\b(?:answer|option|choice)(?:\s+here)?{verb}\b{denied}",
        r"\b(?:answer|choice)\s*:" + unless(r"(?!\s*(?:not|unclear|\?))"),  # "Answer: C"
        # "option C is correct", "C must be the answer"; not "option A is unlikely", which weighs it
        rf"\b{letter}{verb}{surely}(?:\s+(?:the|our|my|only)){{0,2}}\s+(?:correct|right|best|answer|choice|solution|most\s+\w+)\b",
        rf"\b(?:it|this|that|which){verb}{surely}\s+{letter}{end}",  # "it must be B"
        rf"\b(?:so|thus|hence|therefore),?(?:\s+the)?(?:\s+(?:answer|option|choice))?\s+{letter}{end}",  # "Hence B."
        rf"{asked}\b(?:i|we)(?:\s+will|'ll|’ll)?\s+(?:now\s+)?(?:choose|pick|select|go\s+with)\b",  # "I choose C"
        r"\b(?:i\s+am|we\s+are|i'm|we're|i’m|we’re)\s+(?:choosing|picking|selecting|going\s+with)\b",
        r"\b(?:i|we)(?:\s+would|'d|’d)\s+(?:choose|pick|select|go\s+with)\b"  # not "I would pick it if …"
        + unless(r"(?!(?:\s+[^\s.;!?]+){0,8}\s+(?:if|unless)\b)"),
        rf"^\s*(?:option\s+)?{letter}[.,:]?\s+(?:because|since)\b",  # a thought that begins "B. Because …"
    )
    return "|".join(ways)


LEAK = re.compile(_statement(look=True), re.IGNORECASE | re.ASCII)
BEFORE = r"^[ \t-\r]*(?:[^ \t-\r]+[ \t-\r]+){15}[^ \t-\r]"  # more than 15 words

REASONS = {  # every value of `Verdicts.reason`; where several would fit, the first of a mode's own order is given
    "correct": "the key's letter",
    "wrong": "another option's letter",
    "no_think": "no <think>",
    "unclosed_think": "no </think> (paper: none after the first <think>)",
    "no_answer": "no <answer>",
    "unclosed_answer": "no </answer> (paper: none right after an <answer> that follows a thought)",
    "text_between": "more than white space between </think> and <answer> (paper: everywhere)",
    "empty_think": "nothing in the thought (strict: nothing but white space)",
    "empty_answer": "nothing but white space in the answer",
    "not_one_letter": "the answer is not a letter: several, lower case, a look-alike, a text",
    "letter_not_an_option": "the answer is a capital that this question does not offer",
    "other_text": "strict, direct: a letter, then a text that is not this option's own",
    "has_think": "direct: a <think> or </think>",
    "several_answers": "strict, direct: more than one <answer> among the first five tags",
    "repeated_tags": "strict, direct: another tag more than once among the first five tags; so nested thoughts, too",
    "tags_out_of_order": "strict, direct: each tag once, but not as <think> </think> <answer> </answer>",
    "text_before_think": "strict: more than white space before <think>",
    "text_before_answer": "direct: more than white space before <answer>",
    "text_after_answer": "strict, direct: more than white space after </answer>",
}
_code = list(REASONS).index


@dataclass(frozen=True)
class Verdicts:
    """What the rule says of each of N completions."""

    reward: np.ndarray  # float32 [N]
    penalty: np.ndarray  # float64 [N], what `reward` lacks for a leak or for words before <think>
    format_ok: np.ndarray  # bool [N]
    correct: np.ndarray  # bool [N]
    answer: np.ndarray  # str [N], the letter; "" where the format failed
    reason: np.ndarray  # str [N], a key of REASONS


def score(completions: Sequence[str], answers: Sequence[str], options: Sequence[Sequence[str]], config: RewardConfig = DEFAULT) -> Verdicts:
    """Judge completion i by its key letter `answers[i]` and its question's own 2 to 10 `options[i]`, each by itself; by the rule `config`.

    `DataError` if the three differ in length, or a row has too few or too many options, or a key that is none of them.
    """
    n = len(completions)
    if not n == len(answers) == len(options):
        raise DataError(f"{n} completions, {len(answers)} answers, {len(options)} lists of options: give one of each for every row")
    count = np.fromiter(map(len, options), np.int64, n)
    place = {letter: i for i, letter in enumerate(LETTERS)}
    key = np.array([place.get(a, len(LETTERS)) for a in answers], np.int64)
    bad = np.flatnonzero((count < 2) | (count > len(LETTERS)) | (key >= count)).tolist()
    if bad:
        i = bad[0]
        raise DataError(f"row {i}: answer {brief(answers[i])} with {count[i]} options: 2 to 10 options and the letter of one are needed")
    letter, fault, penalty = np.empty(n, np.int64), np.empty(n, np.int64), np.zeros(n)
    for i in range(0, n, BLOCK):
        rows = slice(i, i + BLOCK)
        batch = _lay_out(completions[rows], i)
        tags = _find_tags(batch)
        if config.mode == "paper":
            letter[rows], fault[rows] = _paper(batch, tags, count[rows])
        else:
            letter[rows], fault[rows] = _exact(batch, tags, count[rows], options[rows], LAYOUTS[config.mode])
        if config.leak_penalty or config.before_penalty:
            penalty[rows] = _penalty(batch, tags, config)
    format_ok, correct = letter >= 0, letter == key
    worth = np.array([config.unformatted, config.wrong, config.correct], np.float32)
    return Verdicts(
        reward=worth[format_ok.astype(np.int8) + correct] - penalty.astype(np.float32),
        penalty=penalty,
        format_ok=format_ok,
        correct=correct,
        answer=np.array([*LETTERS, ""])[letter],
        reason=np.array(list(REASONS))[np.where(correct, _code("correct"), np.where(format_ok, _code("wrong"), fault))],
    )


def judged_beginning(begun: str, mode: str) -> str:
    """What stands before the sampled part of a completion where its prompt ends with `begun`, the beginning of the response.

    An empty thought that the prompt itself closes is none to `direct`, which pays for none.
    """
    empty = EMPTY_THOUGHT.match(begun) if mode == "direct" else None
    return begun[empty.end() :] if empty else begun


def beginning_trap(begun: str, mode: str) -> tuple[str, str] | None:
    """(what is wrong, a remedy) where no response that begins so can be paid for by the rule `mode`."""
    empty = EMPTY_THOUGHT.match(begun)
    if mode == "direct" and "<think>" in judged_beginning(begun, mode):
        return f"every response begins with {begun!r}, and reward.mode direct pays for none with a thought", (
            "set reward.mode=strict, or, where the chat template knows it, prompt.template_args={enable_thinking: false}"
        )
    if mode != "direct" and empty:
        wrong = f"every response begins with {begun!r}, an empty thought, and reward.mode {mode} pays for one that is not"
        return wrong, "set reward.mode=direct, or, where the chat template wrote it, prompt.template_args={enable_thinking: true}"
    return None


def toss(key: Sequence[int] | np.ndarray, ids: np.ndarray, samples: int, config: RewardConfig) -> np.ndarray:
    """The control `reward.random`: float32 [Q, samples], `correct` with that chance, else `wrong`.

    A function of the step's `key` (whole numbers), of each question's number `ids` [Q] and of the sample alone: never of a completion or
    of the question's key. Random rewards were seen to raise accuracy (arXiv 2506.10947), so that a gain must be held against theirs.
    """
    seeds = [np.random.SeedSequence([*map(int, key), int(i)]) for i in ids]
    words = np.array([np.random.Philox(seed).random_raw(samples) for seed in seeds])  # raw: the same in every release of NumPy
    return np.where(words < (config.random or 0.0) * 2.0**64, config.correct, config.wrong).astype(np.float32)


class _Batch(NamedTuple):
    """N completions end to end, and a few bytes more, so that a tag's length can be read at any place."""

    data: pa.Buffer
    text: np.ndarray  # uint8, the same bytes
    bounds: np.ndarray  # int64 [N+1], row i is text[bounds[i]:bounds[i + 1]]


class _Tags(NamedTuple):
    """All tags of a batch, M of them, in the order of the text; and one more of kind 0 and no row, so that there is a next one."""

    kind: np.ndarray  # int8 [M+2]
    row: np.ndarray  # int64 [M+2]
    start: np.ndarray  # int64 [M+2], into _Batch.text
    end: np.ndarray  # int64 [M+2]


def _lay_out(completions: Sequence[str], before: int) -> _Batch:
    rows = [*completions, "\0" * 8]
    try:
        array = pa.array(rows, pa.large_string())
    except UnicodeEncodeError:  # a lone surrogate, which a tokenizer may give: three bytes that no tag or letter has
        array = pa.array([row.encode("utf-8", "surrogatepass") for row in rows], pa.large_binary())
    if array.null_count:
        row = before + array.is_null().index(True).as_py()
        raise DataError(f"row {row}: its completion is None: an empty completion is an empty text")
    _, bounds, data = array.buffers()
    return _Batch(data, np.frombuffer(data, np.uint8), np.frombuffer(bounds, np.int64, len(rows)))


def _find_tags(batch: _Batch) -> _Tags:
    """The eight bytes at every `<` are one integer: four comparisons tell what stands there."""
    start = np.flatnonzero(batch.text == ord("<"))
    word = np.ndarray(len(batch.text) - 7, "<u8", batch.text, strides=(1,))[start]
    kind = np.zeros(len(start), np.int8)
    for k, tag in enumerate(TAGS, 1):
        known = min(len(tag), 8)
        kind += np.int8(k) * (word & ((1 << 8 * known) - 1) == int.from_bytes(tag[:known], "little"))
    nine = np.flatnonzero(kind == END_ANSWER)
    kind[nine[batch.text[start[nine] + 8] != ord(">")]] = 0
    kind, start = kind[kind > 0], start[kind > 0]
    end = start + np.array([0, *map(len, TAGS)])[kind]
    row = np.searchsorted(batch.bounds, start, "right") - 1
    whole = end <= batch.bounds[row + 1]  # not begun in one row and ended in the next
    kind, row, start, end = (column[whole] for column in (kind, row, start, end))
    return _Tags(np.append(kind, [0, 0]), np.append(row, [-1, -1]), np.append(start, [0, 0]), np.append(end, [0, 0]))


def _penalty(batch: _Batch, tags: _Tags, config: RewardConfig) -> np.ndarray:
    """What each row [N] loses for its first thought, which ends where the next `</think>` or the row does, and for the words before."""
    n = len(batch.bounds) - 1
    out, row = np.zeros(n), np.unique(tags.row[tags.kind == THINK])
    begin, opened, closed = batch.bounds[:-1].copy(), np.zeros(n, np.int64), batch.bounds[1:].copy()
    for kind, place, at in ((THINK, begin, tags.start), (THINK, opened, tags.end)):
        found = np.flatnonzero(tags.kind == kind)[::-1]  # backwards, so that a row's first is written last
        place[tags.row[found]] = at[found]
    found = np.flatnonzero(tags.kind == END_THINK)[::-1]
    found = found[tags.start[found] >= opened[tags.row[found]]]
    closed[tags.row[found]] = tags.start[found]
    if config.leak_penalty:
        out[row] += config.leak_penalty * _leaks(batch, opened[row], closed[row])
    out[row] += config.before_penalty * _matches(batch, batch.bounds[row], begin[row], BEFORE)
    return out


def _leaks(batch: _Batch, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which spans state the answer. RE2 finds the few that may, in a hundredth of the time that LEAK takes."""
    out = _matches(batch, start, end, _statement(look=False))
    for i in np.flatnonzero(out).tolist():
        out[i] = LEAK.search(batch.data[int(start[i]) : int(end[i])].to_pybytes().decode("utf-8", "replace")) is not None
    return out


def leaks(thoughts: Sequence[str]) -> list[re.Match[str] | None]:
    """Where each thought first states the answer, by LEAK."""
    batch = _lay_out(thoughts, 0)
    may = _matches(batch, batch.bounds[:-1][: len(thoughts)], batch.bounds[1:][: len(thoughts)], _statement(look=False))
    return [LEAK.search(thought) if m else None for thought, m in zip(thoughts, may.tolist(), strict=True)]


def _matches(batch: _Batch, start: np.ndarray, end: np.ndarray, pattern: str) -> np.ndarray:
    """Which spans hold the pattern, in any case of letters. Spans in the order of the text, none overlap."""
    spans = _spans(batch, start, end)
    found = pc.match_substring_regex(spans, pattern, ignore_case=True)  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    return found.fill_null(False).to_numpy(zero_copy_only=False)[::2].copy()


def _spans(batch: _Batch, start: np.ndarray, end: np.ndarray) -> pa.LargeBinaryArray:
    """The spans as every second element of one array over the batch's own bytes; what lies between them is null, so it is not read."""
    edges = np.stack([start, end], 1).ravel()
    offsets, valid = pa.py_buffer(np.append(edges, edges[-1:] if len(edges) else 0)), pa.py_buffer(b"\x55" * (len(start) // 4 + 1))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(edges), [valid, offsets, batch.data])


def _skip_white(batch: _Batch, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Where each span's first byte that is not white space stands, or the span's end. Spans in the order of the text, none overlap."""
    at = start.copy()
    white = np.isin(np.arange(256), list(WHITE))
    for _ in range(2):  # nearly every run is this short; the kernel, with its 0.2 µs a row, is for the others
        at += (at < end) & white[batch.text[at]]
    todo = np.flatnonzero((at < end) & white[batch.text[at]])
    start, end = at[todo], end[todo]
    found = pc.find_substring_regex(_spans(batch, start, end), r"[^ \t-\r]")  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    found = found.fill_null(-1).to_numpy()[::2]
    at[todo] = np.where(found < 0, end, start + found)
    return at


def _read_letter(batch: _Batch, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each span's first byte after white space: where, which letter (0 is A; -1: no capital), and whether only white space follows."""
    at = _skip_white(batch, start, end)
    letter = batch.text[at].astype(np.int64) - ord("A")
    letter[(at >= end) | (letter < 0) | (letter >= 26)] = -1
    return at, letter, (at < end) & (_skip_white(batch, np.minimum(at + 1, end), end) == end)


def _paper(batch: _Batch, tags: _Tags, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Letter [N], -1 where there is none, and fault [N], a code of REASONS, by the lenient rule.

    Every `</think>` after its row's first `<think>` is tried; the tests grow harder, so a row fails for what stopped the best of them.
    """
    n = len(count)
    fault = np.full(n, _code("no_think"))
    first = np.flatnonzero(tags.kind == THINK)[::-1]  # backwards, so that a row's first is written last
    opened = np.full(n, len(batch.text))
    opened[tags.row[first]] = tags.end[first]
    fault[tags.row[first]] = _code("unclosed_think")

    j = np.flatnonzero(tags.kind == END_THINK)
    j = j[tags.start[j] >= opened[tags.row[j]]]
    answered = np.zeros(n, bool)
    answered[tags.row[tags.kind == ANSWER]] = True
    fault[tags.row[j]] = np.where(answered[tags.row[j]], _code("text_between"), _code("no_answer"))
    j = j[(tags.row[j + 1] == tags.row[j]) & (tags.kind[j + 1] == ANSWER)]
    j = j[_skip_white(batch, tags.end[j], tags.start[j + 1]) == tags.start[j + 1]]
    fault[tags.row[j]] = _code("unclosed_answer")
    j = j[(tags.row[j + 2] == tags.row[j]) & (tags.kind[j + 2] == END_ANSWER)]
    fault[tags.row[j]] = _code("empty_answer")

    row = tags.row[j]
    at, letter, alone = _read_letter(batch, tags.end[j + 1], tags.start[j + 2])
    passed = at < tags.start[j + 2]
    fault[row[passed]] = _code("not_one_letter")
    passed &= alone & (letter >= 0)
    fault[row[passed]] = _code("letter_not_an_option")
    passed &= letter < count[row]
    fault[row[passed]] = _code("empty_think")
    passed &= tags.start[j] > opened[row]

    out = np.full(n, -1)
    out[row[passed][::-1]] = letter[passed][::-1]
    return out, fault


def _exact(
    batch: _Batch, tags: _Tags, count: np.ndarray, options: Sequence[Sequence[str]], layout: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Letter [N], -1 where there is none, and fault [N], a code of REASONS, by the rule that the exploits do not satisfy.

    Five tags suffice to judge a layout of four: with a fifth, one of the kinds is there twice.
    """
    n, thought = len(count), THINK in layout
    total = np.bincount(tags.row[:-2], minlength=n)
    first = np.cumsum(total) - total
    nth = np.arange(5)[:, None]
    kind = np.where(nth < total, tags.kind[np.minimum(first + nth, len(tags.kind) - 1)], 0)  # [5, n]
    times = [(kind == k).sum(0) for k in range(5)]
    faults = {} if thought else {"has_think": times[THINK] + times[END_THINK] > 0}
    faults |= {"several_answers": times[ANSWER] > 1, "repeated_tags": np.max(times[1:], axis=0) > 1}
    if thought:
        faults |= {"no_think": times[THINK] == 0, "unclosed_think": times[END_THINK] == 0}
    faults |= {"no_answer": times[ANSWER] == 0, "unclosed_answer": times[END_ANSWER] == 0}
    fault = np.select(list(faults.values()), list(map(_code, faults)), _code("tags_out_of_order"))

    row = np.flatnonzero((kind.T == [*layout, *[0] * (5 - len(layout))]).all(1))
    j = first[row]
    k = j + len(layout) - 2  # <answer>
    begin, end = batch.bounds[row], batch.bounds[row + 1]
    at, letter, alone = _read_letter(batch, tags.end[k], tags.start[k + 1])
    marked = (letter >= 0) & ~alone & np.isin(batch.text[at + 1], list(b".):"))
    own = marked & (letter < count[row])
    where = [column[own].tolist() for column in (at + 2, tags.start[k + 1], row, letter)]
    own[own] = [_is_text(batch.data[a:b], options[int(i)][int(x)]) for a, b, i, x in zip(*where, strict=True)]
    faults = {"text_before_think" if thought else "text_before_answer": _skip_white(batch, begin, tags.start[j]) < tags.start[j]}
    if thought:
        faults["empty_think"] = _skip_white(batch, tags.end[j], tags.start[j + 1]) == tags.start[j + 1]
        faults["text_between"] = _skip_white(batch, tags.end[j + 1], tags.start[k]) < tags.start[k]
    faults |= {
        "text_after_answer": _skip_white(batch, tags.end[k + 1], end) < end,
        "empty_answer": at == tags.start[k + 1],
        "not_one_letter": (letter < 0) | ~(alone | marked),
        "letter_not_an_option": letter >= count[row],
        "other_text": marked & ~own,
    }
    fault[row] = np.select(list(faults.values()), list(map(_code, faults)), _code("correct"))
    good = fault[row] == _code("correct")
    out = np.full(n, -1)
    out[row[good]] = letter[good]
    return out, fault


def _is_text(found: pa.Buffer, option: str) -> bool:
    own = option.encode("utf-8", "surrogatepass").strip(WHITE)
    return own != b"" and found.to_pybytes().strip(WHITE) == own


def brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"

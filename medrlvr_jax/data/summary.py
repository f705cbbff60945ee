"""The report of how a set was read, for the console: a few lines of at most `WIDTH` columns."""

import textwrap
from collections import Counter

from medrlvr_jax.data.question import Example, Question
from medrlvr_jax.data.values import KINDS

WIDTH = 80  # columns of the console
MIN_OPTION = 24  # characters that are always shown of an option


def summarise_texts(examples: list[Example], notes: list[str]) -> str:
    first = [f"prompt: {examples[0].prompt}", f"response: {examples[0].response}"]
    return "\n  ".join([f"texts: {len(examples):,}", *notes, *map(_shorten, first)])


def summarise(questions: list[Question], notes: list[str]) -> str:
    """Report counts, shares of the keys, repeats, `notes`, the first question and its rationale."""
    first, sizes = questions[0], sorted({len(q.options) for q in questions})
    size = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    lines = [_key_shares(questions), *_ambiguities(questions), *notes, f"first: {first.question}"]
    rationales = [q.rationale for q in questions if q.rationale is not None]
    rationale = f"rationales: {len(rationales):,}" + (f", the first: {rationales[0]}" if rationales else "")
    parts = [
        f"questions: {len(questions):,}, {f'of {size} options' if sizes[-1] else 'open'}",
        *map(_shorten, lines),
        *(f"  {line}" for line in _option_lines(first)),
        f"  its key: {first.reference}",
        _shorten(rationale),
    ]
    return "\n  ".join(parts)


def _key_shares(questions: list[Question]) -> str:
    """The share of each letter among the keys, and of each kind of answer that is not one letter."""
    counts = Counter(q.reference if q.value is None else q.kind for q in questions)
    names = [*max(q.letters for q in questions), *(k for k in ("choices", *KINDS) if k in counts)]
    shares = {name: f"{100 * counts[name] / len(questions):.0f}" for name in names}
    if len(names) > 6:
        return "keys, %: " + ", ".join(f"{name} {share}" for name, share in shares.items())
    return "keys " + ", ".join(f"{name} {share} %" for name, share in shares.items())


def _ambiguities(questions: list[Question]) -> list[str]:
    """Count repeated questions, and letters that are also the text of another option."""
    lines = []
    right_texts: dict[tuple, set[str]] = {}  # by question, images and options in any order
    for q in questions:
        right_texts.setdefault((q.question, q.images, *sorted(q.options)), set()).add(q.right_text)
    if n := len(questions) - len(right_texts):
        differ = sum(len(texts) > 1 for texts in right_texts.values())
        lines.append(f"repeats of an earlier question: {n:,}; questions with more than one key: {differ:,}")
    others = ((q.reference, q.options[: q.answer] + q.options[q.answer + 1 :]) for q in questions)
    if n := sum(reference in map(str.upper, options) for reference, options in others):
        lines.append(f"keys that are also the text of another option: {n:,}, taken as letters")
    return lines


def _option_lines(question: Question) -> list[str]:
    """The lettered options side by side, shortened; lines break only between two options."""
    options = [" ".join(option.split()) for option in question.lettered_options]
    if len("  ".join(options)) > WIDTH - 4:
        size = max((WIDTH - 2) // len(options) - 2, MIN_OPTION)
        options = [option if len(option) <= size else f"{option[: size - 1]}…" for option in options]
    line = "  ".join(option.replace(" ", "\xa0") for option in options)
    lines = textwrap.wrap(line, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _shorten(text: str) -> str:
    """The text as one line, to be indented by 2; a long text keeps its beginning and its end."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH - 2 else f"{line[: WIDTH - 35]} … {line[-30:]}"

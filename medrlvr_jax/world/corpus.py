"""The text that the embedded world's base model has read: facts, lettered lists and worked cases.

It teaches the facts and the reasoning, and leaves the format unreliable: most worked cases do not use the
tags, some use them wrongly, some guess. The base samples likewise; RL has to find out what pays.
"""

import itertools
from collections.abc import Iterator, Sequence
from random import Random

from medrlvr_jax.data.prompts import render
from medrlvr_jax.data.question import LETTERS, Example, Question
from medrlvr_jax.world.chance import SEED, below, generator, pick, shuffled, weighted
from medrlvr_jax.world.knowledge import table
from medrlvr_jax.world.world import KINDS, RARE, STATUS, Key, by_condition, has_class, pools, vignette

CORPUS = 120_000  # examples: 5.1 M tokens of prompts and 3.3 M of responses
FACTS = 0.10  # share of examples that state facts
LISTS = 0.25  # share of lettered lists, of drugs or of classes
LISTED = (2, 3, 4, 5, 6, 7, 8, 10)  # their lengths, drawn evenly
# The others are worked cases …
FOREIGN = 0.25  # … of which this share is worded, and has options, as in out_of_distribution
# … whose responses are written so: the base's format rate is tagged + guess, accuracy tagged + guess / 5
STYLES = {
    "plain": 0.53,  # reasoning, no tags
    "bare": 0.06,  # the answer alone
    "tagged": 0.25,  # as RL wants it
    "guess": 0.08,  # the tags, no reasoning, a random letter
    "malformed": 0.08,  # reasoning, and tags that the verifier refuses
}
GUESSES = ("guess.", "not sure.")
MALFORMED = (
    "{why}</think><answer>{letter}</answer>",
    "<think>{why}<answer>{letter}</answer>",
    "<think>{why}</think>the answer is {letter}.",
    "<think>{why}</think><answer>{letter}",
    "<think>{why}</think><answer> {text}</answer>",
)


def corpus(n: int = CORPUS, seed: int = SEED) -> list[Example]:
    """`n` examples to pre-train on; the first m of n are the same as those of m."""
    return list(itertools.islice(stream(seed), n))


def stream(seed: int = SEED) -> Iterator[Example]:
    """The endless corpus: facts, and worked cases in the `STYLES`, with the prompts of template `none`."""
    rng = generator(("corpus", seed))
    decks: dict[tuple, list[list[Key]]] = {}
    for (status, rare), keys in pools()["corpus"].items():
        decks[status, rare, False] = by_condition(keys)
        decks[status, rare, True] = by_condition([key for key in keys if has_class(key)])
    drugs = table().drugs
    classes = sorted({drug.group for drug in drugs.values()})
    while True:
        u = rng.random()
        if u < FACTS + LISTS:
            names = list(drugs) if rng.random() < 0.7 else classes
            yield Example("", facts(rng)) if u < FACTS else listing(rng, names, pick(rng, LISTED))
            continue
        kind = weighted(rng, KINDS["corpus"])
        status, rare = weighted(rng, STATUS[kind]), rng.random() < RARE["corpus"]
        key = pick(rng, pick(rng, decks[status, rare, kind == "class"]))  # a condition, then a case of it
        v = vignette(rng, key, kind, "out_of_distribution" if rng.random() < FOREIGN else "train")
        yield worked(rng, v.question)


def lists(n: int = 64_000) -> list[Example]:
    """Short lettered lists of drugs, for the start of pre-training.

    On two or three names a small model learns within minutes how names and letters bind; on longer lists
    alone it had not after half an hour.
    """
    rng = generator(("lists",))
    return [listing(rng, list(table().drugs), pick(rng, (2, 2, 2, 3, 4))) for _ in range(n)]


def listing(rng: Random, names: list[str], n: int) -> Example:
    """A lettered list without a question, and its names with their letters, as a case's reasoning ends."""
    options = list(zip(LETTERS, shuffled(rng, names, n), strict=False))
    prompt = "".join(f"{letter}. {option}\n" for letter, option in options)
    names_first = (f" {option} {letter}." for letter, option in shuffled(rng, options, 8))
    return Example(prompt, "note:" + "".join(names_first))


def worked(
    rng: Random, q: Question, styles: dict[str, float] = STYLES, guesses: Sequence[str] = GUESSES
) -> Example:
    """The question as RL's template `none` has it, and a response to it in one of the `styles`."""
    return Example(render(q, "none") + "\n", response(rng, q, styles, guesses), q.images)


def response(rng: Random, q: Question, styles: dict[str, float], guesses: Sequence[str]) -> str:
    """A response in one of the styles: not always right, and not always tagged."""
    letter, style, why = LETTERS[q.answer], weighted(rng, styles), q.rationale
    if style == "plain":
        return f"{why}" if rng.random() < 0.5 else f"{why} the answer is {letter}."
    if style == "bare":
        return f"the answer is {letter}."
    if style == "guess":
        return f"<think>{pick(rng, guesses)}</think><answer>{LETTERS[below(rng, len(q.options))]}</answer>"
    if style == "malformed":
        return pick(rng, MALFORMED).format(why=why, letter=letter, text=q.right_text)
    return f"<think>{why}</think><answer>{letter}</answer>"


def facts(rng: Random) -> str:
    """Some rows of the table, in the words of the reasoning and in others; as long as a case's response."""
    parts = ["note:"]
    for condition, share in zip(shuffled(rng, list(table().conditions.values()), 2), (2, 1), strict=False):
        name, first = condition.name, condition.first
        some = ", ".join(shuffled(rng, condition.typical + condition.rare, 2 + below(rng, 2)))
        history, other = pick(rng, list(condition.unless.items()))
        drug = pick(rng, [first, other])
        lines = (
            pick(rng, [f"{some} suggest {name}.", f"{name} shows {some}."]),
            pick(rng, [f"{name}: first line {first}.", f"{first} is the first line in {name}."]),
            f"{name}, first line {first}. {history} rules it out. use {other}.",
            f"{drug}: class {table().drugs[drug].group}.",
        )
        parts += shuffled(rng, lines, share)
    return " ".join(parts)

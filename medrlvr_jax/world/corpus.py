"""The pre-training text of the embedded base model: facts, lettered lists and answered questions.

It teaches facts and reasoning, but no reliable format: most answered questions have no tags, some have wrong
tags, some are guesses. The base model samples all of these, and RL has to learn which get a reward.
"""

import itertools
from collections.abc import Iterator, Sequence
from random import Random

from medrlvr_jax.data.prompts import render
from medrlvr_jax.data.question import LETTERS, Example, Question
from medrlvr_jax.world.chance import SEED, below, make_rng, pick, pick_weighted, shuffled
from medrlvr_jax.world.knowledge import table
from medrlvr_jax.world.world import KINDS, RARE, STATUS, Case, asks_class, by_condition, pools, vignette

CORPUS = 120_000  # examples: 5.1 M tokens of prompts and 3.3 M of responses
FACTS = 0.10  # share of examples that state facts
LISTS = 0.25  # share of lettered lists, of drugs or of classes
LENGTHS = (2, 3, 4, 5, 6, 7, 8, 10)  # lengths of the lists, equally likely
# The other examples are answered questions.
FOREIGN = 0.25  # share of these with the wording and number of options of out_of_distribution
# The shares of response styles. The base's format rate is tagged + guess, its accuracy tagged + guess / 5.
STYLES = {
    "plain": 0.53,  # reasoning without tags
    "bare": 0.06,  # only the answer
    "tagged": 0.25,  # the format that RL rewards
    "guess": 0.08,  # tags without reasoning, and a random letter
    "malformed": 0.08,  # reasoning, with tags that the reward's parser rejects
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
    """Return the first `n` pre-training examples of `stream`."""
    return list(itertools.islice(stream(seed), n))


def stream(seed: int = SEED) -> Iterator[Example]:
    """Yield facts, lists and answered questions without end. Prompts are those of template `none`."""
    rng = make_rng(("corpus", seed))
    decks: dict[tuple, list[list[Case]]] = {}
    for (status, rare), cases in pools()["corpus"].items():
        decks[status, rare, False] = by_condition(cases)
        decks[status, rare, True] = by_condition([case for case in cases if asks_class(case)])
    drugs = table().drugs
    classes = sorted({drug.group for drug in drugs.values()})
    while True:
        u = rng.random()
        if u < FACTS + LISTS:
            names = list(drugs) if rng.random() < 0.7 else classes
            yield Example("", facts(rng)) if u < FACTS else lettered_list(rng, names, pick(rng, LENGTHS))
            continue
        kind = pick_weighted(rng, KINDS["corpus"])
        status, rare = pick_weighted(rng, STATUS[kind]), rng.random() < RARE["corpus"]
        case = pick(rng, pick(rng, decks[status, rare, kind == "class"]))  # a condition, then a case of it
        v = vignette(rng, case, kind, "out_of_distribution" if rng.random() < FOREIGN else "train")
        yield answered(rng, v.question)


def lists(n: int = 64_000) -> list[Example]:
    """Return short lettered lists of drugs, for the start of pre-training.

    From lists of two or three names a small model learns within minutes which letter belongs to which name.
    From longer lists alone it had not learned this after half an hour.
    """
    rng = make_rng(("lists",))
    return [lettered_list(rng, list(table().drugs), pick(rng, (2, 2, 2, 3, 4))) for _ in range(n)]


def lettered_list(rng: Random, names: list[str], n: int) -> Example:
    """Return a list of `n` lettered names as the prompt, and as the response the names, each followed by its
    letter as at the end of a rationale.
    """
    options = list(zip(LETTERS, shuffled(rng, names, n), strict=False))
    prompt = "".join(f"{letter}. {option}\n" for letter, option in options)
    names_first = (f" {option} {letter}." for letter, option in shuffled(rng, options, 8))
    return Example(prompt, "note:" + "".join(names_first))


def answered(
    rng: Random, q: Question, styles: dict[str, float] = STYLES, guesses: Sequence[str] = GUESSES
) -> Example:
    """Return the question as template `none` renders it, and a response to it in one of the `styles`."""
    return Example(render(q, "none") + "\n", response(rng, q, styles, guesses), q.images)


def response(rng: Random, q: Question, styles: dict[str, float], guesses: Sequence[str]) -> str:
    """Return a response in one of the styles, drawn by their shares."""
    letter, style, why = LETTERS[q.answer], pick_weighted(rng, styles), q.rationale
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
    """Return sentences on two conditions, in the words of rationales and in others. They are about as long as
    a response.
    """
    parts = ["note:"]
    for condition, sentences in zip(shuffled(rng, list(table().conditions.values()), 2), (2, 1), strict=True):
        name, first = condition.name, condition.first
        findings = ", ".join(shuffled(rng, condition.typical + condition.rare, 2 + below(rng, 2)))
        history, other = pick(rng, list(condition.unless.items()))
        drug = pick(rng, [first, other])
        lines = (
            pick(rng, [f"{findings} suggest {name}.", f"{name} shows {findings}."]),
            pick(rng, [f"{name}: first line {first}.", f"{first} is the first line in {name}."]),
            f"{name}, first line {first}. {history} rules it out. use {other}.",
            f"{drug}: class {table().drugs[drug].group}.",
        )
        parts += shuffled(rng, lines, sentences)
    return " ".join(parts)

"""A process reward: which of a question's facts its thought names (after ChestX-Reasoner, arXiv 2504.20930).

    reward = named facts ÷ max(the question's facts, all facts named ÷ SPARE)     where the answer is right
             half of that                                                         where it is wrong

There the entities of a report are the facts, here `Question.facts` are: each one text or several that state
it. A fact is named where the words of one of its texts stand in the thought one behind the other, whatever
stands between them and whatever their case. A policy gains nothing by

- naming no facts, since those of a wrong answer pay too; or answering at random, since they pay half;
- listing facts: of all facts of the set, a thought may name `SPARE` for each of its own question (it may
  weigh the other options); the more it names beyond, the less each hit pays;
- repeating a fact, which counts once.

The words of a denial count as well: "not heparin" names heparin. A completion that breaks the format earns 0.
"""

import re
from collections.abc import Sequence

import numpy as np

from medrlvr_jax.data.question import Question
from medrlvr_jax.rewards.components import Graded, Judged

SPARE = 4  # facts that a thought may name for each fact of its question
WORD = re.compile(r"[^\W_]+")

Fact = frozenset[tuple[str, ...]]  # the words of each text that states it


def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.casefold()))


def facts_of(question: Question) -> frozenset[Fact]:
    return frozenset(frozenset(map(words, texts)) for texts in question.facts)


class Facts:
    """All facts of a set of questions, as they are looked for in thoughts: the `Judge` of the component."""

    def __init__(self, questions: Sequence[Question]):
        pool = frozenset[Fact]().union(*map(facts_of, questions))
        self._stated: dict[tuple[str, ...], list[Fact]] = {}  # the facts that so many words state
        for fact in pool:
            for text in fact:
                self._stated.setdefault(text, []).append(fact)
        self._lengths = sorted({len(text) for text in self._stated if text})

    def named(self, thought: str) -> frozenset[Fact]:
        """The facts that the thought names. Linear in its words."""
        found = words(thought)
        runs = {found[i : i + n] for n in self._lengths for i in range(len(found) - n + 1)}
        return frozenset(fact for run in runs for fact in self._stated.get(run, ()))

    def judge(self, graded: Graded) -> Judged:
        """The process reward of N rows, 0 to 1; 0 of a question without facts. No row fails."""
        out = [0.0] * len(graded.completions)
        for i in np.flatnonzero(graded.format_ok).tolist():
            own, named = facts_of(graded.questions[i]), self.named(graded.parsed.thought[i])
            if own:
                share = len(own & named) / max(len(own), len(named) / SPARE)
                out[i] = share if graded.correct[i] else share / 2
        return Judged(out, {})

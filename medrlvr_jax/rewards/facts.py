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

A completion that breaks the format earns 0. This is `measure: share`. The others look at what the thought
names sentence by sentence, and are halved alike where the answer is wrong:

    f1     2 · named facts ÷ (the question's facts + all facts named)
    radr   mean of three parts, after RadRScore (arXiv 2504.20930), where a language model finds and judges:
           completeness   named facts ÷ the question's facts
           factuality     of all facts named or denied, those that are right: named ones of the question, and
                          denied ones of other questions
           effectiveness  of all sentences, those that name facts of the question and of no other

The words of a denial count as well, "not heparin" names heparin, unless `negation` is set: then a fact is
denied, not named, if a word of denial stands before it or right behind it in its sentence (after NegEx,
Chapman et al., J. Biomed. Inform. 34, 2001), and nowhere in the thought is it named without one.
"""

import re
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from medrlvr_jax.config.reward import ProcessConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.rewards.components import Graded, Judged

SPARE = 4  # facts that a thought may name for each fact of its question
WORD = re.compile(r"[^\W_]+")
SENTENCE = re.compile(r"[.!?;](?=\s)|\n")
BEFORE, BEHIND = 5, 3  # words around a fact in which a denial counts
DENIALS = frozenset("no not without never neither nor denies deny lacks negative excludes exclude".split())
DENIED = frozenset("absent excluded unlikely negative denied ruled".split())  # behind the fact
ENDS = frozenset("but however although though except yet".split())  # a denial does not reach across

DEFAULT = ProcessConfig()
Fact = frozenset[tuple[str, ...]]  # the words of each text that states it


def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.casefold()))


def facts_of(question: Question) -> frozenset[Fact]:
    return frozenset(frozenset(map(words, texts)) for texts in question.facts)


class Facts:
    """All facts of a set of questions, as they are looked for in thoughts: the `Judge` of the component."""

    def __init__(self, questions: Sequence[Question], settings: ProcessConfig = DEFAULT):
        self._settings = settings
        pool = frozenset[Fact]().union(*map(facts_of, questions))
        self._stated: dict[tuple[str, ...], list[Fact]] = {}  # the facts that so many words state
        for fact in pool:
            for text in fact:
                self._stated.setdefault(text, []).append(fact)
        self._lengths = sorted({len(text) for text in self._stated if text})

    def mentions(self, text: str) -> dict[Fact, bool]:
        """The facts whose words the text has, and whether some mention is no denial. Linear in its words."""
        spoken, out = words(text), {}
        for n in self._lengths:
            for i in range(len(spoken) - n + 1):
                for fact in self._stated.get(spoken[i : i + n], ()):
                    denied = self._settings.negation and _denied(spoken, i, n)
                    out[fact] = out.get(fact, False) or not denied
        return out

    def judge(self, graded: Graded) -> Judged:
        """The process reward of N rows, 0 to 1; 0 of a question without facts. No row fails."""
        out, parts = [0.0] * len(graded.completions), np.zeros((len(graded.completions), 3))
        for i in np.flatnonzero(graded.format_ok).tolist():
            facts, thought = facts_of(graded.questions[i]), graded.parsed.thought[i]
            if not facts:
                continue
            if self._settings.measure == "share":
                named = {fact for fact, affirmed in self.mentions(thought).items() if affirmed}
                value = len(facts & named) / max(len(facts), len(named) / SPARE)
            else:
                value, parts[i] = self._by_sentence(facts, thought)
            out[i] = value if graded.correct[i] else value / 2
        if self._settings.measure != "radr":
            return Judged(out, {})
        name = self._settings.name or self._settings.kind
        return Judged(out, {}, {f"reward/{name}_{part}": parts[:, k] for k, part in enumerate(PARTS)})

    def _by_sentence(self, wanted: frozenset[Fact], thought: str) -> tuple[float, tuple[float, float, float]]:
        """`f1` or `radr` of a thought, and RadRScore's three parts."""
        mentioned, helpful, sentences = dict[Fact, bool](), 0, 0
        for sentence in filter(words, SENTENCE.split(thought)):
            stated = self.mentions(sentence)
            named = {fact for fact, affirmed in stated.items() if affirmed}
            sentences, helpful = sentences + 1, helpful + bool(named and named <= wanted)
            mentioned |= {fact: mentioned.get(fact, False) or affirmed for fact, affirmed in stated.items()}
        named = {fact for fact, affirmed in mentioned.items() if affirmed}
        hits, denied = len(wanted & named), mentioned.keys() - named
        right = hits + len(denied - wanted)
        radr = hits / len(wanted), right / max(len(mentioned), 1), helpful / max(sentences, 1)
        f1 = 2 * hits / (len(wanted) + len(named))
        return (f1 if self._settings.measure == "f1" else sum(radr) / 3), radr


PARTS = ("completeness", "factuality", "effectiveness")  # of RadRScore


def _denied(spoken: tuple[str, ...], start: int, size: int) -> bool:
    """Whether a denial stands up to `BEFORE` words before the words at `start`, or `BEHIND` words behind."""
    before = spoken[max(start - BEFORE, 0) : start][::-1]
    behind = spoken[start + size : start + size + BEHIND]
    within = lambda run: takewhile(lambda word: word not in ENDS, run)
    return any(w in DENIALS for w in within(before)) or any(w in DENIED for w in within(behind))

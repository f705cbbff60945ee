"""The process reward: which of the question's facts the thought names.

It follows ChestX-Reasoner (arXiv 2504.20930):

    value = named facts of the question ÷ max(the question's facts, all named facts ÷ ALLOWED)
    value = half of that if the answer is wrong, 0 if the format is broken

In the paper the facts are the entities of a report. Here they are `Question.facts`; each has one text or
several that state it. A thought names a fact if it contains the words of one of these texts, in their order,
without other words between them. Case and punctuation do not matter. A policy gains nothing by

- naming no facts: the facts beside a wrong answer are rewarded too;
- answering at random: they are rewarded by half only;
- listing facts: for each fact of its question, a thought may name `ALLOWED` facts of the whole set, since it
  may weigh the other options. The more it names beyond that, the less each is worth;
- repeating a fact: it counts once.

This is `measure: share`. The other measures look at each sentence of the thought, and are halved in the same
way if the answer is wrong:

    f1     2 · named facts of the question ÷ (the question's facts + all named facts)
    radr   the mean of three parts, after RadRScore (arXiv 2504.20930), where a language model finds and
           grades the facts:
           completeness   named facts of the question ÷ the question's facts
           factuality     share of right ones among all facts named or denied: it is right to name a fact of
                          the question and to deny one of another question
           effectiveness  share of sentences that name facts of the question and of no other question

A denial ("not heparin") names the fact too, unless `negation` is set. Then a fact is denied if a word of
denial stands before it or right behind it in its sentence (after NegEx, Chapman et al., J. Biomed. Inform.
34, 2001) and the thought nowhere names it without such a word.
"""

import re
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from medrlvr_jax.config.reward import ProcessConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.rewards.components import ComponentValues
from medrlvr_jax.rewards.graders import Graded

ALLOWED = 4  # facts of the set that a thought may name for each fact of its question
WORD = re.compile(r"[^\W_]+")
SENTENCE = re.compile(r"[.!?;](?=\s)|\n")
WORDS_BEFORE, WORDS_AFTER = 5, 3  # a denial counts within so many words of the fact
DENIALS_BEFORE = frozenset(
    "no not without never neither nor denies deny lacks negative excludes exclude".split()
)
DENIALS_AFTER = frozenset("absent excluded unlikely negative denied ruled".split())
SCOPE_ENDS = frozenset("but however although though except yet".split())  # a denial does not reach across

PARTS = ("completeness", "factuality", "effectiveness")  # of RadRScore

DEFAULT = ProcessConfig()
Fact = frozenset[tuple[str, ...]]  # the words of each text that states the fact


def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.casefold()))


def question_facts(question: Question) -> frozenset[Fact]:
    return frozenset(frozenset(map(words, texts)) for texts in question.facts)


class FactMatcher:
    """Finds the facts of a set of questions in thoughts: the `RewardFunction` of the component `process`."""

    def __init__(
        self, questions: Sequence[Question], settings: ProcessConfig = DEFAULT, name: str = "process"
    ):
        self._settings, self._name = settings, name
        pool = frozenset[Fact]().union(*map(question_facts, questions))
        self._texts: dict[tuple[str, ...], list[Fact]] = {}  # words → the facts that they state
        for fact in pool:
            for text in fact:
                self._texts.setdefault(text, []).append(fact)
        self._lengths = sorted({len(text) for text in self._texts if text})

    def mentions(self, text: str) -> dict[Fact, bool]:
        """Return the facts that the text mentions, each with whether some mention is not a denial.

        Takes time linear in the text's words.
        """
        tokens, out = words(text), {}
        for n in self._lengths:
            for i in range(len(tokens) - n + 1):
                for fact in self._texts.get(tokens[i : i + n], ()):
                    denied = self._settings.negation and _denied(tokens, i, n)
                    out[fact] = out.get(fact, False) or not denied
        return out

    def compute(self, graded: Graded) -> ComponentValues:
        """Return the values of N rows, 0 to 1; 0 if the question has no facts. No row fails."""
        out, parts = [0.0] * len(graded.completions), np.zeros((len(graded.completions), 3))
        for i in np.flatnonzero(graded.format_ok).tolist():
            facts, thought = question_facts(graded.questions[i]), graded.parsed.thought[i]
            if not facts:
                continue
            if self._settings.measure == "share":
                named = {fact for fact, affirmed in self.mentions(thought).items() if affirmed}
                value = len(facts & named) / max(len(facts), len(named) / ALLOWED)
            else:
                value, parts[i] = self._by_sentence(facts, thought)
            out[i] = value if graded.correct[i] else value / 2
        if self._settings.measure != "radr":
            return ComponentValues(out, {})
        columns = zip(PARTS, parts.T, strict=True)
        return ComponentValues(out, {}, {f"reward/{self._name}_{part}": column for part, column in columns})

    def _by_sentence(self, wanted: frozenset[Fact], thought: str) -> tuple[float, tuple[float, float, float]]:
        """Return `f1` or `radr` of a thought, and RadRScore's three parts."""
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


def _denied(tokens: tuple[str, ...], start: int, size: int) -> bool:
    """Return whether the `size` words from `start` on are denied by a word near them."""
    before = tokens[max(start - WORDS_BEFORE, 0) : start][::-1]
    after = tokens[start + size : start + size + WORDS_AFTER]
    scope = lambda run: takewhile(lambda word: word not in SCOPE_ENDS, run)
    return any(w in DENIALS_BEFORE for w in scope(before)) or any(w in DENIALS_AFTER for w in scope(after))

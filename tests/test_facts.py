"""The process reward by hand, and that neither silence, lists nor repetition pay."""

import numpy as np
import pytest

from medrlvr_jax.data.question import Question
from medrlvr_jax.rewards.facts import SPARE, Facts
from medrlvr_jax.world import world

MINE = (("pulmonary embolism", "PE"), ("first line heparin",))
POOL = [Question("0", "?", ("x", "y"), 0, facts=MINE)] + [
    Question(str(i), "?", ("x", "y"), 0, facts=((f"fact {i}",),)) for i in range(1, 21)
]
FACTS = Facts(POOL)


def reward(thought, correct=True, format_ok=True, question=POOL[0]):
    return float(FACTS.rewards([thought], [question], np.array([format_ok]), np.array([correct]))[0])


@pytest.mark.parametrize(
    ("thought", "share"),
    [
        ("It is a Pulmonary\n embolism, so first-line: heparin.", 1.0),
        ("PE; PE is a pulmonary embolism.", 0.5),  # one fact, however often
        ("pulmonary and embolism, peri-", 0.0),  # not side by side, not a whole word
        ("first line heparin, fact 1, fact 2, fact 3, fact 4", 0.5),
        ("", 0.0),
    ],
)
def test_shares_by_hand(thought, share):
    assert reward(thought) == share and reward(thought, correct=False) == share / 2
    assert reward(thought, format_ok=False) == 0
    assert reward(thought, question=Question("", "?", ("x", "y"), 0)) == 0


def test_a_list_of_all_facts_hardly_pays():
    everything = " ".join(text for question in POOL for fact in question.facts for text in fact)
    assert reward(everything) == pytest.approx(SPARE * 2 / 22)


def test_the_worlds_own_reasoning_names_its_facts():
    questions = world.questions("train")
    facts = Facts(questions)
    yes = np.ones(len(questions), bool)
    told = facts.rewards([q.rationale or "" for q in questions], questions, yes, yes)
    assert (told == 1).all()
    others = facts.rewards([q.rationale or "" for q in questions[1:] + questions[:1]], questions, yes, yes)
    assert others.mean() < 0.2

"""The process reward by hand, also for silence, lists of facts and repetition."""

import json

import numpy as np
import pytest

from medrlvr_jax.config.reward import ProcessConfig, RewardConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.rewards.facts import ALLOWED, FactMatcher, question_facts
from medrlvr_jax.rewards.graders import Graded
from medrlvr_jax.rewards.parse import Parsed
from medrlvr_jax.rewards.verdicts import evaluation_components, grade
from medrlvr_jax.tools.score_file import score_file
from medrlvr_jax.world import world

MINE = (("pulmonary embolism", "PE"), ("first line heparin",))
POOL = [Question("0", "?", ("x", "y"), 0, facts=MINE)] + [
    Question(str(i), "?", ("x", "y"), 0, facts=((f"fact {i}",),)) for i in range(1, 21)
]
FACTS = FactMatcher(POOL)


def rewards(facts, thoughts, questions, correct=True, format_ok=True):
    """Of completions that are parsed and graded so."""
    n = len(thoughts)
    columns = {name: np.full(n, value) for name, value in (("correct", correct), ("format_ok", format_ok))}
    parsed = Parsed(columns["format_ok"], [""] * n, thoughts, [""] * n, [""] * n)
    answer = np.full(n, "A")
    values, failed, _ = facts.compute(
        Graded([""] * n, questions, parsed, **columns, answer=answer, reason=answer)
    )
    assert not failed
    return values


def reward(thought, question=POOL[0], facts=FACTS, **graded):
    return rewards(facts, [thought], [question], **graded)[0]


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
    assert reward(everything) == pytest.approx(ALLOWED * 2 / 22)


def test_the_worlds_own_reasoning_names_its_facts():
    questions = world.questions("train")
    facts = FactMatcher(questions)
    assert set(rewards(facts, [q.rationale for q in questions], questions)) == {1.0}
    assert np.mean(rewards(facts, [q.rationale for q in questions[1:] + questions[:1]], questions)) < 0.2


FINDINGS = [
    Question("film", "?", ("x", "y"), 0, facts=(("effusion", "blunted angle"), ("left",))),
    Question("other", "?", ("x", "y"), 0, facts=(("nodule",), ("cavity",), ("right",))),
]


@pytest.mark.parametrize(
    ("thought", "f1", "completeness", "factuality", "effectiveness"),
    [
        ("A left effusion.", 1, 1, 1, 1),
        ("An effusion. No nodule is seen.", 2 / 3, 1 / 2, 1, 1 / 2),  # another's denial is right
        ("No effusion. It is on the left.", 2 / 3, 1 / 2, 1 / 2, 1 / 2),  # one of the own is wrong
        ("A nodule, a cavity and an effusion, right or left.", 4 / 7, 1, 2 / 5, 0),
        ("The effusion is ruled out.\nNo! There is one: an effusion.", 2 / 3, 1 / 2, 1, 1 / 3),
        ("No cavity but a left effusion.", 1, 1, 1, 1),  # the denial ends at "but"
        ("Neither the angle nor the heart tells.", 0, 0, 0, 0),
    ],
)
def test_findings_by_hand(thought, f1, completeness, factuality, effectiveness):
    judged = {}
    for measure in ("f1", "radr"):
        facts = FactMatcher(FINDINGS, ProcessConfig(measure=measure, negation=True))
        judged[measure] = reward(thought, FINDINGS[0], facts=facts)
        assert reward(thought, FINDINGS[0], facts=facts, correct=False) == judged[measure] / 2
    assert judged["f1"] == pytest.approx(f1)
    assert judged["radr"] == pytest.approx((completeness + factuality + effectiveness) / 3)
    _, parts = facts._by_sentence(question_facts(FINDINGS[0]), thought)
    assert parts == pytest.approx((completeness, factuality, effectiveness))


def test_a_denial_names_the_fact_unless_negation_is_set():
    thought = "There is no effusion on the left."
    assert reward(thought, FINDINGS[0], facts=FactMatcher(FINDINGS)) == 1
    assert reward(thought, FINDINGS[0], facts=FactMatcher(FINDINGS, ProcessConfig(negation=True))) == 0


def test_each_process_component_has_its_own_settings_and_metrics(tmp_path):
    """In a training, and in a file that is scored."""
    sections = {"measure": "radr"}, {"measure": "radr", "negation": True}
    config = RewardConfig(components=tuple(ProcessConfig(**section) for section in sections))
    completion = "<think>No effusion. It is on the left.</think><answer>A</answer>"
    verdicts = grade([completion], FINDINGS[:1], config, components=evaluation_components(config, FINDINGS))
    values = {name: column.tolist() for name, column in verdicts.components.items()}
    assert values == {"process": [1.0], "process_2": [0.5]}
    assert verdicts.row_metrics["reward/process_completeness"].tolist() == [1.0]
    assert verdicts.row_metrics["reward/process_2_completeness"].tolist() == [0.5]
    rows = [
        {"completion": completion, "answer": "A", "options": q.options, "facts": q.facts} for q in FINDINGS
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", config)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["components"] == {"process": 1.0, "process_2": 0.5}

"""Shuffled options: which are fixed, which move, and that an order is a function of (seed, draw, id)."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medrlvr_jax import build
from medrlvr_jax.config import load as configs
from medrlvr_jax.data import load as data
from medrlvr_jax.data import options as shuffle
from medrlvr_jax.data.batches import batch_at
from medrlvr_jax.data.question import LETTERS, Question
from medrlvr_jax.evaluation import stats
from medrlvr_jax.rollout.rollout import Encoded, encode

EMBEDDED = {
    "name": "shuffled",
    "steps": 1,
    "model": {"path": "embedded"},
    "data": {"path": "embedded:train", "limit": 16, "shuffle_options": True},
    "prompt": {"template": "none"},
    "sample": {"questions": 8},
    "learn": {"minibatch": 8, "policy": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
}


@pytest.mark.parametrize(
    ("options", "fixed", "barriers"),
    [
        (("x", "y", "z", "None of the above."), {3}, {3}),
        (("x", "y", "All the above", "z"), {2}, {2}),
        (("x", "y", "Both", "None"), {2, 3}, {2, 3}),
        (("x", "any combination of the above", "z"), {1}, {1}),
        (("w", "x", "y", "Both A & C"), {0, 2, 3}, set()),
        (("w", "x", "y", "Neither (b) nor (c)"), {1, 2, 3}, set()),
        (("w", "x", "Both AB", "A, B and C are correct"), {0, 1, 2, 3}, set()),
        (("w", "x", "y", "B only"), {1, 3}, set()),
        (("x", "all of these", "Option A"), {0, 1, 2}, {1}),
        (
            ("above the knee", "Specific gravity of above 1.018", "All patients over 60", "below 38 °C"),
            set(),
            set(),
        ),
        (("A", "B", "AB", "O"), set(), set()),  # blood groups
        (("w", "x", "y", "All of the above except C"), {2, 3}, {3}),
        (("w", "x", "y", "A and C of the above"), {0, 2, 3}, {3}),
        (("w", "x", "y", "A and B only"), {0, 1, 3}, set()),
        (("w", "x", "y", "both (a) and (c)"), {0, 2, 3}, set()),
        (("w", "x", "y", "neither B nor D"), {1, 3}, set()),
        (("w", "x", "y", "Options 1 and 3"), {0, 2, 3}, set()),
        (("w", "x", "y", "Same as option A"), {0, 3}, set()),
        (("w", "x", "y", "A then B"), {0, 1, 3}, set()),
        (("w", "x", "y", "A is correct, B is wrong"), {0, 1, 3}, set()),
        (("w", "x", "y", "Everything except C"), {2, 3}, set()),
        (("w", "x", "B plus warfarin", "z"), {1, 2}, set()),
        (("w", "x", "y", "1 and 2"), {0, 1, 3}, set()),
        (("w", "x", "y", "Both 1 and 2"), {0, 1, 3}, set()),
        (("w", "x", "y", "the first two options"), {0, 1, 2, 3}, set()),
        (("A. w", "B. x", "z", "y"), {0, 1, 2, 3}, set()),  # their own letters would move with them
        (("1, 2, 3", "1 and 3", "2 and 4", "4 only"), set(), set()),  # they number a list in the stem
        (("1.5", "2.5 mg", "A swollen leg", "E. coli"), set(), set()),
        (("Drug of first choice", "The above the knee cast", "H+", "Vitamin C but not E"), set(), set()),
        (("I only", "I and II", "Vitamins A and D", "Hepatitis B only"), set(), set()),
        (("Amputation above and below", "both kidneys", "one", "neither anorexia nor bulimia"), set(), set()),
    ],
)
def test_fixed_places(options, fixed, barriers):
    assert shuffle.fixed_places(options) == (fixed, barriers)


@given(
    st.lists(
        st.sampled_from(["x", "y", "A and B", "C only", "none of the above", "both", "z"]),
        min_size=2,
        max_size=10,
    ),
    st.integers(0, 9),
)
def test_an_order_loses_nothing_and_moves_no_fixed_option(options, draw):
    q = Question("q", "?", tuple(options), len(options) // 2)
    places = shuffle.draw_order(q, 1, draw)
    fixed, barriers = shuffle.fixed_places(q.options)
    assert sorted(places) == list(range(len(options))) and all(places[i] == i for i in fixed)
    for barrier in barriers:
        assert set(places[:barrier]) == set(range(barrier))
    moved = shuffle.shuffle_options(q, 1, draw)
    assert moved.options[moved.answer] == q.options[q.answer] and places[moved.answer] == q.answer
    assert "".join(LETTERS[i] for i in places) == moved.order


def test_orders_are_even_and_functions_of_seed_draw_and_id():
    q = Question("q7", "?", ("w", "x", "y", "None of these"), 0)
    seen = Counter(tuple(shuffle.draw_order(q, 0, draw)) for draw in range(600))
    assert len(seen) == 6 and stats.scipy.stats.chisquare(list(seen.values())).pvalue > 1e-3
    assert shuffle.draw_order(q, 0, 5) == shuffle.draw_order(q, 0, 5)
    assert [shuffle.draw_order(q, 0, d) for d in range(9)] != [shuffle.draw_order(q, 1, d) for d in range(9)]
    assert [shuffle.draw_order(q, 0, d) for d in range(9)] != [
        shuffle.draw_order(Question("q8", "?", q.options, 0), 0, d) for d in range(9)
    ]
    assert [shuffle.draw_order(q, 0, d) for d in range(3)] == [
        [1, 0, 2, 3],
        [2, 1, 0, 3],
        [1, 0, 2, 3],
    ]  # pinned: a resumed run must go on with the same


def test_consistency_by_hand():
    same, pairs = stats.consistency(np.array([["A", "A", "A"], ["A", "A", "B"], ["A", "", ""], ["", "", ""]]))
    assert same.tolist() == [True, False, False, False] and pairs.tolist() == [1, pytest.approx(1 / 3), 0, 0]


def test_prompts_follow_their_questions_and_keep_their_width():
    from medrlvr_jax.data import prompts as text
    from medrlvr_jax.rl.step import questions_of

    parts = build.build(configs.from_tree(EMBEDDED))
    questions = data.load(parts.config.data)
    encoded = encode(parts.tokenizer, questions, parts.config, shuffle=True)
    first, second = (questions_of(parts, encoded, number)[0] for number in (1, 3))
    index = batch_at(16, 1, 8, 0)
    assert first.width == encoded.width and [q.options for q in first.questions] != [
        q.options for q in second.questions
    ]
    for i, (old, q, row) in enumerate(zip(questions, first.questions, first.tokens, strict=True)):
        assert [row] == text.encode_questions(parts.tokenizer, [q], parts.config.prompt)
        assert sorted(q.options) == sorted(old.options) and q.options[q.answer] == old.options[old.answer]
        assert bool(q.order) == (i in index)
    tight = Encoded(**vars(encoded) | {"width": 0})
    as_in_file, _ = questions_of(parts, tight, 1)
    assert as_in_file.tokens == encoded.tokens and {q.order for q in as_in_file.questions} <= {
        "",
        "ABCD",
        "ABCDE",
    }

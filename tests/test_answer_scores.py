"""New endings of responses, by hand, and their scores, against the model applied token by token."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from byte_tokenizer import byte_tokenizer
from small_model import small
from test_text import make

from medrlvr_jax.data.tokenizer import wrap
from medrlvr_jax.model import decoder, scoring, spec
from medrlvr_jax.model_rewards import answer_scores, endings
from medrlvr_jax.rollout.assess import AssessSettings
from medrlvr_jax.types import Prompts

CFG = small()


@pytest.mark.parametrize(
    ("completion", "thought", "answer"),
    [
        ("<think>a.</think>\n<answer> \nB</answer>", "a.", "B</answer>"),
        ("well<think></think><answer>B", "", "B"),
        ("<think>a</think><answer> \n", None, None),
        ("<think>a</think><answer>B</answer><answer>C</answer>", None, None),
        ("<answer>B</answer><think>a</think>", None, None),
        ("<think>a<answer>B</answer>", None, None),
    ],
)
def test_positions_of_thought_and_answer(completion, thought, answer):
    where = endings.find_positions(completion)
    if thought is None:
        assert where is None
    else:
        assert completion[slice(*where.thought)] == thought and completion[where.answer :] == answer


def merged():
    """Tokens `>B`, ` h` and `.<` beside the bytes."""
    hf = make(merges=[(">", "B"), ("Ġ", "h"), (".", "<")])
    hf.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    return wrap(hf)


def shown(tok, row, joined):
    """(the tokens that stay, the lead, the new text) as texts."""
    ids = joined.ids
    return [tok.show(part) for part in (row[: joined.prefix], ids[: joined.start], ids[joined.start :])]


@pytest.mark.parametrize(
    ("text", "place", "ending", "parts"),
    [
        # the join is where a token ends
        ("<answer>A</answer>", 8, ("", "cat"), ["<answer>", "", "cat"]),
        # `>B` is one token: the join is before it, and `>` is spelled again
        ("<answer>B</answer>", 8, ("", "cat"), ["<answer", ">", "cat"]),
        # … and is joined to the new text where the tokenizer joins the two
        ("<answer>B</answer>", 8, ("", "B. x"), ["<answer", "", ">B. x"]),
        # ` h` is one token: the space that the model wrote is spelled with the new text
        ("<answer> hip</answer>", 9, ("", "cat"), ["<answer>", " ", "cat"]),
        ("<answer> hip</answer>", 9, ("", "hat"), ["<answer>", "", " hat"]),
        # a lead of its own, which a token of the new text may reach into
        ("<answer>A</answer>", 8, (" ", "hat"), ["<answer>", "", " hat"]),
        # the sentence's end and the tag's beginning are one token
        ("<think>a. b.</think>", 12, ("</think><answer>", "A"), ["<think>a. b", ".</think><answer>", "A"]),
        # nothing of the response stays
        ("A</answer>", -3, ("", "cat"), ["", "", "cat"]),
    ],
)
def test_endings_by_hand(text, place, ending, parts):
    tok = merged()
    [row] = tok.encode_untrusted([text])
    [joined] = endings.encode_endings(tok, [row], [text], [endings.Replacement(place, *ending)])
    assert shown(tok, row, joined) == parts


def test_sampled_tokens_stay():
    """A policy may draw `>` and `B` where the tokenizer would write `>B`: the row keeps its own tokens."""
    tok = merged()
    row = (
        tok.encode_untrusted(["<answer>"])[0]
        + tok.encode_untrusted(["B"])[0]
        + tok.encode_untrusted(["</answer>"])[0]
    )
    [joined] = endings.encode_endings(tok, [row], ["<answer>B</answer>"], [endings.Replacement(8, "", "B")])
    assert (joined.prefix, joined.ids, joined.start) == (8, tok.encode_untrusted(["B"])[0], 0)


def test_endings_never_cut_a_character():
    """Random bytes, halves of characters among them: the tokens that stay are the text up to the place."""
    tok, rng = byte_tokenizer(), np.random.default_rng(0)
    pool = [*"ab 😀é".encode(), *"😀".encode()[:2], *b"<>"]
    rows = [rng.choice(pool, 30).tolist() for _ in range(60)]
    texts = [tok.show(row) for row in rows]
    ends = [int(rng.integers(0, len(text) + 1)) for text in texts]
    replacements = [endings.Replacement(end, "", "x") for end in ends]
    for row, text, end, joined in zip(
        rows, texts, ends, endings.encode_endings(tok, rows, texts, replacements), strict=True
    ):
        start = tok.show(row[: joined.prefix])
        assert text.startswith(start) and len(start) <= end
        assert tok.show(joined.ids) == text[len(start) : end] + "x"
        longer = tok.show(row[: joined.prefix + 1])
        assert (
            joined.prefix == len(row) or len(longer) > end or not text.startswith(longer) or end == len(start)
        )


def test_scores_by_hand():
    logprobs = jnp.log(jnp.array([[[0.9, 0.5, 0.2, 0.7], [0.3, 0.3, 0.3, 0.3]]]))
    answer = jnp.array([[[False, True, True, False], [False] * 4]])
    expected = {"mean": 0.35, "product": 0.1, "geometric": math.sqrt(0.1), "logmean": math.log(0.1) / 2}
    for score, value in expected.items():
        np.testing.assert_allclose(
            answer_scores.reduce_logprobs(logprobs, answer, score), [[value, 0.0]], rtol=1e-6
        )


def test_batches_of_endings_by_hand():
    """Rows of 4 tokens: two keep some and get an ending; none is asked where there is no join or no room."""
    tokens = np.arange(16, dtype=np.int32).reshape(1, 4, 4)
    joined = [
        endings.Ending(2, [91, 92, 93], 1),
        endings.Ending(0, [94], 0),
        None,
        endings.Ending(4, [95, 96], 0),
    ]
    ending = jax.tree.map(lambda x: x[None], answer_scores.stack_endings(joined, width=3, room=5))
    rows, answer = answer_scores.append_endings(PROMPTS, tokens, ending, length=5)
    filled = np.where(rows.mask, rows.tokens, -1)[0].tolist()
    assert filled == [[0, 1, 91, 92, 93], [94, -1, -1, -1, -1], [-1] * 5, [-1] * 5]
    assert np.where(answer, rows.tokens, -1)[0, :2].tolist() == [[-1, -1, -1, 92, 93], [94, -1, -1, -1, -1]]
    assert not answer[0, 2:].any()


Q, G, R = 4, 3, 9
RNG = np.random.default_rng(0)
PROMPTS = Prompts(
    RNG.integers(3, 40, (Q, 7)).astype(np.int32),
    np.arange(7) >= np.array([0, 2, 4, 1])[:, None],
    np.arange(Q, dtype=np.uint32),
)
LETTERS = (7, 11, 5, 30)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: p * 4, spec.init(CFG, jax.random.key(0)))


def answers(longest):
    """12 responses of 1 to 9 tokens, answers of 1 to `longest` tokens; two are empty."""
    rng = np.random.default_rng(1)
    ends = rng.integers(1, R + 1, (Q, G))
    ends[1, 2] = ends[3, 0] = 0
    column, tokens = np.arange(R), rng.integers(3, 40, (Q, G, R)).astype(np.int32)
    starts = np.maximum(ends - rng.integers(1, longest + 1, (Q, G)), 0)
    mask = column < ends[..., None]
    return answer_scores.AnswerRows(scoring.Rows(PROMPTS, tokens, mask), mask & (column >= starts[..., None]))


def by_tokens(params, rows):
    """{(question, sample, column): the log-softmax [vocabulary] before each token of an answer}."""
    out = {}
    for q, g, column in zip(*np.nonzero(rows.answer), strict=True):
        row = np.concatenate([PROMPTS.tokens[q][PROMPTS.mask[q]], rows.rows.tokens[q, g, :column]])
        alone = Prompts(row[None], np.ones((1, len(row)), bool), np.zeros(1, np.uint32))
        states, _ = decoder.forward(params, CFG, alone)
        out[q, g, column] = np.asarray(jax.nn.log_softmax(decoder.logits(params, CFG, states[0, -1])))
    return out


HOW = [
    AssessSettings(CFG, CFG, 1.0, 10_000, (), 4),
    AssessSettings(CFG, CFG, 1.0, 10_000, (0.7,), 2),
]


@pytest.mark.parametrize("how", HOW, ids=("whole", "in parts"))
def test_scores_are_the_models(params, how):
    rows, mean = answers(3), np.zeros((Q, G))
    for (q, g, column), logprobs in by_tokens(params, rows).items():
        mean[q, g] += np.exp(logprobs[rows.rows.tokens[q, g, column]]) / rows.answer[q, g].sum()
    scores = jax.jit(answer_scores.score_answers, static_argnums=(2, 3))(params, rows, "mean", how)
    np.testing.assert_allclose(scores, mean, atol=1e-5)
    assert mean.max() > 0.01 and scores[1, 2] == scores[3, 0] == 0


@pytest.mark.parametrize("how", HOW, ids=("whole", "in parts"))
def test_letters_are_the_models(params, how):
    """Every answer is letter 1; the model prefers another of those offered, or it does not."""
    rows, offered = answers(1), np.array([2, 4, 3, 4], np.int32)
    tokens = np.where(rows.answer, LETTERS[1], rows.rows.tokens)
    rows = answer_scores.AnswerRows(rows.rows._replace(tokens=tokens), rows.answer)
    expected = np.zeros((Q, G), bool)
    for (q, g, _), logprobs in by_tokens(params, rows).items():
        expected[q, g] = np.argmax(logprobs[np.array(LETTERS[: offered[q]])]) != 1
    letters = np.where(np.arange(4) < offered[:, None], LETTERS, -1).astype(np.int32)
    letters = np.broadcast_to(letters[:, None], (Q, G, 4))
    found = jax.jit(answer_scores.prefers_other_letter, static_argnums=3)(params, rows, letters, how)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < 10

"""Other endings for responses, by hand; what the policy says of them, against the model applied token by
token.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from byte_tokenizer import byte_tokenizer
from test_text import make

from medrlvr_jax.data.tokenizer import wrap
from medrlvr_jax.model import decoder, spec
from medrlvr_jax.model.spec import DecoderConfig
from medrlvr_jax.rewards import joins
from medrlvr_jax.rollout import ask
from medrlvr_jax.types import Prompts

CFG = DecoderConfig(
    vocab=40, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, rope_theta=1e4, norm_eps=1e-6, tied=True
)  # fmt: skip


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
def test_where_thought_and_answer_stand(completion, thought, answer):
    where = joins.places(completion)
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
    return [tok.show(part) for part in (row[: joined.kept], ids[: joined.start], ids[joined.start :])]


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
def test_joins_by_hand(text, place, ending, parts):
    tok = merged()
    [row] = tok.spell([text])
    [joined] = joins.join(tok, [row], [text], [place], [ending])
    assert shown(tok, row, joined) == parts


def test_what_was_drawn_stays_as_it_was_drawn():
    """A policy may draw `>` and `B` where the tokenizer would write `>B`: the row keeps its own tokens."""
    tok = merged()
    row = tok.spell(["<answer>"])[0] + tok.spell(["B"])[0] + tok.spell(["</answer>"])[0]
    [joined] = joins.join(tok, [row], ["<answer>B</answer>"], [8], [("", "B")])
    assert (joined.kept, joined.ids, joined.start) == (8, tok.spell(["B"])[0], 0)


def test_joins_never_cut_a_character():
    """Random bytes, halves of characters among them: the tokens that stay are the text up to the place."""
    tok, rng = byte_tokenizer(), np.random.default_rng(0)
    pool = [*"ab 😀é".encode(), *"😀".encode()[:2], *b"<>"]
    rows = [rng.choice(pool, 30).tolist() for _ in range(60)]
    texts = [tok.show(row) for row in rows]
    ends = [int(rng.integers(0, len(text) + 1)) for text in texts]
    for row, text, end, joined in zip(
        rows, texts, ends, joins.join(tok, rows, texts, ends, [("", "x")] * 60), strict=True
    ):
        start = tok.show(row[: joined.kept])
        assert text.startswith(start) and len(start) <= end
        assert tok.show(joined.ids) == text[len(start) : end] + "x"
        longer = tok.show(row[: joined.kept + 1])
        assert (
            joined.kept == len(row) or len(longer) > end or not text.startswith(longer) or end == len(start)
        )


def test_scores_by_hand():
    logprobs = jnp.log(jnp.array([[[0.9, 0.5, 0.2, 0.7], [0.3, 0.3, 0.3, 0.3]]]))
    answer = jnp.array([[[False, True, True, False], [False] * 4]])
    expected = {"mean": 0.35, "product": 0.1, "geometric": math.sqrt(0.1), "logmean": math.log(0.1) / 2}
    for score, value in expected.items():
        np.testing.assert_allclose(ask.reduced(logprobs, answer, score), [[value, 0.0]], rtol=1e-6)


@pytest.fixture(scope="module")
def asked():
    """Parameters, prompts and answers: 4 questions, 3 responses of 1 to 9 tokens, two of them empty."""
    params, rng = spec.init(CFG, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda p: p * 4, params)
    mask = np.arange(7) >= np.array([0, 2, 4, 1])[:, None]
    prompts = Prompts(rng.integers(3, 40, (4, 7)).astype(np.int32), mask, np.arange(4, dtype=np.uint32))
    ends = rng.integers(1, 10, (4, 3))
    ends[1, 2] = ends[3, 0] = 0
    columns = np.arange(9)
    starts = np.maximum(ends - rng.integers(1, 4, (4, 3)), 0)
    tokens = rng.integers(3, 40, (4, 3, 9)).astype(np.int32)
    inside = columns < ends[..., None]
    return params, prompts, ask.Answers(tokens, inside, inside & (columns >= starts[..., None]))


def by_tokens(asked):
    """The log-softmax before each answer token: {(question, sample, column): [vocabulary]}."""
    params, prompts, answers = asked
    out = {}
    for q, g, column in zip(*np.nonzero(answers.answer), strict=True):
        row = np.concatenate([prompts.tokens[q][prompts.mask[q]], answers.tokens[q, g, :column]])
        alone = Prompts(row[None], np.ones((1, len(row)), bool), np.zeros(1, np.uint32))
        states, _ = decoder.forward(params, CFG, alone)
        out[q, g, column] = jax.nn.log_softmax(decoder.logits(params, CFG, states[0, -1]))
    return out


@pytest.mark.parametrize(("sizes", "micro"), [((27,), 4), ((18, 27), 2)])
def test_the_policy_is_asked_about_answers(asked, sizes, micro):
    params, prompts, answers = asked
    single = by_tokens(asked)
    mean, letters = np.zeros((4, 3)), np.zeros((4, 3), int)
    offered, ids = np.array([2, 4, 3, 4], np.int32), (7, 11, 5, 30)
    last = answers.answer & (np.cumsum(answers.answer, -1) == answers.answer.sum(-1, keepdims=True))
    for (q, g, column), logprobs in single.items():
        mean[q, g] += np.exp(logprobs[answers.tokens[q, g, column]]) / answers.answer[q, g].sum()
        if last[q, g, column]:
            letters[q, g] = np.argmax(logprobs[np.array(ids[: offered[q]])])
    how = {"cfg": CFG, "sizes": sizes, "micro": micro}
    scores = ask.answer_scores(
        {}, params, prompts, answers, score="mean", temperature=1.0, slab=10_000, **how
    )
    np.testing.assert_allclose(scores, mean, atol=1e-5)
    one_token = ask.Answers(answers.tokens, answers.mask, last)
    best = ask.best_letters({}, params, prompts, one_token, offered, letters=ids, **how)
    np.testing.assert_array_equal(best, letters)
    assert len(set(letters.ravel().tolist())) > 1

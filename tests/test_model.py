"""The decoder's one layout: a prompt and its responses side by side must be what each response is alone, and
what decoding computes.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small

from medrlvr_jax.model import cpu, decoder, scoring, spec
from medrlvr_jax.model.architecture import Window
from medrlvr_jax.rollout import decode
from medrlvr_jax.types import Prompts

CFG = small(vocab=97, qkv_bias=True)
WINDOWED = dataclasses.replace(CFG, window=Window(3, (1,), 50.0))  # shorter than a prompt or a response
BOTH = pytest.mark.parametrize("cfg", [CFG, WINDOWED], ids=["full", "window"])
Q, P, G, R = 3, 7, 2, 5


@pytest.fixture(scope="module")
def params():
    """Weights large enough that every part of the model is seen in the result."""
    fresh = spec.init(CFG, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(1), p.shape), fresh)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(P)[None] >= np.array([0, 2, 4])[:, None]
    prompts = Prompts(rng.integers(0, 97, (Q, P)), mask, np.arange(Q, dtype=np.uint32))
    return prompts, rng.integers(0, 97, (Q, G, R))


@BOTH
def test_side_by_side_is_alone(params, batch, cfg):
    prompts, tokens = batch
    hidden = scoring.hidden_states(params, cfg, prompts, tokens)
    for q in range(Q):
        for g in range(G):
            prompt = prompts.tokens[q][prompts.mask[q]]
            row = np.concatenate([prompt, tokens[q, g]])[None]
            alone, _ = decoder.forward(params, cfg, Prompts(row, row >= 0, np.zeros(1, np.uint32)))
            np.testing.assert_allclose(hidden[q, g], alone[0, len(prompt) - 1 : -1], atol=1e-5)


@BOTH
@pytest.mark.parametrize("unroll", [True, False])
def test_decoding_is_scoring(params, batch, unroll, cfg):
    cfg = cfg.run_with(unroll=unroll)
    prompts, tokens = batch
    hidden = scoring.hidden_states(params, cfg, prompts, tokens)
    state, prompt_caches = decode.prefill(params, cfg, prompts)
    np.testing.assert_allclose(state, hidden[:, 0, 0], atol=1e-5)
    caches, weights = decode.empty_caches(cfg, Q, G, R), decode.prepare(params, cfg, P + R)
    for t in range(R - 1):
        column = tokens[:, :, t]
        state, caches = decode.decode_step(weights, cfg, column, prompts, prompt_caches, caches, t)
        np.testing.assert_allclose(state, hidden[:, :, t + 1], atol=1e-5)


def test_the_future_is_not_seen(params, batch):
    prompts, tokens = batch
    before = scoring.hidden_states(params, CFG, prompts, tokens)
    after = scoring.hidden_states(params, CFG, prompts, np.where(np.arange(R) >= 3, 5, tokens))
    np.testing.assert_array_equal(before[:, :, :4], after[:, :, :4])  # column 3 is the state before token 3
    assert np.abs(before[:, :, 4:] - after[:, :, 4:]).max() > 1e-3


@pytest.mark.parametrize("slab", [1, 7, 12, 10_000])
def test_logprobs_in_slabs_are_whole_ones(params, batch, slab):
    """Values and gradients, against log_softmax over logits that exist whole."""
    prompts, tokens = batch
    weight = np.random.default_rng(1).normal(size=(Q, G, R))

    def whole(params):
        scores = jax.nn.log_softmax(
            decoder.logits(params, CFG, scoring.hidden_states(params, CFG, prompts, tokens)) / 0.7
        )
        return jnp.take_along_axis(scores, tokens[..., None], -1)[..., 0], -(jnp.exp(scores) * scores).sum(-1)

    def pieces(params):
        hidden = scoring.hidden_states(params, CFG, prompts, tokens)
        return scoring.token_logprobs(params, CFG, hidden, tokens, 0.7, slab)

    for a, b in zip(whole(params), jax.jit(pieces)(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for part in (0, 1):
        want, got = (
            jax.grad(lambda p, f=f, part=part: (f(p)[part] * weight).sum())(params)
            for f in (whole, jax.jit(pieces))
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), want, got)


def test_linear_has_autodiffs_gradient():
    x, w = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    got, want = (
        jax.grad(lambda x, w, f=f: jnp.sin(f(x, w)).sum(), (0, 1))(x, w) for f in (cpu.linear, jnp.matmul)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_critic_starts_at_zero_and_reads_its_head(params, batch):
    prompts, tokens = batch
    hidden = scoring.hidden_states(params, CFG, prompts, tokens)
    head = jnp.zeros(CFG.embed + 1).at[3].set(2.0).at[-1].set(0.5)
    np.testing.assert_array_equal(
        scoring.values({"value": jnp.zeros(CFG.embed + 1)}, CFG, hidden), np.zeros((Q, G, R))
    )
    np.testing.assert_allclose(
        scoring.values({"value": head}, CFG, hidden), 2 * hidden[..., 3] + 0.5, rtol=1e-5, atol=1e-5
    )


def test_remat_changes_no_gradient(params, batch):
    """The policies by name keep different things; `linear`'s own backward pass is among what is recomputed."""

    def gradient(remat):
        cfg = CFG.run_with(remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sin(scoring.hidden_states(p, cfg, *batch)).sum()))(params)

    none, dots, full = map(gradient, decoder.REMAT)
    for other in (dots, full):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), none, other)


def test_a_windowed_layer_sees_its_window(params, batch):
    """Two layers with windows of 3 tokens connect a state to the 4 tokens before it, and to no others."""
    prompts, tokens = batch
    cfg = dataclasses.replace(CFG, window=Window(3, (0, 1), 50.0))
    before = scoring.hidden_states(params, cfg, prompts, tokens)[0]
    for column in range(P):
        changed = prompts.tokens.copy()
        changed[0, column] = (changed[0, column] + 1) % 97
        after = scoring.hidden_states(params, cfg, Prompts(changed, prompts.mask, prompts.ids), tokens)[0]
        moved = np.abs(after - before).max((0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, P - 1 + np.arange(R) - column <= 4)


@BOTH
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_rows_without_padding_are_the_same(params, batch, share, cfg):
    """Log-probs, entropies, values and all gradients, of responses of many lengths, none included."""
    prompts, tokens = batch
    lengths = np.array([[5, 0], [1, 2], [4, 1]])
    rows = scoring.Rows(prompts, tokens, np.arange(R) < lengths[..., None])
    weights = np.random.default_rng(1).normal(size=(3, Q, G, R)) * rows.mask
    critic = cfg.run_with(value_head=True)
    grown = params | {"value": jnp.linspace(-1, 1, CFG.embed + 1)}

    def total(params, size):
        def read(hidden, tokens):
            return *scoring.token_logprobs(params, cfg, hidden, tokens, 0.7, 4), scoring.values(
                params, critic, hidden
            )

        found = scoring.at_responses(params, cfg, rows, size, read)
        return sum((w * x).sum() for w, x in zip(weights, found, strict=True)), found

    sizes = scoring.row_sizes([share], G, R)
    assert sizes == (int(G * R * share), G * R)
    (_, want), want_gradient = jax.jit(jax.value_and_grad(partial(total, size=sizes[1]), has_aux=True))(grown)
    (_, got), got_gradient = jax.jit(jax.value_and_grad(partial(total, size=sizes[0]), has_aux=True))(grown)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(np.where(rows.mask, a, 0), b, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), want_gradient, got_gradient)


def test_the_least_row_size_that_holds_all_is_taken():
    taken = jax.jit(lambda mask: scoring.at_row_size(mask, (4, 8, 12), jnp.int32))
    for longest, size in ((0, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12)):
        mask = np.zeros((3, 2, 6), bool)
        mask.reshape(3, 12)[1, :longest] = True
        assert taken(mask) == size

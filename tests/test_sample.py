"""Sampling: the distribution it draws from, the log-probs it records, and what its noise depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small

from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.model import decoder, scoring, spec
from medrlvr_jax.model.architecture import Window
from medrlvr_jax.rollout import decode, draw, generate, loops
from medrlvr_jax.rollout.generate import DrawSettings
from medrlvr_jax.types import Prompts

CFG = small()
Q, P, G, R, PAD = 4, 7, 3, 9, 0
STOPS = (1, 2)


@pytest.fixture(scope="module")
def params():
    return spec.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    mask = np.arange(P)[None] >= np.array([0, 2, 4, 1])[:, None]
    return Prompts(rng.integers(3, 40, (Q, P)).astype(np.int32), mask, np.array([5, 6, 7, 9], np.uint32))


def run(params, prompts, step=0, entropies=False, **settings):
    config = SampleConfig(questions=Q, **({"samples": G, "max_new_tokens": R} | settings))
    key = jax.random.fold_in(jax.random.key(0), step)
    return generate.generate(params, prompts, key, DrawSettings(CFG, config, STOPS, PAD, entropies))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"top_k": 9, "top_p": 0.8, "min_new_tokens": 3}, {"temperature": 0.0}],
    ids=str,
)
def test_recorded_logprobs_are_the_trainers(params, prompts, settings):
    rollout = run(params, prompts, entropies=True, **settings)
    hidden = scoring.hidden_states(params, CFG, prompts, rollout.tokens)
    trainer, entropy = scoring.token_logprobs(
        params, CFG, hidden, rollout.tokens, settings.get("temperature") or 1.0, 10_000
    )
    recorded = rollout.logprobs if rollout.policy_logprobs is None else rollout.policy_logprobs
    np.testing.assert_allclose(np.where(rollout.mask, trainer, 0), recorded, atol=1e-5)
    np.testing.assert_allclose(np.where(rollout.mask, entropy, 0), rollout.entropy, atol=1e-5)
    if rollout.policy_logprobs is not None:  # drawn from fewer words, so each of them is likelier
        assert (rollout.logprobs >= rollout.policy_logprobs - 1e-5).all()
    assert (rollout.policy_logprobs is None) == (
        set(settings) <= {"temperature"} and settings.get("temperature") != 0
    )


def test_drawn_logprob_is_of_the_truncated_distribution(params, prompts):
    """Recomputed with a sort, for the first column."""
    rollout = run(params, prompts, top_k=6, top_p=0.7)
    hidden, _ = decode.prefill(params, CFG, prompts)
    probs = np.asarray(jax.nn.softmax(decoder.logits(params, CFG, hidden)), np.float64)
    for q in range(Q):
        order = np.argsort(-probs[q])[:6]
        share = np.cumsum(probs[q][order]) / probs[q][order].sum()
        kept = order[: int(np.argmax(share >= 0.7)) + 1]
        for g in range(G):
            token = int(rollout.tokens[q, g, 0])
            assert token in kept
            assert np.log(probs[q][token] / probs[q][kept].sum()) == pytest.approx(
                float(rollout.logprobs[q, g, 0]), abs=1e-5
            )


def test_a_row_ends_with_its_stop_token(params, prompts):
    rollout = run(params, prompts, max_new_tokens=40)
    tokens, mask = np.asarray(rollout.tokens).reshape(-1, 40), np.asarray(rollout.mask).reshape(-1, 40)
    ended = 0
    for row, keep in zip(tokens, mask, strict=True):
        n = keep.sum()
        assert keep[:n].all() and (row[n:] == PAD).all() and not np.isin(row[: n - 1], STOPS).any()
        ended += bool(np.isin(row[n - 1], STOPS))
        assert n == 40 or np.isin(row[n - 1], STOPS)
    assert 0 < ended  # else this test shows nothing


def test_min_new_tokens(params, prompts):
    free, held = (
        run(params, prompts, max_new_tokens=30, samples=8, min_new_tokens=n).mask.sum(-1) for n in (0, 12)
    )
    assert free.min() <= 12 < held.min()


def test_noise_depends_on_question_sample_and_step_alone(params, prompts):
    """A sample is the same in any batch, order and padding, and differs between samples, steps and questions."""
    all_rows = run(params, prompts)
    order = np.array([2, 0])
    width = lambda x: np.pad(x[order], ((0, 0), (5, 0)))
    some = run(params, Prompts(width(prompts.tokens), width(prompts.mask), prompts.ids[order]))
    np.testing.assert_array_equal(some.tokens, all_rows.tokens[order])
    more = run(params, prompts, samples=5)
    np.testing.assert_array_equal(more.tokens[:, :G], all_rows.tokens)
    assert (run(params, prompts, step=1).tokens != all_rows.tokens).any((1, 2)).all()
    rows = np.asarray(more.tokens).reshape(Q * 5, -1)
    assert len(np.unique(rows, axis=0)) == Q * 5
    renamed = run(params, Prompts(prompts.tokens, prompts.mask, prompts.ids + np.uint32(1)))
    assert (renamed.tokens != all_rows.tokens).any((1, 2)).all()


@pytest.mark.parametrize("words", [7, 128, 300])
def test_inverse_cdf_draws_each_word_by_its_weight(words):
    rng = np.random.default_rng(words)
    weights = rng.random(words).astype(np.float32) * (rng.random(words) < 0.6)
    weights[0] = 0.0
    n = 20_000
    uniforms = (np.arange(n, dtype=np.float32) + 0.5) / n
    drawn = jax.jit(jax.vmap(lambda u: draw.inverse_cdf(jnp.asarray(weights), u)))(uniforms)
    shares = np.bincount(drawn, minlength=words) / n
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=1.5 / n)
    ends = jax.vmap(lambda u: draw.inverse_cdf(jnp.asarray(weights), u))(
        np.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    )
    assert (weights[np.asarray(ends)] > 0).all()


def test_rounding_draws_no_word_of_weight_zero():
    """50 of 151,936 words weigh anything, and the uniforms lie at the ends of blocks, which grow by rounding
    where nothing weighs.
    """
    rng = np.random.default_rng(0)
    weights = np.zeros(151_936, np.float32)
    weights[rng.choice(len(weights), 50, replace=False)] = np.exp(2.5 * rng.normal(size=50))
    ends = np.asarray(jax.jit(jnp.cumsum)(jnp.asarray(weights).reshape(-1, draw.BLOCK).sum(-1)))
    below, above = np.float32(0), np.float32(1)
    edges = ends / ends[-1]
    uniforms = np.concatenate([edges, np.nextafter(edges, below), np.nextafter(edges, above)])
    uniforms = np.unique(uniforms[uniforms < 1])
    drawn = np.asarray(jax.jit(jax.vmap(lambda u: draw.inverse_cdf(jnp.asarray(weights), u)))(uniforms))
    assert (weights[drawn] > 0).all() and len(np.unique(drawn)) == 50


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_k_and_ties(k):
    weights = np.random.default_rng(0).permutation(64).astype(np.float32) + 1
    kept = np.asarray(draw.truncate(jnp.asarray(weights), k, 1.0))
    assert set(kept[kept > 0]) == set(np.sort(weights)[-min(k, 64) :])
    tied = np.array([3.0, 2.0, 2.0, 1.0], np.float32)
    np.testing.assert_array_equal(draw.truncate(jnp.asarray(tied), 2, 1.0), [3, 2, 2, 0])


def test_top_p_keeps_the_smallest_set():
    np.testing.assert_array_equal(
        draw.truncate(jnp.asarray([0.1, 0.5, 0.25, 0.15], jnp.float32), 0, 0.7), [0, 0.5, 0.25, 0]
    )
    np.testing.assert_array_equal(
        draw.truncate(jnp.asarray([0.1, 0.5, 0.25, 0.15], jnp.float32), 0, 0.2), [0, 0.5, 0, 0]
    )


def test_segments_halve_down_to_the_shortest():
    assert loops.segment_ends(48) == [48] and loops.segment_ends(255) == [255]
    assert loops.segment_ends(300) == [150, 300] and loops.segment_ends(1024) == [128, 256, 512, 1024]


@pytest.mark.parametrize("window", [None, Window(5, (1,), 50.0)], ids=str)
def test_rows_that_stop_make_room_and_change_nothing(window, params, prompts, monkeypatch):
    """64 rows on a ladder of 64, 32, 16, 8, their caches growing by 10, 20, 40 tokens; in one loop; and in one
    over stacked layers. With limits on top.
    """
    rng = np.random.default_rng(1)
    limits = np.clip(np.exp(rng.normal(2.5, 0.9, (Q, 16))), 1, 40).astype(np.int32)
    results, whiles = [], []
    config = SampleConfig(questions=Q, samples=16, max_new_tokens=40, top_k=30)
    of_window = dataclasses.replace(CFG, window=window)
    for how, segment in ({}, 8), ({"narrow": False}, 40), ({"unroll": False}, 40):
        cfg = of_window.run_with(**how)
        args = params, prompts, jax.random.key(3), DrawSettings(cfg, config, STOPS, PAD), limits
        monkeypatch.setattr(loops, "SEGMENT", segment)
        program = jax.jit(generate.generate.__wrapped__, static_argnums=3)  # a program of its own
        results.append(program(*args))
        whiles.append(program.lower(*args).as_text().count("stablehlo.while"))
    assert whiles[0] > 4 * 3 > max(whiles[1:])  # four rungs of the ladder for each of three segments
    a = results[0]
    for b in results[1:]:
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.mask, b.mask)
        for x, y in ((a.logprobs, b.logprobs), (a.policy_logprobs, b.policy_logprobs)):
            np.testing.assert_allclose(x, y, atol=2e-6)
    lengths = np.asarray(a.mask).sum(-1)
    assert (lengths <= limits).all() and (lengths == limits).any() and (lengths < limits).any()

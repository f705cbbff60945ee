"""bfloat16 against float32: sums over tokens are float32's, and no parameter's gradient is over 2 % from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import small

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import LoRAConfig
from medrlvr_jax.model import attention, decoder, lora, scoring, spec
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.decoder import NO_TOKEN
from medrlvr_jax.rl import learn
from medrlvr_jax.types import Experience, Learner, Mean, Prompts

Q, P, G, R = 4, 16, 4, 64
CFG = small(vocab=64, embed=64, head_dim=16, ffn=128, qkv_bias=True)


def params_of(cfg: DecoderConfig):
    """Matrices of 1.5·fan_in^-½ (adapters' of a third of it), norms and biases about 0.5: no part of the
    model hides behind another.
    """

    def fill(path, p):
        name, key = path[-1].key, jax.random.fold_in(jax.random.key(0), sum(map(ord, path[-1].key)))
        if name.endswith(("norm", "bias", "value")):
            return 0.5 + 0.2 * jax.random.normal(key, p.shape)
        fan_in = (
            cfg.embed if path[0].key != "layers" else np.prod(p.shape[1 : 1 + spec.MATRICES.get(name, 1)])
        )
        return (
            (0.5 if spec.PARAMETERS[name].kind == "adapter" else 1.5)
            * fan_in**-0.5
            * jax.random.normal(key, p.shape)
        )

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: spec.init(cfg, jax.random.key(0))))


def experience() -> Experience:
    """Tokens as skewed as a text's, responses of several lengths, advantages of both signs."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, CFG.vocab + 1)
    tokens = rng.choice(CFG.vocab, (Q, P + G * R), p=share / share.sum()).astype(np.int32)
    noise = rng.normal(size=(2, Q, G, R)).astype(np.float32)
    return Experience(
        prompts=Prompts(
            tokens[:, :P], np.arange(P) >= rng.integers(0, P // 2, (Q, 1)), np.arange(Q, dtype=np.uint32)
        ),
        tokens=tokens[:, P:].reshape(Q, G, R),
        mask=np.arange(R) < rng.integers(R // 2, R + 1, (Q, G, 1)),
        logprobs=noise[0] * 0,
        ref_logprobs=noise[0] * 0 - 4,
        advantages=noise[0] + 0.5,
        values=noise[1] * 0,
        returns=noise[1],
    )


def gradients(cfg: DecoderConfig, learner: str, slab: int, dtype):
    """Of the policy's loss at a ratio of 1, as in a run's first update, or of the critic's; of what is
    trained.
    """
    critic = learner == "critic"
    cfg = cfg.run_with(dtype=dtype, value_head=critic)
    tree = {
        "name": "t",
        "steps": 1,
        "model": {"path": "unused", "logit_slab": slab},
        "data": {"path": "unused"},
    }
    tree |= {
        "sample": {"questions": Q, "samples": G, "max_new_tokens": R},
        "kl": {"coef": 0.1, "into": "loss", "estimator": "k3"},
    }
    tree |= {
        "advantage": {"estimator": "group"},
        "learn": {"minibatch": Q, "policy": {"lr": 1.0}, "critic": None},
    }
    config = configs.from_tree(tree)
    objective = (learn.critic_objective if critic else learn.policy_objective)(config, cfg)
    params, rows = params_of(cfg), experience()

    def loss(trained):
        whole = lora.join(params, trained)

        def read(hidden, tokens):
            return scoring.token_logprobs(whole, cfg, hidden, tokens, 1.0, slab)[0]

        old = (
            rows.logprobs
            if critic
            else jax.lax.stop_gradient(scoring.at_responses(whole, cfg, rows, G * R, read))
        )
        return objective(whole, dataclasses.replace(rows, logprobs=old), jnp.float32(0.1), G * R)[0].total

    return jax.jit(jax.grad(loss))(lora.trained(params, cfg))


CASES: dict[str, tuple[DecoderConfig, str, int]] = {
    "biases, tied, slabs": (CFG, "policy", Q * G),
    "norms of q and k, untied": (
        dataclasses.replace(CFG, qkv_bias=False, qk_norm=True, tied=False).run_with(remat="none"),
        "policy",
        10**6,
    ),
    "adapters": (CFG.run_with(lora=LoRAConfig(rank=4, alpha=4.0)), "policy", 10**6),
    "critic": (CFG, "critic", 10**6),
}


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_in_bfloat16_is_float32s(case):
    exact, rounded = (
        jax.tree_util.tree_leaves_with_path(gradients(*CASES[case], dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    errors = {
        jax.tree_util.keystr(path): float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        for (path, a), (_, b) in zip(exact, rounded, strict=True)
    }
    assert len(errors) > 4 and max(errors.values()) < 0.02, {
        name: e for name, e in errors.items() if not e < 0.02
    }


@pytest.mark.parametrize("masters", [jnp.float32, jnp.bfloat16])
def test_a_frequent_tokens_row_counts_all_its_tokens(masters):
    """4,096 times a gradient of 1 is 4,096 (added up in bfloat16 it was 256), and padding has none and looks
    up nothing.
    """
    cfg = CFG.run_with(dtype=jnp.bfloat16)
    tokens = jnp.array([[5] * 4096 + [7] + [NO_TOKEN] * 3])
    table = jnp.ones((CFG.vocab, CFG.embed), masters)
    total, gradient = jax.value_and_grad(
        lambda table: jnp.asarray(decoder.embed_lookup(table, tokens, cfg)).astype(jnp.float32).sum()
    )(table)
    assert total == 4097 * CFG.embed
    gradient = np.asarray(gradient, np.float32)
    np.testing.assert_array_equal(gradient[[5, 7, 0, -1], 0], [4096, 1, 0, 0])
    assert gradient.sum() == 4097 * CFG.embed


def test_a_bias_counts_all_its_tokens():
    """20,000 tokens with a gradient of 1 at v: added up in bfloat16, 32 at a time, the sum stood still at
    8,192.
    """
    cfg = dataclasses.replace(CFG, embed=4, ffn=4, heads=1, kv_heads=1, head_dim=2).run_with(
        dtype=jnp.bfloat16
    )
    layer = jax.tree.map(lambda p: p[0], params_of(cfg)["layers"])
    x, cos, sin = jnp.ones((1, 20_000, 4), jnp.bfloat16), jnp.ones((1, 20_000, 1)), jnp.zeros((1, 20_000, 1))

    def total(layer):
        _, _, v = decoder.queries_keys_values(layer, cfg, x, (cos, sin))
        return v.astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(layer)["v_bias"], [[20_000, 20_000]])


def test_micro_batches_add_up_in_float32():
    """With bfloat16 masters too: 300 micro-batches with a gradient of 1, of which bfloat16 would add up 256."""
    rows = Experience(*[np.zeros((300, 1, 1))] * 8)
    start = Learner({"w": jnp.zeros(1, jnp.bfloat16)}, optax.EmptyState())

    def objective(params, rows, extra, size):
        return Mean(params["w"].sum() * len(rows.tokens), jnp.float32(1 / 300)), {}

    how = learn.LearnSettings(objective, optax.identity(), epochs=1, minibatch=300, micro=1, row_shares=())
    after, _ = learn.update(start, {}, rows, jax.random.key(0), None, how)
    assert float(after.params["w"][0]) == 300


def test_scores_and_weighted_sums_are_float32s():
    """A score of 40 rounded to bfloat16 is up to 0.13 off. Written out and one token at a time, both against
    float64 on the same inputs.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    n = 24
    q = (3 * jax.random.normal(keys[0], (2, n, 2, 2, 16))).astype(jnp.bfloat16)
    k, v = ((3 * jax.random.normal(key, (2, n, 2, 16)) + 1).astype(jnp.bfloat16) for key in keys[1:])
    mask = jnp.ones((2, n), bool)
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    scores = np.where(np.tri(n, dtype=bool), np.einsum("qnkhd,qpkd->qkhnp", *exact[:2]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("qkhnp,qpkd->qnkhd", weights / weights.sum(-1, keepdims=True), exact[2])
    assert np.abs(scores[np.isfinite(scores)]).max() > 40
    whole = attention.plain(q, k, v, mask, None, 0)
    first = n // 2  # of the keys in the prompt's part of the cache, the others in the row's own
    by_heads, own = lambda x: x.swapaxes(1, 2), (slice(None), None)
    parts = (x[:, s] for s in (slice(first), slice(first, None)) for x in (k, v))
    pk, pv, ok, ov = (by_heads(x) for x in parts)
    one = attention.decode(
        q[:, -1:],
        (pk.swapaxes(2, 3), pv),
        (ok[own].swapaxes(3, 4), ov[own]),
        mask[:, :first],
        n - first - 1,
    )
    for found, expected in ((whole, want), (one, want[:, -1:])):
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, atol=0.02 * np.abs(want).std(), rtol=2**-7
        )


def test_what_small_layers_add_to_large_states_is_not_lost():
    """Eight layers add 0.5 each to a state of 256, where bfloat16 has steps of 2: beside another of 256, 260
    must come out.
    """
    cfg = dataclasses.replace(CFG, layers=8).run_with(dtype=jnp.bfloat16)
    params = jax.tree.map(jnp.zeros_like, params_of(cfg))
    params["embed"] = params["embed"].at[1, :2].set(256.0)
    params["norm"] = jnp.ones_like(params["norm"])
    # values, and so what attention returns
    params["layers"]["v_bias"] = params["layers"]["v_bias"].at[:, 0, 0].set(0.5)
    params["layers"]["o"] = params["layers"]["o"].at[:, 0, 0, 0].set(1.0)
    tokens = jnp.ones((1, 1, 2), jnp.int32)
    prompts = Prompts(tokens[0], jnp.ones((1, 2), bool), jnp.zeros(1, jnp.uint32))
    states = scoring.hidden_states(params, cfg, prompts, tokens).astype(jnp.float32)
    # both are rounded at the end
    np.testing.assert_allclose(states[..., 0] / states[..., 1], 260 / 256, rtol=2**-7)

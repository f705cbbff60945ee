"""Adapters: off they are the base, on they are the merged matrix; nothing but them is trained, stored, or
held twice.
"""

import dataclasses
import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_learn import CFG, Loop, furthest, settings

from medrlvr_jax.config.schema import LoRAConfig
from medrlvr_jax.model import decoder, lora, scoring, spec
from medrlvr_jax.model.spec import MATRICES
from medrlvr_jax.types import Prompts

ADAPTED = CFG.run_with(lora=LoRAConfig(rank=3, alpha=5.0))
SCALE = 5 / 3


def split(params):
    """(base, adapters) of a whole tree."""
    adapters = flatten_dict(lora.trained(params, ADAPTED))
    return unflatten_dict(
        {k: v for k, v in flatten_dict(params).items() if k not in adapters}
    ), unflatten_dict(adapters)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(partial(spec.init, ADAPTED))(jax.random.key(0))


@pytest.fixture(scope="module")
def params(fresh):
    """Every weight, B too, large enough to be seen in the result."""
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), fresh)


@partial(jax.jit, static_argnums=1)
def logits(params, cfg):
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None] >= np.array([0, 2, 4])[:, None]
    prompts = Prompts(rng.integers(0, 64, (3, 5)), mask, np.arange(3, dtype=np.uint32))
    hidden = scoring.hidden_states(params, cfg, prompts, rng.integers(0, 64, (3, 2, 6)))
    return decoder.logits(params, cfg, hidden)


def test_a_fresh_adapter_is_the_base(fresh):
    base, adapters = split(fresh)
    assert {k[-1] for k in flatten_dict(adapters)} == {f"{name}_{half}" for name in MATRICES for half in "ab"}
    assert all((leaf == 0).all() == key[-1].endswith("_b") for key, leaf in flatten_dict(adapters).items())
    np.testing.assert_array_equal(logits(fresh, ADAPTED), logits(base, lora.without_adapters(ADAPTED)))


def test_the_merged_matrix_is_the_adapted_one(params):
    """W + A·B·alpha/rank, by numpy; and its logits."""
    merged = lora.merge(params, ADAPTED)
    assert jax.tree.structure(merged) == jax.tree.structure(split(params)[0])
    here, there = params["layers"], merged["layers"]
    o = here["o"][1] + SCALE * np.einsum("hdr,re->hde", here["o_a"][1], here["o_b"][1])
    np.testing.assert_allclose(there["o"][1], o, atol=1e-6)
    np.testing.assert_allclose(
        there["q"][0],
        here["q"][0] + SCALE * np.einsum("er,rhd->ehd", here["q_a"][0], here["q_b"][0]),
        atol=1e-6,
    )
    np.testing.assert_array_equal(there["mlp_norm"], here["mlp_norm"])
    # else this shows nothing
    assert (
        np.abs(
            logits(merged, lora.without_adapters(ADAPTED))
            - logits(split(params)[0], lora.without_adapters(ADAPTED))
        ).max()
        > 0.1
    )
    np.testing.assert_allclose(
        logits(merged, lora.without_adapters(ADAPTED)), logits(params, ADAPTED), atol=1e-5
    )


def test_a_small_adapter_survives_the_merge_in_float32():
    """Beside 1.0 in bfloat16, whose next number is 1.0078125, 2·0.5·0.0009765625 is nothing; in float32 it is
    all there.
    """
    cfg = CFG.run_with(lora=LoRAConfig(rank=1, alpha=2.0, targets=("up",)))
    layers = {
        "up": jnp.ones((1, 1, 1), "bfloat16"),
        "up_a": jnp.full((1, 1, 1), 0.5),
        "up_b": jnp.full((1, 1, 1), 2.0**-10),
    }
    for dtype, value in ((None, 1.0), ("bfloat16", 1.0), ("float32", 1.0009765625)):
        up = lora.merge({"layers": layers}, cfg, dtype)["layers"]["up"]
        assert up.dtype == jnp.dtype(dtype or "bfloat16") and up.item() == value


def test_gradients_are_the_whole_matrix_s_projected(params):
    """Of W + A·B·s: dA = s·dW·Bᵀ and dB = s·Aᵀ·dW, with dW taken at the merged weights."""
    weight = np.random.default_rng(1).normal(size=(3, 2, 6, 64)) / 30

    def loss(params, cfg):
        return (jnp.sin(logits(params, cfg)) * weight).sum()

    got = jax.grad(lambda adapters: loss(lora.join(split(params)[0], adapters), ADAPTED))(split(params)[1])[
        "layers"
    ]
    whole = jax.grad(loss)(lora.merge(params, ADAPTED), lora.without_adapters(ADAPTED))["layers"]
    for name, inputs in MATRICES.items():
        for i in range(CFG.layers):
            dw = np.asarray(whole[name][i])
            rows = int(np.prod(dw.shape[:inputs]))
            a, b = (np.asarray(params["layers"][f"{name}_{half}"][i]) for half in "ab")
            dw, a, b = dw.reshape(rows, -1), a.reshape(rows, 3), b.reshape(3, -1)
            assert np.abs(dw).max() > 1e-3
            np.testing.assert_allclose(
                np.asarray(got[f"{name}_a"][i]).reshape(rows, 3), SCALE * dw @ b.T, atol=2e-5
            )
            np.testing.assert_allclose(
                np.asarray(got[f"{name}_b"][i]).reshape(3, -1), SCALE * a.T @ dw, atol=2e-5
            )


def test_only_the_targets_are_adapted():
    cfg = CFG.run_with(value_head=True, lora=LoRAConfig(rank=2, targets=("v", "down")))
    tree = jax.eval_shape(lambda: spec.init(cfg, jax.random.key(0)))
    trained = {"/".join(k): leaf.shape for k, leaf in flatten_dict(lora.trained(tree, cfg)).items()}
    assert trained == {
        "value": (33,),
        "layers/v_a": (2, 32, 2),
        "layers/v_b": (2, 2, 2, 8),
        "layers/down_a": (2, 64, 2),
        "layers/down_b": (2, 2, 32),
    }


def adapted(estimator="gae", **changes):
    return settings(estimator, **({"model__lora": {"rank": 3}, "learn__policy": {"lr": 1e-2}} | changes))


def test_the_first_step_has_no_kl_and_the_base_never_moves():
    loop = Loop(adapted(learn__epochs=1, learn__minibatch=8))
    base = jax.device_get(loop.frozen.base)
    loop.run(1)
    assert abs(float(loop.stats["kl"])) < 1e-6 and float(loop.stats["sampler_gap"]) < 1e-5
    assert float(loop.metrics["ratio"].value()) == pytest.approx(1, abs=1e-6)
    before = float(loop.stats["reward"])
    loop.run(24)
    # rounding of log-probs that have grown
    assert float(loop.stats["sampler_gap"]) < 2e-4 and abs(float(loop.stats["kl"])) > 1e-3
    assert float(loop.stats["reward"]) > before + 1
    assert furthest(base, loop.frozen.base) == 0
    for learner, more in ((loop.policy, set()), (loop.critic, {("value",)})):
        assert (
            set(flatten_dict(learner.params))
            == {("layers", f"{name}_{half}") for name in MATRICES for half in "ab"} | more
        )
    # moments are of adapters alone
    assert max(leaf.size for leaf in jax.tree.leaves((loop.policy, loop.critic))) <= 2 * 3 * 64


def test_a_mesh_changes_nothing():
    # else Adam's first steps are the sign of gradients that may be rounding alone
    smooth = {"lr": 1e-3, "eps": 1e-3}
    runs = []
    for mesh, devices in (({}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)):
        runs.append(Loop(adapted(mesh=mesh, learn__policy=smooth, learn__critic=smooth), devices).run(3))
    (want_tokens, _, want), (tokens, _, got) = runs
    np.testing.assert_array_equal(tokens, want_tokens)
    assert furthest(want, got) < 1e-5


@pytest.mark.parametrize(("lora_", "copies"), [({"rank": 3}, 1), (None, 3 + 2 * 2)], ids=["lora", "all"])
def test_the_base_is_held_once(lora_, copies):
    """Policy, critic, reference and sampler share one; where all weights are trained they have one each, and
    their moments.
    """
    cfg = dataclasses.replace(CFG, ffn=72, layers=3)  # a shape that no other test has
    loop = Loop(settings(model__lora=lora_), cfg=cfg)
    loop.run(1)
    gc.collect()
    alive = [x for x in jax.live_arrays() if x.shape == (3, 72, 32)]
    assert len({x.unsafe_buffer_pointer() for x in alive}) == copies


def test_a_bfloat16_base_has_float32_adapters_and_is_not_copied_to_sample():
    loop = Loop(adapted(model__dtype="bfloat16", model__param_dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(loop.frozen.base)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(loop.policy.params)} == {"float32"}
    with jax.set_mesh(loop.parts.mesh):
        decode = loop.sync_weights(lora.join(loop.frozen.base, loop.policy.params))
    assert decode["layers"]["q"] is loop.frozen.base["layers"]["q"]
    assert {x.dtype.name for x in jax.tree.leaves(lora.merge(decode, loop.cfg))} == {"bfloat16"}


def test_host_memory_changes_nothing():
    """The states' moments and a reference that is a copy of its own wait there; on a CPU that is the same
    memory by another name.
    """
    here, there = Loop(settings(learn__epochs=1)), Loop(settings(learn__epochs=1, learn__offload=True))
    (*_, want), (*_, got) = here.run(2), there.run(2)
    assert furthest(want, got) == 0
    kinds = {
        x.sharding.memory_kind
        for x in jax.tree.leaves((there.policy.opt_state, there.critic.opt_state, there.frozen.reference))
    }
    assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves((there.policy.params, there.critic.params))} == {
        "device"
    }

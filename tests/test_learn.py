"""The loop on a two-layer model: what must not matter (mesh, micro-batches, row order), what must, and that
it learns.
"""

import dataclasses
import math
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather
from small_model import small

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts
from medrlvr_jax.config import load as configs
from medrlvr_jax.config import schema
from medrlvr_jax.model import lora, scoring, spec
from medrlvr_jax.rl import experience, learn, loop, programs
from medrlvr_jax.rollout import generate, sync
from medrlvr_jax.rollout.assess import assess, assess_settings
from medrlvr_jax.types import Experience, Learner, Prompts

CFG = small(vocab=64, qkv_bias=True)
Q, P, G, R, GOOD = 8, 5, 4, 6, 5
STOPS, PAD = (1, 2), 0


def settings(estimator="gae", **changes):
    gae = estimator == "gae"
    tree = {
        "name": "t",
        "steps": 10,
        "model": {"path": "unused", "init": "random"},
        "data": {"path": "unused"},
        "sample": {"questions": Q, "samples": G, "max_new_tokens": R},
        "advantage": {"estimator": estimator},
        "kl": {"coef": 0.01, "into": "reward", "estimator": "k1"}
        if gae
        else {"coef": 0.01, "into": "loss", "estimator": "k3"},
        "learn": {
            "minibatch": 4,
            "epochs": 2,
            "policy": {"lr": 3e-3},
            "critic": {"lr": 1e-3} if gae else None,
        },
    }
    for name, value in changes.items():
        *path, leaf = name.split("__")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return configs.from_tree(tree)


class Loop:
    """A few steps of training without tokenizer or text: the reward counts how often a response says GOOD."""

    def __init__(self, c, devices=1, score=lambda tokens: (tokens == GOOD).sum(-1), cfg=CFG):
        self.c, self.score, self.step = c, score, 0
        mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
        self.cfg = cfg = cfg.run_with(lora=c.model.lora)
        self.parts = p = Parts(c, None, cfg, cfg.run_with(value_head=True), mesh)
        with jax.set_mesh(mesh):
            tx = learn.make_optimizer(c.learn.policy, 40)
            policy, placed = build.init_learner(p, cfg, tx)
            program = learn.compile_learn(c, learn.policy_objective(c, cfg), tx, placed)
            self.policy, self.learn_policy = learn.offload(c, policy, program)
            self.frozen = build.load_frozen(p)
            self.critic = None
            if c.learn.critic:
                tx = learn.make_optimizer(c.learn.critic, 40)
                critic, placed = build.init_learner(p, p.critic_cfg, tx)
                program = learn.compile_learn(c, learn.critic_objective(c, p.critic_cfg), tx, placed)
                self.critic, self.learn_critic = learn.offload(c, critic, program)
            self.sync_weights = sync.make_weight_sync(p, p.sampler_cfg)

    def rollout(self):
        c, mesh = self.c, self.parts.mesh
        rng = np.random.default_rng(self.step)
        mask = np.arange(P)[None] >= rng.integers(0, 3, Q)[:, None]
        prompts = Prompts(rng.integers(3, 64, (Q, P)).astype(np.int32), mask, np.arange(Q, dtype=np.uint32))
        own, _ = sharding.local_rows(Q, mesh)
        prompts = sharding.place_rows(jax.tree.map(lambda x: x[own], prompts), Q, mesh)
        self.key = jax.random.fold_in(jax.random.key(0), self.step)
        whole = lora.join(self.frozen.base, self.policy.params)
        settings = generate.DrawSettings(self.parts.sampler_cfg, c.sample, STOPS, PAD)
        rollout = generate.generate(self.sync_weights(whole), prompts, self.key, settings)
        critic = self.critic and self.critic.params
        frozen = sharding.to_memory(self.frozen, "device")
        settings = dataclasses.replace(assess_settings(self.parts), slab=64)
        assessment = assess(frozen, self.policy.params, critic, prompts, rollout, settings)
        self.rewards = sharding.place_rows(
            self.score(sharding.fetch_rows(rollout.tokens, mesh)).astype(np.float32), Q, mesh
        )
        coef, kinds = jnp.float32(c.kl.coef), experience.experience_settings(self.parts)
        drawn = experience.Drawn(prompts, rollout, self.rewards[..., None])
        made, stats = experience.make_experience(drawn, assessment, None, coef, config=kinds)
        return rollout, made, stats

    def run(self, steps):
        """Tokens and rewards of each step, and the parameters after the last: all rows and all of them, on
        every process.
        """
        tokens, rewards = [], []
        with jax.set_mesh(self.parts.mesh):
            for _ in range(steps):
                rollout, made, self.stats = self.rollout()
                shuffle = jax.random.fold_in(self.key, 2**31)
                self.policy, self.metrics = self.learn_policy(
                    self.policy, self.frozen.base, made, shuffle, jnp.float32(self.c.kl.coef)
                )
                if self.critic:
                    self.critic, _ = self.learn_critic(self.critic, self.frozen.base, made, shuffle, None)
                tokens.append(process_allgather(rollout.tokens, tiled=True))
                rewards.append(process_allgather(self.rewards, tiled=True))
                self.step += 1
        params = [self.policy.params] + ([self.critic.params] if self.critic else [])
        return np.stack(tokens), np.stack(rewards), process_allgather(params, tiled=True)


def furthest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


# Adam's first steps are the gradient's sign, so where a gradient is near zero, rounding shows as a share of
# the rates.
STEADY = {"learn__minibatch": 8, "learn__policy": {"lr": 3e-4}, "learn__critic": {"lr": 3e-4}}


def steady(estimator, **changes):
    return settings(
        estimator, **(STEADY if estimator == "gae" else STEADY | {"learn__critic": None}) | changes
    )


@lru_cache
def plain(estimator):
    loop = Loop(steady(estimator))
    out = loop.run(3)
    # a second compilation would mean that the state's shardings moved
    assert loop.learn_policy._cache_size() == 1
    return out


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 4},  # more ways than kv heads: those are replicated
    {"slices": 2, "data": 2, "fsdp": 2},
]
CASES = [("gae", {"mesh": mesh}) for mesh in MESHES] + [
    ("group", {"mesh": MESHES[0]}),
    ("group", {"learn__microbatch": 2}),
]
CASES += [
    ("gae", {"learn__microbatch": 1, "learn__row_sizes": [0.8, 0.95]}),
    ("gae", {"learn__microbatch": 4, "learn__row_sizes": [0.95], "mesh": {"data": 2, "fsdp": 2}}),
    ("gae", {"sample__layout": "sharded", "mesh": MESHES[0]}),
]


@pytest.mark.parametrize(("estimator", "change"), CASES, ids=str)
def test_mesh_and_microbatches_change_nothing(estimator, change):
    devices = math.prod(change.get("mesh", {}).values())
    tokens, rewards, params = Loop(steady(estimator, **change), devices).run(3)
    want_tokens, want_rewards, want_params = plain(estimator)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_array_equal(rewards, want_rewards)
    assert furthest(params, want_params) < 1e-5


def test_it_learns_and_a_constant_reward_teaches_nothing():
    loop = Loop(settings(learn__policy={"lr": 1e-2}, kl__coef=0.0))
    loop.run(1)
    before = float(loop.stats["reward"])
    loop.run(24)
    assert float(loop.stats["reward"]) > before + 2
    idle = Loop(settings("group", kl__coef=0.0), score=lambda tokens: np.zeros(tokens.shape[:2]))
    start = jax.device_get(idle.policy.params)
    *_, (end,) = idle.run(2)
    assert furthest(start, end) == 0


def test_a_learning_rate_of_zero_changes_nothing():
    loop = Loop(settings(learn__policy={"lr": 0.0}, learn__critic={"lr": 0.0}))
    start = jax.device_get([loop.policy.params, loop.critic.params])
    *_, end = loop.run(2)
    assert furthest(start, end) == 0


def test_first_inner_step_has_ratio_one_and_no_kl():
    loop = Loop(settings(learn__epochs=1, learn__minibatch=8))
    loop.run(1)
    assert float(loop.metrics["ratio"].value()) == pytest.approx(1, abs=1e-6)
    assert abs(float(loop.metrics["kl_ref"].value())) < 1e-6
    assert float(loop.metrics["clip_low"].value()) == float(loop.metrics["clip_high"].value()) == 0
    assert float(loop.stats["sampler_gap"]) < 1e-5


def test_fractional_rewards_reach_the_loss():
    loop = Loop(
        settings("group_mean", kl__coef=0.0),
        score=lambda tokens: np.where(np.arange(G) == 0, 0.25, 0.0) * np.ones((Q, G)),
    )
    with jax.set_mesh(loop.parts.mesh):
        _, made, _ = loop.rollout()
    first = np.asarray(made.advantages)[:, :, 0]
    np.testing.assert_allclose(
        first, np.where(np.arange(G) == 0, 0.1875, -0.0625) * np.ones((Q, G)), rtol=1e-6
    )


def test_int8_rollouts_are_of_the_rounded_policy_and_weighed():
    """Their log-probs are those of w → round(w / s)·s, s = max|w| / 127 of each output channel; on a mesh
    too.
    """
    changes = {"sample__weights": "int8", "loss__sampler_cap": 1.05}
    loop = Loop(steady("group", **changes))
    params = loop.policy.params
    with jax.set_mesh(loop.parts.mesh):
        rollout, made, stats = loop.rollout()
    rounded = dict(params["layers"])
    for name, inputs in spec.MATRICES.items():
        w = np.asarray(params["layers"][name])
        scale = np.abs(w).max(tuple(range(1, 1 + inputs)), keepdims=True) / 127
        rounded[name] = np.round(w / scale) * scale
    args = made.prompts, rollout.tokens
    logprobs = [
        scoring.token_logprobs(p, CFG, scoring.hidden_states(p, CFG, *args), rollout.tokens, 1.0, 10_000)[0]
        for p in (params, params | {"layers": rounded})
    ]
    np.testing.assert_allclose(np.where(rollout.mask, logprobs[1], 0), rollout.logprobs, atol=1e-5)
    drift = np.where(rollout.mask, logprobs[0] - rollout.logprobs, 0)
    assert 1e-3 < np.abs(drift).max() == pytest.approx(float(stats["sampler_gap"]), abs=1e-5)
    np.testing.assert_allclose(made.sampler_weights, np.minimum(np.exp(drift), 1.05), rtol=1e-5)
    assert (np.asarray(made.sampler_weights) == np.float32(1.05)).any() or np.exp(drift).max() < 1.05
    meshed = Loop(steady("group", **changes, mesh={"fsdp": 2, "tensor": 2}), 4)
    with jax.set_mesh(meshed.parts.mesh):
        np.testing.assert_array_equal(meshed.rollout()[0].tokens, rollout.tokens)


def test_the_stop_token_is_learned_from():
    loop = Loop(settings())
    with jax.set_mesh(loop.parts.mesh):
        rollout, made, _ = loop.rollout()
    stops = np.isin(np.asarray(rollout.tokens), STOPS) & np.asarray(made.mask)
    assert stops.any() and (np.asarray(made.advantages)[stops] != 0).all()


def test_adaptive_kl_moves_towards_its_target():
    kl = schema.KLConfig(coef=0.1, target=2.0, horizon=1000)
    assert float(
        learn.adapt_kl(jnp.float32(0.1), jnp.float32(2.2), 100, kl.target, kl.horizon)
    ) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert float(
        learn.adapt_kl(jnp.float32(0.1), jnp.float32(9.0), 100, kl.target, kl.horizon)
    ) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert float(
        learn.adapt_kl(jnp.float32(0.1), jnp.float32(0.0), 100, kl.target, kl.horizon)
    ) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_warmup_and_schedules():
    """The size of Adam's first steps on a constant gradient is the learning rate."""

    def rates(n, **kw):
        tx = learn.make_optimizer(schema.OptimConfig(lr=1.0, clip_norm=1e9, **kw), n)
        params, out = {"embed": jnp.zeros(1)}, []
        state = tx.init(params)
        for _ in range(n):
            step, state = tx.update({"embed": jnp.ones(1)}, state, params)
            out.append(-float(step["embed"][0]))
        return out

    np.testing.assert_allclose(rates(10, warmup=0.4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1], rtol=1e-4)
    np.testing.assert_allclose(
        rates(6, warmup=0.0, schedule="linear"), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rtol=1e-4
    )
    cosine = [0.5, 1, *(0.5 + 0.5 * np.cos(np.pi * np.arange(6) / 6))]
    np.testing.assert_allclose(rates(8, warmup=0.25, schedule="cosine"), cosine, rtol=1e-3, atol=1e-6)


def test_stochastic_rounding_is_unbiased_and_the_same_on_any_mesh():
    """Of bfloat16's numbers from 1 to 2 the neighbours are 1/128 apart; signs, tiny numbers and those that
    need no rounding too.
    """
    exact = np.float32([0.0, 1.0, -1.5, 2.0**-130, np.inf])
    between = np.float32([1 + 1 / 512, 1 + 1 / 129, -1 - 3 / 512, 1e-6 + 1e-9, -0.03 + 1e-6])
    x = np.repeat(np.concatenate([exact, between])[:, None], 4096, 1)
    got = np.asarray(jax.jit(learn.stochastic_round)(x, jnp.uint32(7))).astype(np.float32)
    np.testing.assert_array_equal(got[:5], x[:5])
    down, up = got[5:].min(1), got[5:].max(1)
    assert ((got[5:] == down[:, None]) | (got[5:] == up[:, None])).all() and (
        (down <= between) & (between <= up)
    ).all()
    np.testing.assert_allclose(up - down, 2.0 ** (np.floor(np.log2(np.abs(between))) - 7), rtol=1e-6)
    error = (got[5:].astype(float) - between[:, None]).mean(1) / (got[5:].std(1) / 64)
    assert np.abs(error).max() < 4
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    np.testing.assert_array_equal(jax.jit(learn.stochastic_round, out_shardings=where)(x, jnp.uint32(7)), got)
    tree = {"a": jnp.ones((64,), jnp.bfloat16), "b": jnp.ones((64,), jnp.bfloat16)}
    shift = jax.tree.map(lambda p: jnp.full(p.shape, 1 / 300), tree)
    one, again, other = (learn.add_updates(tree, shift, jax.random.key(k)) for k in (0, 0, 1))
    assert furthest(one, again) == 0 != furthest(one, other) and (one["a"] != one["b"]).any()


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_weights_in_bfloat16_move_as_float32_ones_do(kind):
    """40 updates at a rate of 1e-6, a hundredth of a weight's last bit: the slope of their movement over
    float32's is 1 within its error.

    Rounded to the nearest it is 0.0.
    """
    tree = {"lr": 1e-6, "kind": kind, "warmup": 0.0}
    c = settings("group", learn__policy=tree, learn__epochs=20, model__param_dtype="bfloat16")
    tx = learn.make_optimizer(c.learn.policy, 40)
    how = learn.LearnSettings(learn.nll_objective(c, CFG), tx, epochs=20, minibatch=4, micro=2, row_shares=())
    program = jax.jit(partial(learn.learn, settings=how))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 64, shape).astype(np.int32) for shape in ((Q, P), (Q, 1, R))]
    prompts = Prompts(rows[0], np.ones((Q, P), bool), np.arange(Q, dtype=np.uint32))
    rows = Experience(prompts, rows[1], np.ones((Q, 1, R), bool), *[None] * 5)
    start = jax.tree.map(lambda p: p.astype(jnp.bfloat16), spec.init(CFG, jax.random.key(0)))
    ends = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        params = jax.tree.map(lambda p: p.astype(dtype), start)  # noqa: B023
        learner, _ = program(Learner(params, tx.init(params)), {}, rows, jax.random.key(0), None)
        assert {x.dtype for x in jax.tree.leaves(learner.opt_state)} <= {
            np.dtype("float32"),
            np.dtype("int32"),
        }
        assert {x.dtype for x in jax.tree.leaves(learner.params)} == {jnp.dtype(dtype)}
        ends[dtype] = learner.params
    moves = [
        jax.tree.map(lambda a, b: np.asarray(a, float) - np.asarray(b, float), ends[dtype], start)
        for dtype in ends
    ]
    rounded, exact = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in moves)
    slope = (rounded * exact).sum() / (exact**2).sum()
    error = np.sqrt(((rounded - slope * exact) ** 2 * exact**2).sum()) / (exact**2).sum()
    assert error < 0.1 and abs(slope - 1) < 4 * error
    assert abs((rounded - exact).mean()) < 4 * (rounded - exact).std() / len(exact) ** 0.5


def test_the_logged_learning_rates_are_those_of_a_steps_last_update():
    """Two updates a step; the policy begins a step later, and warms up over three of its six updates."""
    policy, critic = {"lr": 1.0, "warmup": 0.5}, {"lr": 2.0, "warmup": 0.0, "schedule": "linear"}
    tree = {"name": "x", "steps": 4, "model": {"path": "embedded"}, "data": {"path": "embedded:train"}}
    tree["learn"] = {"minibatch": 4, "critic_warmup": 1, "policy": policy, "critic": critic}
    config = configs.load(tree | {"sample": {"questions": 8}})
    logged = {}
    for command in ("train", "sft"):
        job: Any = SimpleNamespace(parts=SimpleNamespace(config=config), steps=4, command=command)
        logged[command] = [loop.learning_rates(job, n) for n in (1, 2, 4)]
    rates = [{"critic": 1.75}, {"policy": 2 / 3, "critic": 1.25}, {"policy": 1.0, "critic": 0.25}]
    rates = [{f"{name}/learning_rate": pytest.approx(x) for name, x in each.items()} for each in rates]
    assert logged["train"] == rates
    assert [x["policy/learning_rate"] for x in logged["sft"]] == pytest.approx([0.5, 1.0, 1.0])


def test_schedules_end_with_the_run_though_the_policy_waits_for_its_critic():
    """10 steps of 4 updates: the critic's rate falls to 0 over 40 of them, the policy's over the last 4
    steps' 16.
    """
    linear = {"lr": 1.0, "warmup": 0.0, "schedule": "linear", "clip_norm": 1e9}
    c = settings(learn__policy=linear, learn__critic=linear, learn__critic_warmup=6)
    made = programs.make_programs(Loop(c).parts, 10)
    for tx, updates in ((made.policy_tx, 16), (made.critic_tx, 40)):
        params, steps = {"embed": jnp.zeros(1)}, []
        state = tx.init(params)
        for _ in range(updates + 1):
            step, state = tx.update({"embed": jnp.ones(1)}, state, params)
            steps.append(-float(step["embed"][0]))
        np.testing.assert_allclose(steps, 1 - np.arange(updates + 1) / updates, rtol=1e-4, atol=1e-6)


def fit(kind, mesh, devices):
    """Eight minibatches of likelihood on one batch; Adafactor factors axes of 128 and more, so the model is
    wider here.
    """
    cfg = dataclasses.replace(CFG, embed=128, ffn=256, layers=1)
    # Muon makes all directions of a moment alike, so the rounding of a bfloat16 one to whole steps in those
    # the gradient has not.
    moments = "float32" if kind == "muon" else "bfloat16"
    c = settings(
        "group", mesh=mesh, learn__policy={"kind": kind, "lr": 1e-2, "weight_decay": 0.1, "moments": moments}
    )
    parts = Parts(c, None, cfg, cfg, sharding.make_mesh(c.mesh, jax.devices()[:devices]))
    rng = np.random.default_rng(0)
    prompts, targets = rng.integers(0, 64, (Q, P)), rng.integers(0, 64, (Q, 1, R))
    given = Prompts(prompts, np.ones((Q, P), bool), np.arange(Q, dtype=np.uint32))
    rows = Experience(given, targets, np.ones((Q, 1, R), bool), *[None] * 5)
    tx = learn.make_optimizer(c.learn.policy, 8)
    with jax.set_mesh(parts.mesh):
        learner, placed = build.init_learner(parts, cfg, tx)
        program = learn.compile_learn(c, learn.nll_objective(c, cfg), tx, placed)
        losses = []
        for _ in range(2):
            learner, metrics = program(
                learner, {}, sharding.place_rows(rows, len(rows.tokens), parts.mesh), jax.random.key(0), None
            )
            losses.append(float(metrics["loss"].value()))
    assert program._cache_size() == 1
    assert [x.sharding for x in jax.tree.leaves(learner)] == jax.tree.leaves(placed)
    return losses, jax.device_get(learner.params), learner.opt_state


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_optimisers_learn_and_shard(kind):
    (losses, want, _), (_, got, state) = fit(kind, {}, 1), fit(kind, {"fsdp": 4, "tensor": 2}, 8)
    assert losses[1] < losses[0] - 0.5
    assert furthest(want, got) < 1e-3
    gate = {
        jax.tree_util.keystr(path): tuple(x.sharding.spec)
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
        if "gate" in jax.tree_util.keystr(path) and x.size > 1
    }
    # of a gate [layers, embed, ffn]
    whole, row, column = (None, "fsdp", "tensor"), (None, "fsdp"), (None, "tensor")
    assert (
        sorted(gate.values(), key=str)
        == {"adamw": [whole, whole], "adafactor": sorted([row, column]), "muon": [whole]}[kind]
    )


def test_muon_takes_q_k_and_v_of_a_tower_apart():
    """A small gradient of q beside large ones of k and v gives as large a step."""
    grads = np.random.default_rng(0).normal(size=(1, 16, 3, 2, 8)) * np.array([0.01, 1, 1])[:, None, None]
    params = {"vision": {"layers": {"qkv": jnp.asarray(grads, jnp.float32)}}}
    tx = learn.make_optimizer(schema.OptimConfig(kind="muon", lr=1.0, warmup=0.0), 2)
    step = tx.update(params, tx.init(params), params)[0]["vision"]["layers"]["qkv"]
    sizes = np.sqrt((np.asarray(step)[0] ** 2).sum((0, 2, 3)))
    np.testing.assert_allclose(sizes, sizes[0], rtol=0.2)


def test_weight_decay_leaves_norms_biases_and_the_value_head_alone():
    kinds = dataclasses.replace(CFG, tied=False), CFG.run_with(value_head=True)
    head, params = (spec.init(cfg, jax.random.key(0)) for cfg in kinds)
    params = jax.tree.map(jnp.ones_like, params | {"head": head["head"]})
    for kind in ("adamw", "adafactor", "muon"):
        tx = learn.make_optimizer(schema.OptimConfig(kind=kind, lr=0.1, warmup=0.0, weight_decay=0.5), 4)
        step, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        decayed = {"/".join(key) for key, leaf in lora.flat(step).items() if (leaf != 0).any()}
        matrices = {f"layers/{name}" for name in spec.MATRICES}
        assert decayed == matrices | {"embed", "head"}
        np.testing.assert_allclose(step["layers"]["q"], -0.05, rtol=1e-6)

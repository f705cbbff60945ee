"""Learning from a rollout: one `update` and one `learn` for policy, critic and supervised fine-tuning.

They differ by objective, a function (params, rows, extra, row size) → (Mean loss, metrics); params are the
learner's joined with the frozen base, which is an argument of the program, not donated, and has no gradient.
Gradients of the Mean's total add over micro-batches and are divided once by its count, so no split of the
rows changes anything but rounding.

Whatever the parameters' dtype, gradients are added up, moments kept and updates computed in float32. A
parameter kept in bfloat16 gets its update by stochastic rounding (`moved`): rounded to the nearest, an update
of less than half a step of its last bit would be lost, and at the rates of RL nearly all of them are. No
float32 copy of the parameters exists.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from medrlvr_jax import sharding
from medrlvr_jax.config.schema import Config, KLConfig, OptimConfig
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.spec import Parameter, row_of
from medrlvr_jax.rl import losses
from medrlvr_jax.types import Array, Experience, Learner, Mean, Params

Metrics = dict[str, Mean]
Objective = Callable[[Params, Experience, Any, int], tuple[Mean, Metrics]]


@dataclass(frozen=True)
class LearnSettings:
    """How a learner learns: constants of its compiled program."""

    objective: Objective
    tx: optax.GradientTransformation
    epochs: int
    minibatch: int  # questions of an optimiser step
    micro: int  # questions whose gradient is computed at a time
    row_shares: tuple[float, ...]  # see `scoring.row_sizes`


def learning_rate(config: OptimConfig, updates: int) -> optax.Schedule:
    """The learning rate by the number of updates before; `updates` is the whole run's number."""
    warmup = max(1, round(config.warmup * updates)) if config.warmup else 0
    rest = max(1, updates - warmup)
    after = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }[config.schedule]
    if not warmup:
        return after
    # starts at lr / warmup, not at 0: no optimiser step is spent on standing still
    return optax.join_schedules([lambda n: config.lr * (n + 1) / warmup, after], [warmup])


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """The config's optimiser after clipping by global norm; `updates` is the whole run's number.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. adafactor: Shazeer & Stern, arXiv 1804.04235, without
    momentum and without scaling by the parameter's size. muon: Jordan 2024 on the layers' matrices, scaled to
    AdamW's step (arXiv 2502.16982), AdamW on the rest. State and updates are float32 for parameters of any
    dtype, but for first moments where `moments` says otherwise.
    """
    rate = learning_rate(config, updates)
    decay, shared = config.weight_decay, {"eps": config.eps, "mu_dtype": config.moments}
    match config.kind:
        case "adamw":
            b1, b2 = config.b1, config.b2
            rule = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=_decays, **shared)
        case "adafactor":
            rule = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay, _decays),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            shared |= {"beta": config.b1, "adam_b1": config.b1, "adam_b2": config.b2, "consistent_rms": 0.2}
            rule = optax.chain(
                optax.contrib.muon(1.0, muon_weight_dimension_numbers=_matrix_axes, **shared),
                # minus the direction: muon's own decay would leave embedding and head alone
                optax.add_decayed_weights(-decay, _decays),
                optax.scale_by_learning_rate(rate, flip_sign=False),
            )
    return _in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), rule))


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` as if gradients and parameters were float32; optax's state would have the parameters' dtype."""

    def init(params):
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params: Any = None):
        return tx.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


def _decays(params: Params) -> Params:
    """Norms, biases and the value head do not decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _row(path).decays, params)


def _row(path: Any) -> Parameter:
    return row_of(tuple(key.key for key in path))


def _matrix_axes(params: Params) -> Params:
    """For Muon: which axes are input and output of a layer's matrix, or adapter's half; None: not one. A
    tower's q, k and v are three matrices in one array.
    """

    def axes(path, _):
        row = _row(path)
        if row.kind not in ("matrix", "adapter"):
            return None
        names = ["layers"] * row.stacked + row.axes.split()
        places = [i for i, name in enumerate(names) if name not in ("layers", "three")]
        inputs = len(row.inputs.split())
        return optax.contrib.MuonDimensionNumbers(tuple(places[:inputs]), tuple(places[inputs:]))

    return jax.tree_util.tree_map_with_path(axes, params)


def policy_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """The clipped surrogate (and its kin) of `losses.policy_loss`; extra is the KL coefficient."""
    temperature, slab = config.sample.temperature, config.model.logit_slab
    read = partial(scoring.token_logprobs, temperature=temperature, slab=slab)

    def objective(params, rows, kl_coef, size):
        rows = replace(rows, prompts=rows.prompts.unseen)
        logprobs, entropy = scoring.at_responses(params, cfg, rows, size, partial(read, params, cfg))
        length = config.sample.max_new_tokens
        return losses.policy_loss(logprobs, entropy, rows, config.loss, config.kl, kl_coef, length)

    return objective


def critic_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """The clipped squared error of `losses.value_loss`; extra is unused."""

    def objective(params, rows, _, size):
        read = lambda hidden, _: scoring.values(params, cfg, hidden)
        return losses.value_loss(scoring.at_responses(params, cfg, rows, size, read), rows, config.loss)

    return objective


def nll_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """Negative log-likelihood of the targets; extra is unused."""
    read = partial(scoring.token_logprobs, temperature=1.0, slab=config.model.logit_slab)

    def objective(params, rows, _, size):
        rows = replace(rows, prompts=rows.prompts.unseen)
        logprobs, _ = scoring.at_responses(params, cfg, rows, size, partial(read, params, cfg))
        return losses.nll_loss(logprobs, rows.mask)

    return objective


def _mixed(x: Array) -> Array:
    """MurmurHash3's finaliser, elementwise: each bit of x moves every bit of the result. One-to-one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def stochastic_round(x: Array, word: Array) -> Array:
    """float32 [...] → bfloat16 [...], one of its two neighbours, so that the expectation over `word` is x
    (Gupta et al. 2015, arXiv 1502.02551; for Adam in bfloat16 Zamirai et al. 2020, arXiv 2010.06192).

    The noise of an entry is a hash of `word`, uint32 [], and of the entry's place: the same on every mesh,
    and, unlike that of `jax.random.bits`, fused into the update on every platform, so that it takes no
    memory.
    """
    noise = word
    for axis in range(x.ndim):
        noise = _mixed(noise ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis))
    # carries with the chance of what is cut off
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def moved(params: Params, updates: Params, key: Array) -> Params:
    """params + updates (float32) in params' dtypes; bfloat16 by stochastic rounding (key, leaf, place)."""
    leaves, tree = jax.tree.flatten(params)
    words = jax.random.bits(key, (len(leaves),), jnp.uint32)

    def move(p: Array, u: Array, word: Array) -> Array:
        return stochastic_round(p.astype(jnp.float32) + u, word) if p.dtype == jnp.bfloat16 else p + u

    return jax.tree.unflatten(tree, map(move, leaves, jax.tree.leaves(updates), words))


def update(
    learner: Learner, base: Params, rows: Experience, key: Array, extra: Any, how: LearnSettings
) -> tuple[Learner, Metrics]:
    """One optimiser step on `rows`, `how.micro` at a time. One whose loss or gradient is not finite is not
    taken: `skipped` counts it.

    `key`: this step's own, for the rounding of parameters in bfloat16; float32 ones have no use for it.
    """
    n, samples, length = rows.tokens.shape
    micro, sizes = how.micro, scoring.row_sizes(how.row_shares, samples, length)

    def gradients(part: Experience):
        def total(params, size):
            mean, metrics = how.objective(lora.join(base, params), part, extra, size)
            return mean.total, (mean, metrics)

        # The choice of a size is outside of the gradient: inside, what the backward pass keeps would be kept
        # for every size.
        with jax.named_scope("gradients"):
            grads, (mean, metrics) = scoring.at_row_size(
                part.mask, sizes, lambda size: jax.grad(total, has_aux=True)(learner.params, size)
            )
        return optax.tree.cast(grads, jnp.float32), {"loss": mean, **jax.lax.stop_gradient(metrics)}

    if micro == n:
        grads, metrics = gradients(rows)
    else:
        parts = sharding.split_rows(rows, micro)
        shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradients(part)), None)
        (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
    count = jnp.maximum(metrics["loss"].count, 1)
    grads = jax.tree.map(lambda g: g / count, grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = how.tx.update(grads, learner.opt_state, learner.params)
        after = Learner(moved(learner.params, updates, key), opt_state)
    norm = optax.tree.norm(grads)
    sound = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
    metrics["grad_norm"] = Mean(norm, jnp.float32(1))
    # they tell of the steps that were taken
    metrics = jax.tree.map(lambda x: jnp.where(sound, x, 0), metrics)
    metrics["skipped"] = Mean(1.0 - sound, jnp.float32(1))
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, learner), metrics


def learn(
    learner: Learner, base: Params, experience: Experience, key: Array, extra: Any, *, how: LearnSettings
) -> tuple[Learner, Metrics]:
    """Several epochs over shuffled minibatches of questions; metrics are summed over all optimiser steps.

    Shuffles and the rounding's noise are functions of `key` and of the place in here, not of what was learned
    or skipped before.
    """
    n, epochs, minibatch = experience.tokens.shape[0], how.epochs, how.minibatch
    shuffles = [jax.random.permutation(jax.random.fold_in(key, epoch), n) for epoch in range(epochs)]
    order = jnp.stack(shuffles).reshape(epochs * (n // minibatch), minibatch)

    def take_step(learner, step):
        index, key = step
        rows = experience if minibatch == n else jax.tree.map(lambda x: x[index], experience)
        return update(learner, base, rows, key, extra, how)

    keys = jax.random.split(jax.random.fold_in(key, epochs), len(order))
    learner, metrics = jax.lax.scan(take_step, learner, (order, keys))
    return learner, jax.tree.map(lambda x: x.sum(0), metrics)


def compile_learn(
    config: Config, objective: Objective, tx: optax.GradientTransformation, learner_shardings: Learner
):
    """`learn` jitted for one learner: state donated, its shardings pinned (else step 2 compiles again)."""
    c = config.learn
    how = LearnSettings(objective, tx, c.epochs, c.minibatch, c.microbatch or c.minibatch, c.row_sizes)
    return jax.jit(partial(learn, how=how), donate_argnums=0, out_shardings=(learner_shardings, None))


def offload(config: Config, learner: Learner, program: Any) -> tuple[Learner, Any]:
    """With `learn.offload`: the optimiser's state waits in the host's memory between calls of `program`."""

    if not config.learn.offload:
        return learner, program

    def put(learner: Learner, kind: str) -> Learner:
        return Learner(learner.params, sharding.to_memory(learner.opt_state, kind))

    def visit(learner: Learner, *rest):
        learner, metrics = program(put(learner, "device"), *rest)
        return put(learner, "pinned_host"), metrics

    return put(learner, "pinned_host"), visit


def adapt_kl(coef: Array, kl: Array, samples: int, config: KLConfig) -> Array:
    """Ziegler et al. 2019 (arXiv 1909.08593), eq. 6: the coefficient follows the KL of a response."""
    if config.target is None:
        return coef
    # a rollout without a KL moves nothing
    error = jnp.nan_to_num(jnp.clip(kl / config.target - 1, -0.2, 0.2))
    return coef * (1 + error * samples / config.horizon)

"""Learning from a rollout: one `update` and one `learn` for policy, critic and supervised fine-tuning.

The three differ by their objective, a function (params, rows, extra, row size) → (Mean loss, metrics). Its
params are the learner's joined with the frozen base. The base is an argument of the program; it is not
donated and has no gradient. Gradients are those of the Mean's total. They are summed over micro-batches and
divided once by its count, so the split of the rows changes nothing but rounding.

Gradients, moments and updates are float32 for parameters of any dtype. A bfloat16 parameter gets its update
by stochastic rounding (`add_updates`). Rounding to nearest would lose each update that is smaller than half
a unit in the last place, which at the learning rates of RL are nearly all. There is no float32 copy of the
parameters.
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
from medrlvr_jax.config.schema import Config, OptimConfig
from medrlvr_jax.model import lora, scoring
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.spec import Parameter, row_of
from medrlvr_jax.rl import losses
from medrlvr_jax.types import Array, Experience, Learner, Mean, Params

Metrics = dict[str, Mean]
Objective = Callable[[Params, Experience, Any, int], tuple[Mean, Metrics]]


@dataclass(frozen=True)
class LearnSettings:
    """The static arguments of `learn`."""

    objective: Objective
    tx: optax.GradientTransformation
    epochs: int
    minibatch: int  # questions per optimiser step
    micro: int  # questions per forward and backward pass
    row_shares: tuple[float, ...]  # see `scoring.row_sizes`


def learning_rate(config: OptimConfig, updates: int) -> optax.Schedule:
    """Return the schedule: from the number of earlier updates to the learning rate. `updates`: the number of
    updates in the whole run.
    """
    warmup = max(1, round(config.warmup * updates)) if config.warmup else 0
    rest = max(1, updates - warmup)
    after = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }[config.schedule]
    if not warmup:
        return after
    # It starts at lr / warmup and not at 0, because an update with rate 0 does nothing.
    return optax.join_schedules([lambda n: config.lr * (n + 1) / warmup, after], [warmup])


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """Return the config's optimiser, which first clips gradients by their global norm. `updates`: the number
    of updates in the whole run.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. adafactor: Shazeer & Stern, arXiv 1804.04235, without
    momentum and without scaling by the parameter's size. muon: Jordan 2024 on the layers' matrices, scaled to
    AdamW's step (arXiv 2502.16982), AdamW on the rest. State and updates are float32 for parameters of any
    dtype, except for first moments if `moments` is bfloat16.
    """
    rate = learning_rate(config, updates)
    decay, shared = config.weight_decay, {"eps": config.eps, "mu_dtype": config.moments}
    match config.kind:
        case "adamw":
            b1, b2 = config.b1, config.b2
            rule = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=_decay_mask, **shared)
        case "adafactor":
            rule = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay, _decay_mask),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            shared |= {"beta": config.b1, "adam_b1": config.b1, "adam_b2": config.b2, "consistent_rms": 0.2}
            rule = optax.chain(
                optax.contrib.muon(1.0, muon_weight_dimension_numbers=_muon_axes, **shared),
                # negative, because muon(1.0) has already turned the sign; its own decay would skip the
                # embedding and the head
                optax.add_decayed_weights(-decay, _decay_mask),
                optax.scale_by_learning_rate(rate, flip_sign=False),
            )
    return _in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), rule))


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `tx` for gradients and parameters cast to float32, so that its state is float32, too."""

    def init(params):
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params: Any = None):
        return tx.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


def _decay_mask(params: Params) -> Params:
    """Return for each parameter whether weight decay applies: not to norms, biases and the value head."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _row(path).decays, params)


def _row(path: Any) -> Parameter:
    return row_of(tuple(key.key for key in path))


def _muon_axes(params: Params) -> Params:
    """Return the input and output axes of each matrix of a layer or adapter, for Muon; None for parameters
    that AdamW updates. A vision tower's q, k and v are three matrices in one array.
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
    """Return the objective `losses.policy_loss`, whose extra is the KL coefficient."""
    temperature, slab = config.sample.temperature, config.model.logit_slab
    read = partial(scoring.token_logprobs, temperature=temperature, slab=slab)

    def objective(params, rows, kl_coef, size):
        rows = replace(rows, prompts=rows.prompts.unseen)
        logprobs, entropy = scoring.at_responses(params, cfg, rows, size, partial(read, params, cfg))
        length = config.sample.max_new_tokens
        return losses.policy_loss(logprobs, entropy, rows, config.loss, config.kl, kl_coef, length)

    return objective


def critic_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """Return the objective `losses.value_loss`, whose extra is unused."""

    def objective(params, rows, _, size):
        read = lambda hidden, _: scoring.values(params, cfg, hidden)
        return losses.value_loss(scoring.at_responses(params, cfg, rows, size, read), rows, config.loss)

    return objective


def nll_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """Return the negative log-likelihood of the targets as an objective, whose extra is unused."""
    read = partial(scoring.token_logprobs, temperature=1.0, slab=config.model.logit_slab)

    def objective(params, rows, _, size):
        rows = replace(rows, prompts=rows.prompts.unseen)
        logprobs, _ = scoring.at_responses(params, cfg, rows, size, partial(read, params, cfg))
        return losses.nll_loss(logprobs, rows.mask)

    return objective


def _hash(x: Array) -> Array:
    """Apply MurmurHash3's finaliser to each element: a bijection in which each bit changes all bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def stochastic_round(x: Array, word: Array) -> Array:
    """Round float32 [...] up or down to bfloat16 [...], such that the expectation over `word` is x (Gupta et
    al. 2015, arXiv 1502.02551; for Adam in bfloat16 Zamirai et al. 2020, arXiv 2010.06192).

    The noise of an element is a hash of `word`, uint32 [], and of the element's index, so it is the same on
    every mesh. Unlike `jax.random.bits`, it is fused into the update on every platform and takes no memory.
    """
    noise = word
    for axis in range(x.ndim):
        noise = _hash(noise ^ jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis))
    # The sum carries with a probability that is proportional to the bits that are cut off.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def add_updates(params: Params, updates: Params, key: Array) -> Params:
    """Add float32 updates to the parameters and keep their dtypes: bfloat16 by stochastic rounding."""
    leaves, tree = jax.tree.flatten(params)
    words = jax.random.bits(key, (len(leaves),), jnp.uint32)

    def add(p: Array, u: Array, word: Array) -> Array:
        return stochastic_round(p.astype(jnp.float32) + u, word) if p.dtype == jnp.bfloat16 else p + u

    return jax.tree.unflatten(tree, map(add, leaves, jax.tree.leaves(updates), words))


def update(
    learner: Learner, base: Params, rows: Experience, key: Array, extra: Any, settings: LearnSettings
) -> tuple[Learner, Metrics]:
    """Take one optimiser step on `rows`, with gradients of `settings.micro` questions at a time.

    If the loss or the gradient is not finite, the learner stays as it is, and the metric `skipped` is 1.
    `key`: for the stochastic rounding of bfloat16 parameters.
    """
    n, samples, length = rows.tokens.shape
    micro, sizes = settings.micro, scoring.row_sizes(settings.row_shares, samples, length)

    def gradients(part: Experience):
        def total(params, size):
            mean, metrics = settings.objective(lora.join(base, params), part, extra, size)
            return mean.total, (mean, metrics)

        # The size is chosen outside of the gradient. Inside, the residuals of all sizes would be kept.
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
        updates, opt_state = settings.tx.update(grads, learner.opt_state, learner.params)
        after = Learner(add_updates(learner.params, updates, key), opt_state)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
    metrics["grad_norm"] = Mean(norm, jnp.float32(1))
    # metrics are of the steps that were taken
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics)
    metrics["skipped"] = Mean(1.0 - finite, jnp.float32(1))
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, learner), metrics


def learn(
    learner: Learner, base: Params, experience: Experience, key: Array, extra: Any, *, settings: LearnSettings
) -> tuple[Learner, Metrics]:
    """Take several epochs over shuffled minibatches of questions. Metrics are sums over all optimiser steps.

    The shuffles and the noise of rounding depend on `key` and on the number of the optimiser step alone.
    """
    n, epochs, minibatch = experience.tokens.shape[0], settings.epochs, settings.minibatch
    shuffles = [jax.random.permutation(jax.random.fold_in(key, epoch), n) for epoch in range(epochs)]
    order = jnp.stack(shuffles).reshape(epochs * (n // minibatch), minibatch)

    def take_step(learner, step):
        index, key = step
        rows = experience if minibatch == n else jax.tree.map(lambda x: x[index], experience)
        return update(learner, base, rows, key, extra, settings)

    keys = jax.random.split(jax.random.fold_in(key, epochs), len(order))
    learner, metrics = jax.lax.scan(take_step, learner, (order, keys))
    return learner, jax.tree.map(lambda x: x.sum(0), metrics)


def compile_learn(
    config: Config, objective: Objective, tx: optax.GradientTransformation, learner_shardings: Learner
):
    """Return `learn`, jitted for one learner. It donates the learner and pins the result's shardings; without
    them the second step would compile again.
    """
    c = config.learn
    settings = LearnSettings(objective, tx, c.epochs, c.minibatch, c.microbatch or c.minibatch, c.row_sizes)
    return jax.jit(
        partial(learn, settings=settings), donate_argnums=0, out_shardings=(learner_shardings, None)
    )


def offload(config: Config, learner: Learner, program: Any) -> tuple[Learner, Any]:
    """Return the learner and the program such that, with `learn.offload`, the optimiser's state is in the
    host's memory between calls of the program.
    """
    if not config.learn.offload:
        return learner, program

    def put(learner: Learner, kind: str) -> Learner:
        return Learner(learner.params, sharding.to_memory(learner.opt_state, kind))

    def on_device(learner: Learner, *rest):
        learner, metrics = program(put(learner, "device"), *rest)
        return put(learner, "pinned_host"), metrics

    return put(learner, "pinned_host"), on_device


def adapt_kl(coef: Array, kl: Array, samples: int, target: float, horizon: int) -> Array:
    """Return the next coefficient β: larger if the KL of a response exceeds the target, else smaller
    (Ziegler et al. 2019, arXiv 1909.08593, eq. 6).
    """
    # a KL that is not finite changes nothing
    error = jnp.nan_to_num(jnp.clip(kl / target - 1, -0.2, 0.2))
    return coef * (1 + error * samples / horizon)

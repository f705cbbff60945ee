"""Learning from a rollout: one `update` and one `learn` for policy, critic and supervised fine-tuning.

They differ by objective, a function (params, rows, extra, row size) → (Mean loss, metrics); params are the learner's joined with the frozen
base, which is an argument of the program, not donated, and has no gradient. Gradients of the Mean's total add over micro-batches and
are divided once by its count, so no split of the rows changes anything but rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from medrlvr_jax import lora, losses, model, scoring, sharding
from medrlvr_jax.config import Config, KLConfig, LossConfig, OptimConfig
from medrlvr_jax.model import DecoderConfig
from medrlvr_jax.types import Array, Experience, Learner, Mean, Params

Metrics = dict[str, Mean]
Objective = Callable[[Params, Experience, Any, int], tuple[Mean, Metrics]]


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """The config's optimiser after clipping by global norm; `updates` is the whole run's number.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. adafactor: Shazeer & Stern, arXiv 1804.04235, without momentum and without scaling
    by the parameter's size. muon: Jordan 2024 on the layers' matrices, scaled to AdamW's step (arXiv 2502.16982), AdamW on the rest.
    """
    warmup = max(1, round(config.warmup * updates)) if config.warmup else 0
    rest = max(1, updates - warmup)
    after = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }[config.schedule]
    # Warm-up starts at lr / warmup, not at 0: no optimiser step is spent on standing still.
    rate = optax.join_schedules([lambda n: config.lr * (n + 1) / warmup, after], [warmup]) if warmup else after
    c, decay = config, config.weight_decay
    rule = {
        "adamw": lambda: optax.adamw(rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=decay, mu_dtype=c.moments, mask=_decays),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay, _decays),
            optax.scale_by_learning_rate(rate),
        ),
        "muon": lambda: optax.contrib.muon(
            rate,
            beta=c.b1,
            eps=c.eps,
            weight_decay=decay,
            mu_dtype=c.moments,
            adam_b1=c.b1,
            adam_b2=c.b2,
            muon_weight_dimension_numbers=_matrix_axes,
            consistent_rms=0.2,
        ),
    }[c.kind]
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), rule())


def _decays(params: Params) -> Params:
    """Norms, biases and the value head do not decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("norm", "bias", "value")), params)


def _matrix_axes(params: Params) -> Params:
    """Muon's view of each parameter: which axes are input and output of a layer's matrix (or adapter's half); None: not one."""

    def axes(path, p):
        name = path[-1].key
        if path[0].key != "layers" or (name not in model.MATRICES and not lora.adapted(name)):
            return None
        inputs = 1 if name.endswith("_b") else model.MATRICES[lora.adapted(name) or name]
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, p.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def policy_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """The clipped surrogate (and its kin) of `losses.policy_loss`; extra is the KL coefficient."""
    loss: LossConfig = config.loss
    kl: KLConfig = config.kl

    def objective(params, rows, kl_coef, size):
        def read(hidden, tokens):
            return scoring.token_logprobs(params, cfg, hidden, tokens, config.sample.temperature, config.model.logit_slab)

        logprobs, entropy = scoring.at_responses(params, cfg, rows, size, read)
        return losses.policy_loss(logprobs, entropy, rows, loss, kl, kl_coef, config.sample.max_new_tokens)

    return objective


def critic_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """The clipped squared error of `losses.value_loss`; extra is unused."""

    def objective(params, rows, _, size):
        values = scoring.at_responses(params, cfg, rows, size, lambda hidden, _: scoring.values(params, cfg, hidden))
        return losses.value_loss(values, rows, config.loss)

    return objective


def nll_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """Negative log-likelihood of the targets; extra is unused."""

    def objective(params, rows, _, size):
        def read(hidden, tokens):
            return scoring.token_logprobs(params, cfg, hidden, tokens, 1.0, config.model.logit_slab)

        logprobs, _ = scoring.at_responses(params, cfg, rows, size, read)
        return losses.nll_loss(logprobs, rows.mask)

    return objective


def update(
    learner: Learner,
    base: Params,
    rows: Experience,
    extra: Any,
    objective: Objective,
    tx: optax.GradientTransformation,
    micro: int,
    row_shares: tuple[float, ...],
) -> tuple[Learner, Metrics]:
    """One optimiser step on `rows`, `micro` at a time. One whose loss or gradient is not finite is not taken: `skipped` counts it."""
    n, samples, length = rows.tokens.shape
    sizes = scoring.row_sizes(row_shares, samples, length)

    def gradients(part: Experience):
        def total(params, size):
            mean, metrics = objective(lora.join(base, params), part, extra, size)
            return mean.total, (mean, metrics)

        # The choice of a size is outside of the gradient: inside, what the backward pass keeps would be kept for every size.
        with jax.named_scope("gradients"):
            grads, (mean, metrics) = scoring.at_row_size(part.mask, sizes, lambda size: jax.grad(total, has_aux=True)(learner.params, size))
        return grads, {"loss": mean, **jax.lax.stop_gradient(metrics)}

    if micro == n:
        grads, metrics = gradients(rows)
    else:
        parts = sharding.split_rows(rows, micro)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts)))
        (grads, metrics), _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, gradients(part)), None), zeros, parts)
    count = jnp.maximum(metrics["loss"].count, 1)
    grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, learner.opt_state, learner.params)
        after = Learner(optax.apply_updates(learner.params, updates), opt_state)
    norm = optax.tree.norm(grads)
    sound = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
    metrics["grad_norm"] = Mean(norm, jnp.float32(1))
    metrics = jax.tree.map(lambda x: jnp.where(sound, x, 0), metrics)  # they tell of the steps that were taken
    metrics["skipped"] = Mean(1.0 - sound, jnp.float32(1))
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, learner), metrics


def learn(
    learner: Learner,
    base: Params,
    experience: Experience,
    key: Array,
    extra: Any,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    epochs: int,
    minibatch: int,
    micro: int,
    row_shares: tuple[float, ...],
) -> tuple[Learner, Metrics]:
    """Several epochs over shuffled minibatches of questions; metrics are summed over all optimiser steps."""
    n = experience.tokens.shape[0]
    shuffles = [jax.random.permutation(jax.random.fold_in(key, epoch), n) for epoch in range(epochs)]
    order = jnp.stack(shuffles).reshape(epochs * (n // minibatch), minibatch)

    def one(learner, index):
        rows = experience if minibatch == n else jax.tree.map(lambda x: x[index], experience)
        return update(learner, base, rows, extra, objective, tx, micro, row_shares)

    learner, metrics = jax.lax.scan(one, learner, order)
    return learner, jax.tree.map(lambda x: x.sum(0), metrics)


def compile_learn(config: Config, objective: Objective, tx: optax.GradientTransformation, learner_shardings: Learner):
    """`learn` jitted for one learner: state donated, its shardings pinned (else the second step compiles again)."""
    c = config.learn
    split = {"epochs": c.epochs, "minibatch": c.minibatch, "micro": c.microbatch or c.minibatch, "row_shares": c.row_sizes}
    body = partial(learn, objective=objective, tx=tx, **split)
    return jax.jit(body, donate_argnums=0, out_shardings=(learner_shardings, None))


def offload(config: Config, learner: Learner, program: Any) -> tuple[Learner, Any]:
    """With `learn.offload`: the learner's optimiser state waits in the host's memory, and comes to the device for `program` alone."""

    def moved(learner: Learner, kind: str) -> Learner:
        return Learner(learner.params, sharding.to_memory(learner.opt_state, kind))

    def visit(learner: Learner, *rest):
        learner, metrics = program(moved(learner, "device"), *rest)
        return moved(learner, "pinned_host"), metrics

    return (moved(learner, "pinned_host"), visit) if config.learn.offload else (learner, program)


def adapt_kl(coef: Array, kl: Array, samples: int, config: KLConfig) -> Array:
    """Ziegler et al. 2019 (arXiv 1909.08593), eq. 6: the coefficient follows the KL per response towards its target."""
    if config.target is None:
        return coef
    error = jnp.nan_to_num(jnp.clip(kl / config.target - 1, -0.2, 0.2))  # a rollout without a KL moves nothing
    return coef * (1 + error * samples / config.horizon)

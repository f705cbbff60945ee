"""Learning from a rollout: one `update` and one `learn` for policy, critic and supervised fine-tuning.

They differ by objective, a function (params, rows, extra) → (Mean loss, metrics). Gradients of the Mean's total add over
micro-batches and are divided once by its count, so no split of the rows changes anything but rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medrlvr_jax import losses, model
from medrlvr_jax.config import Config, KLConfig, LossConfig, OptimConfig
from medrlvr_jax.model import DecoderConfig
from medrlvr_jax.types import Array, Experience, Learner, Mean, Params

Metrics = dict[str, Mean]
Objective = Callable[[Params, Experience, Any], tuple[Mean, Metrics]]


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) after clipping by global norm; `updates` is the whole run's number."""
    warmup = max(1, round(config.warmup * updates)) if config.warmup else 0
    rest = max(1, updates - warmup)
    after = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }[config.schedule]
    # Warm-up starts at lr / warmup, not at 0: no optimiser step is spent on standing still.
    rate = optax.join_schedules([lambda n: config.lr * (n + 1) / warmup, after], [warmup]) if warmup else after
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=config.moments,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),  # norms and the value head do not decay
        ),
    )


def policy_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """The clipped surrogate (and its kin) of `losses.policy_loss`; extra is the KL coefficient."""
    loss: LossConfig = config.loss
    kl: KLConfig = config.kl

    def objective(params, rows, kl_coef):
        hidden = model.hidden_states(params, cfg, rows.prompts, rows.prompt_mask, rows.tokens)
        logprobs, entropy = model.token_logprobs(params, cfg, hidden, rows.tokens, config.sample.temperature, config.model.logit_slab)
        return losses.policy_loss(logprobs, entropy, rows, loss, kl, kl_coef, config.sample.max_new_tokens)

    return objective


def critic_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """The clipped squared error of `losses.value_loss`; extra is unused."""

    def objective(params, rows, _):
        hidden = model.hidden_states(params, cfg, rows.prompts, rows.prompt_mask, rows.tokens)
        return losses.value_loss(model.values(params, cfg, hidden), rows, config.loss)

    return objective


def nll_objective(config: Config, cfg: DecoderConfig) -> Objective:
    """Negative log-likelihood of the targets; extra is unused."""

    def objective(params, rows, _):
        hidden = model.hidden_states(params, cfg, rows.prompts, rows.prompt_mask, rows.tokens)
        logprobs, _ = model.token_logprobs(params, cfg, hidden, rows.tokens, 1.0, config.model.logit_slab)
        return losses.nll_loss(logprobs, rows.mask)

    return objective


def update(
    learner: Learner, rows: Experience, extra: Any, objective: Objective, tx: optax.GradientTransformation, micro: int
) -> tuple[Learner, Metrics]:
    """One optimiser step on `rows`, `micro` of them at a time."""

    def gradients(part: Experience):
        def total(params):
            mean, metrics = objective(params, part, extra)
            return mean.total, (mean, metrics)

        grads, (mean, metrics) = jax.grad(total, has_aux=True)(learner.params)
        return grads, {"loss": mean, **jax.lax.stop_gradient(metrics)}

    n = jax.tree.leaves(rows)[0].shape[0]
    if micro == n:
        grads, metrics = gradients(rows)
    else:
        # Strided, so that every micro-batch still spans all data shards.
        parts = jax.tree.map(lambda x: x.reshape(micro, n // micro, *x.shape[1:]).swapaxes(0, 1), rows)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts)))
        (grads, metrics), _ = jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, gradients(part)), None), zeros, parts)
    count = jnp.maximum(metrics["loss"].count, 1)
    grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, learner.opt_state, learner.params)
    params = optax.apply_updates(learner.params, updates)
    metrics["grad_norm"] = Mean(optax.tree.norm(grads), jnp.float32(1))
    return Learner(params, opt_state), metrics


def learn(
    learner: Learner,
    experience: Experience,
    key: Array,
    extra: Any,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    epochs: int,
    minibatch: int,
    micro: int,
) -> tuple[Learner, Metrics]:
    """Several epochs over shuffled minibatches of questions; metrics are summed over all optimiser steps."""
    n = experience.tokens.shape[0]
    shuffles = [jax.random.permutation(jax.random.fold_in(key, epoch), n) for epoch in range(epochs)]
    order = jnp.stack(shuffles).reshape(epochs * (n // minibatch), minibatch)

    def one(learner, index):
        rows = experience if minibatch == n else jax.tree.map(lambda x: x[index], experience)
        return update(learner, rows, extra, objective, tx, micro)

    learner, metrics = jax.lax.scan(one, learner, order)
    return learner, jax.tree.map(lambda x: x.sum(0), metrics)


def compile_learn(config: Config, objective: Objective, tx: optax.GradientTransformation, learner_shardings: Learner):
    """`learn` jitted for one learner: state donated, its shardings pinned (else the second step compiles again)."""
    c = config.learn
    body = partial(learn, objective=objective, tx=tx, epochs=c.epochs, minibatch=c.minibatch, micro=c.microbatch or c.minibatch)
    return jax.jit(body, donate_argnums=0, out_shardings=(learner_shardings, None))


def adapt_kl(coef: Array, kl: Array, samples: int, config: KLConfig) -> Array:
    """Ziegler et al. 2019 (arXiv 1909.08593), eq. 6: the coefficient follows the KL per response towards its target."""
    if config.target is None:
        return coef
    error = jnp.clip(kl / config.target - 1, -0.2, 0.2)
    return coef * (1 + error * samples / config.horizon)

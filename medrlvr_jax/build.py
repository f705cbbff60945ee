"""What every driver starts from: tokenizer, decoder, mesh, weights in their shards, optimiser states."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from medrlvr_jax import hf, model, sharding, text
from medrlvr_jax.config import Config, ConfigError
from medrlvr_jax.model import DecoderConfig
from medrlvr_jax.types import Learner, Params


@dataclass(frozen=True)
class Parts:
    """All that stays the same during a run."""

    config: Config
    tokenizer: text.Tokenizer
    cfg: DecoderConfig
    critic_cfg: DecoderConfig
    mesh: jax.sharding.Mesh


def build(config: Config) -> Parts:
    """Read everything that can be refused before any device work, then lay out the mesh."""
    cfg = hf.read_config(config.model.path)
    tokenizer = text.load_tokenizer(config.model.path)
    text.check_fits(tokenizer, cfg.vocab, config.model.path)
    return lay_out(config, tokenizer, cfg)


def lay_out(config: Config, tokenizer: Any, cfg: DecoderConfig, devices: list | None = None) -> Parts:
    """The mesh over `devices` (by default all there are), once every size is known to divide."""
    mesh = sharding.make_mesh(config.mesh, devices)
    unroll = mesh.devices.flat[0].platform == "cpu"
    cfg = dataclasses.replace(cfg, dtype=jnp.dtype(config.model.dtype).type, remat=config.model.remat, unroll=unroll)
    for name, size in (("sample.questions", config.sample.questions), ("learn.minibatch", config.learn.minibatch)):
        sharding.check_divides(name, size, mesh, sharding.BATCH)
    sharding.check_divides("learn.microbatch", config.learn.microbatch or config.learn.minibatch, mesh, sharding.BATCH)
    sharding.check_divides("eval.batch", config.eval.batch, mesh, sharding.BATCH)
    for name, size in (("attention heads", cfg.heads), ("MLP width", cfg.ffn), ("vocabulary", cfg.vocab)):
        sharding.check_divides(f"the model's {name}", size, mesh, ("tensor",))
    return Parts(config, tokenizer, cfg, dataclasses.replace(cfg, value_head=True), mesh)


def param_shardings(parts: Parts, cfg: DecoderConfig, table: dict) -> Any:
    return sharding.shardings(_abstract(cfg), parts.mesh, table)


def _abstract(cfg: DecoderConfig) -> Any:
    return jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))


def load_params(parts: Parts, cfg: DecoderConfig) -> Params:
    """The policy's (or, with `value_head`, the critic's) parameters, from the checkpoint or at random, in their TRAIN shards."""
    dtype, placed = jnp.dtype(parts.config.model.param_dtype), param_shardings(parts, cfg, sharding.TRAIN)
    if parts.config.model.init == "pretrained":
        return hf.load_params(parts.config.model.path, cfg, placed, dtype)

    def fresh(key):
        return jax.tree.map(lambda p: p.astype(dtype), nn.meta.unbox(model.init(cfg, key)))

    return jax.jit(fresh, out_shardings=placed)(jax.random.key(parts.config.seed))


def init_learner(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> tuple[Learner, Learner]:
    """A learner at its start, and its shardings."""
    params = load_params(parts, cfg)
    placed = learner_shardings(parts, cfg, tx)
    return Learner(params, jax.jit(tx.init, out_shardings=placed.opt_state)(params)), placed


def learner_shardings(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> Learner:
    placed = param_shardings(parts, cfg, sharding.TRAIN)
    shapes = jax.eval_shape(tx.init, nn.meta.unbox(_abstract(cfg)))
    return Learner(placed, sharding.like(shapes, placed, parts.mesh))


def abstract_params(parts: Parts, cfg: DecoderConfig, table: dict = sharding.TRAIN, dtype: str | None = None) -> Params:
    """Shapes, dtypes (by default the master weights') and shardings of a model's parameters."""
    kind, placed = jnp.dtype(dtype or parts.config.model.param_dtype), param_shardings(parts, cfg, table)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, kind, sharding=where), nn.meta.unbox(_abstract(cfg)), placed)


def abstract_policy(parts: Parts) -> Params:
    """The same of the policy, for restoring it."""
    return abstract_params(parts, parts.cfg)


def abstract_learner(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> Learner:
    """What `init_learner` makes, as shapes, dtypes and shardings."""
    params, placed = abstract_params(parts, cfg), learner_shardings(parts, cfg, tx)
    state = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), jax.eval_shape(tx.init, params), placed.opt_state
    )
    return Learner(params, state)


def make_relay(parts: Parts):
    """Parameters → the sampler's copy: arithmetic dtype, DECODE shards. Once per rollout, so that no token pays an all-gather.

    Layer by layer: all at once, XLA holds what it gathers a second time beside the result.
    """
    dtype, placed = jnp.dtype(parts.config.model.dtype), param_shardings(parts, parts.cfg, sharding.DECODE)
    one = sharding.of_one(placed["layers"])

    def lay(params, where):
        return jax.tree.map(lambda p, w: jax.lax.with_sharding_constraint(p.astype(dtype), w), params, where)

    def relay(params):
        rest = {name: p for name, p in params.items() if name != "layers"}
        return lay(rest, {name: placed[name] for name in rest}) | {"layers": jax.lax.map(lambda layer: lay(layer, one), params["layers"])}

    return jax.jit(relay, out_shardings=placed)


def updates_in(config: Config, steps: int) -> int:
    """Optimiser steps of a whole run."""
    return steps * config.learn.epochs * (config.sample.questions // config.learn.minibatch)


def total_steps(config: Config, n: int) -> int:
    """Steps of a run over n questions: `steps`, or `passes` over them."""
    if config.sample.questions > n:
        raise ConfigError(f"sample.questions: {config.sample.questions} is more than the {n} questions there are; lower it to {n} or less")
    return config.steps or max(1, round((config.passes or 0) * (n // config.sample.questions)))

"""What every driver starts from: tokenizer, decoder, mesh, weights in their shards, optimiser states."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from medrlvr_jax import sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.tokenizer import Tokenizer, load_tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model import decoder, lora, weights
from medrlvr_jax.model.decoder import DecoderConfig
from medrlvr_jax.types import Frozen, Learner, Params


@dataclass(frozen=True)
class Parts:
    """All that stays the same during a run."""

    config: Config
    tokenizer: Tokenizer
    cfg: DecoderConfig
    critic_cfg: DecoderConfig
    mesh: jax.sharding.Mesh

    @property
    def sampler_cfg(self) -> DecoderConfig:
        """The decoder that rollouts are drawn from. Evaluation is of `cfg`."""
        return dataclasses.replace(self.cfg, int8=self.config.sample.weights == "int8")


def build(config: Config) -> Parts:
    """Read everything that can be refused before any device work, then lay out the mesh."""
    cfg = weights.read_config(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    tokenizer.check_fits(cfg.vocab, config.model.path)
    require_equal(lambda: _settings(config) | {"the model's config.json": repr(cfg)})
    return lay_out(config, tokenizer, cfg)


def _settings(config: Config) -> dict[str, Any]:
    """By dotted name; but for paths, since it is what they hold that must be the same."""
    return {name: v for name, v in configs.flat(configs.to_tree(config)).items() if name.split(".")[-1] not in ("runs", "path", "file")}


def lay_out(config: Config, tokenizer: Any, cfg: DecoderConfig, devices: list | None = None) -> Parts:
    """The mesh over `devices` (by default all there are), once every size is known to divide."""
    mesh = sharding.make_mesh(config.mesh, devices)
    platform, m = mesh.devices.flat[0].platform, config.model
    cfg = dataclasses.replace(cfg, dtype=jnp.dtype(m.dtype).type, remat=m.remat, lora=m.lora)
    cfg = dataclasses.replace(cfg, splash=platform == "tpu" and m.attention == "auto" and not config.learn.row_sizes)
    cfg = dataclasses.replace(cfg, unroll=platform != "tpu" and config.sample.layout == "gathered", narrow=platform == "cpu")
    for name, size in (("sample.questions", config.sample.questions), ("learn.minibatch", config.learn.minibatch)):
        sharding.check_divides(name, size, mesh, sharding.BATCH)
    sharding.check_divides("learn.microbatch", config.learn.microbatch or config.learn.minibatch, mesh, sharding.BATCH)
    sharding.check_divides("eval.batch", config.eval.batch, mesh, sharding.BATCH)
    sharding.check_model(mesh, "tensor", {"attention heads": cfg.heads, "MLP width": cfg.ffn, "vocabulary": cfg.vocab})
    sharding.check_model(mesh, "fsdp", {"embedding width": cfg.embed})
    return Parts(config, tokenizer, cfg, dataclasses.replace(cfg, value_head=True), mesh)


def check_positions(parts: Parts, prompt: int, new: int, field: str) -> None:
    """Refuse rows that reach beyond the positions that the model was made for: there its answers decay without a word.

    `prompt`: tokens of the longest prompt (of fine-tuning: of the longest row's); `field`: the setting that allows `new` more.
    """
    limit, path = parts.cfg.max_positions, parts.config.model.path
    if limit is not None and prompt + new > limit:
        why = f"after a prompt of {prompt} tokens that is beyond max_position_embeddings = {limit} of {path}'s config.json"
        lower = f"lower it to {limit - prompt} or less, or " if prompt < limit else ""
        raise ConfigError(f"{field}: {new}: {why}; {lower}lower prompt.max_tokens, which drops longer prompts, or take another model")


# --- shapes, dtypes and shardings, of which everything below is made ---------------------------------------------------


def abstract_params(parts: Parts, cfg: DecoderConfig, table: dict = sharding.TRAIN) -> Params:
    """The whole tree of a decoder as ShapeDtypeStructs with shardings: adapters and what goes with them float32, else `param_dtype`."""
    boxed = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    where = lora.flat(sharding.shardings(boxed, parts.mesh, table))
    adapters = lora.flat(lora.trained(boxed, cfg)) if cfg.lora else {}
    kept = jnp.dtype(parts.config.model.param_dtype)

    def one(key, leaf):
        return jax.ShapeDtypeStruct(leaf.value.shape, jnp.dtype("float32") if key in adapters else kept, sharding=where[key])

    return unflatten_dict({key: one(key, leaf) for key, leaf in lora.flat(boxed).items()})


def abstract_base(parts: Parts) -> Params:
    """What `load_base` returns, abstractly."""
    return abstract_params(parts, lora.off(parts.cfg)) if parts.cfg.lora else {}


def abstract_learner(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> Learner:
    """A learner as ShapeDtypeStructs with the shardings it has while it learns."""
    params = lora.trained(abstract_params(parts, cfg), cfg)
    state = jax.eval_shape(tx.init, params)
    where = sharding.like(state, params, parts.mesh)
    return Learner(params, jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state, where))


def places(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda s: s.sharding, abstract)


# --- the same, filled -------------------------------------------------------------------------------------------------


def load_base(parts: Parts) -> Params:
    """The frozen decoder under the adapters; {} where all weights are trained."""
    return load_params(parts, lora.off(parts.cfg)) if parts.cfg.lora else {}


def load_params(parts: Parts, cfg: DecoderConfig) -> Params:
    """What is trained at a run's start: all weights, from the model's directory or at random; or fresh adapters (and a value head)."""
    c, abstract = parts.config, lora.trained(abstract_params(parts, cfg), cfg)
    if c.model.init == "pretrained" and not cfg.lora:
        return weights.load_params(c.model.path, cfg, places(abstract), jnp.dtype(c.model.param_dtype))

    def fresh(key):
        params = lora.trained(nn.meta.unbox(decoder.init(cfg, key)), cfg)
        return jax.tree.map(lambda p, like: p.astype(like.dtype), params, abstract)

    key = jax.random.key(c.seed)
    return jax.jit(fresh, out_shardings=places(abstract))(jax.random.fold_in(key, cfg.value_head) if cfg.lora else key)


def load_frozen(parts: Parts) -> Frozen:
    """Base and reference. The reference of adapters is the base itself; any other is a copy of the start, in host memory if offloaded."""
    reference = None
    if parts.config.kl.coef > 0:
        reference = {} if parts.cfg.lora else load_params(parts, parts.cfg)
    if reference and parts.config.learn.offload:
        reference = sharding.to_memory(reference, "pinned_host")
    return Frozen(load_base(parts), reference)


def abstract_frozen(parts: Parts) -> Frozen:
    """What `load_frozen` returns, as shapes."""
    reference = None
    if parts.config.kl.coef > 0:
        reference = {} if parts.cfg.lora else abstract_params(parts, parts.cfg)
    return Frozen(abstract_base(parts), reference)


def init_learner(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> tuple[Learner, Learner]:
    """A learner at its start, and its shardings."""
    params = load_params(parts, cfg)
    placed = places(abstract_learner(parts, cfg, tx))
    return Learner(params, jax.jit(tx.init, out_shardings=placed.opt_state)(params)), placed


def abstract_decode(parts: Parts, cfg: DecoderConfig) -> Params:
    """What `generate` takes, as ShapeDtypeStructs: in the arithmetic's dtype and whole along `fsdp`, but for norms and biases; for the
    layers where `unroll` makes them so itself, slice by slice; and where `sample.layout` leaves them in shards. int8 matrices have
    float32 scales.
    """
    here, whole = (lora.flat(abstract_params(parts, cfg, table)) for table in (sharding.TRAIN, sharding.DECODE))

    def one(key, p):
        name, layer = key[-1], key[0] == "layers"
        where = here[key] if layer and (cfg.unroll or parts.config.sample.layout == "sharded") else p
        kept = p.dtype if name.endswith(("norm", "bias")) or (layer and cfg.unroll) else jnp.dtype(parts.config.model.dtype)
        kept = jnp.int8 if cfg.int8 and name in decoder.MATRICES else jnp.float32 if name.endswith("_scale") else kept
        return jax.ShapeDtypeStruct(p.shape, kept, sharding=where.sharding)

    return unflatten_dict({key: one(key, p) for key, p in whole.items()})


@dataclass(frozen=True)
class Relay:
    """Whole parameters → what `generate` takes (`abstract_decode`). Once per rollout, so that no token pays an all-gather.

    What is so already is passed on as it is: a frozen bfloat16 base on one chip is never copied. Adapters stay beside their
    matrices, for a sum rounded to bfloat16 would lose the small ones, and the sampler's log-probs would not be the trainer's.
    """

    program: Any  # jitted: the parameters named by `moved` → their copies
    moved: dict[tuple, jax.ShapeDtypeStruct]  # by path, those that lie otherwise in the sampler's copy

    def __call__(self, params: Params) -> Params:
        flat = lora.flat(params)
        return unflatten_dict(flat | (self.program({key: flat[key] for key in self.moved}) if self.moved else {}))


def make_relay(parts: Parts, cfg: DecoderConfig) -> Relay:
    """The relay to a sampler `cfg`; nothing is compiled yet."""
    have, want = lora.flat(abstract_params(parts, parts.cfg)), lora.flat(abstract_decode(parts, cfg))

    def stays(key):
        return have[key].dtype == want[key].dtype and have[key].sharding.is_equivalent_to(want[key].sharding, want[key].ndim)

    moved = {key: leaf for key, leaf in have.items() if not stays(key)}
    where = {key: leaf.sharding for key, leaf in want.items() if key in moved or key not in have}
    layers = {key: s for key, s in where.items() if key[0] == "layers"}
    one, shards = sharding.of_one(layers), sharding.of_one({key: have[key].sharding for key in layers if key in have})
    put = jax.lax.with_sharding_constraint

    def quantized(layer):
        """Before they travel: a byte a weight."""
        out = {}
        for key, w in layer.items():
            if want[key].dtype == jnp.int8:
                whole, scale = decoder.quantize(w, decoder.MATRICES[key[-1]])
                out |= {key: put(whole, shards[key]), (*key[:-1], f"{key[-1]}_scale"): scale}
        return layer | out

    def lay(params, where):
        return {k: put(params[k].astype(want[k].dtype), s) for k, s in where.items()}

    def relay(params):
        """Layer by layer: all at once, XLA holds what it gathers a second time beside the result."""
        stacked = {k: params[k] for k in shards}
        laid = jax.lax.map(lambda layer: lay(quantized(layer), one), stacked) if stacked else {}
        return lay(params, {k: s for k, s in where.items() if k not in layers}) | laid

    return Relay(jax.jit(relay, out_shardings=where), moved)


def updates_in(config: Config, steps: int) -> int:
    """Optimiser steps of a whole run."""
    return steps * config.learn.epochs * (config.sample.questions // config.learn.minibatch)


def total_steps(config: Config, n: int) -> int:
    """Steps of a run over n questions: `steps`, or `passes` over them."""
    if config.sample.questions > n:
        raise ConfigError(f"sample.questions: {config.sample.questions} is more than the {n} questions there are; lower it to {n} or less")
    return config.steps or max(1, round((config.passes or 0) * (n // config.sample.questions)))

"""The start of every command: tokenizer, decoder, mesh, weights in their shards, optimiser states."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from medrlvr_jax import sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data.tokenizer import Tokenizer, load_tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model import families, lora, spec, weights
from medrlvr_jax.model.architecture import DecoderConfig, Execution, VisionConfig
from medrlvr_jax.model.spec import VISION
from medrlvr_jax.types import Array, Frozen, Learner, Params


@dataclass(frozen=True)
class Parts:
    """All that stays the same during a run."""

    config: Config
    tokenizer: Tokenizer
    cfg: DecoderConfig
    critic_cfg: DecoderConfig
    mesh: jax.sharding.Mesh
    tower: "Tower | None" = None  # None: the model sees no images, or this is only a plan

    @property
    def sampler_cfg(self) -> DecoderConfig:
        """The decoder that rollouts are drawn from. Evaluation is of `cfg`."""
        return self.cfg.run_with(int8=self.config.sample.weights == "int8")


class Tower:
    """A frozen vision tower. Its weights are loaded when they are first used, in the arithmetic's dtype."""

    def __init__(self, parts: Parts):
        self._parts = parts

    @cached_property
    def params(self) -> Params:
        model = self._parts.config.model
        if model.init == "random":
            problem = "a random vision tower that is not trained sees nothing"
            remedy = "set model.init to pretrained or model.vision to train, or take images out"
            raise ConfigError(f"model.init: random: {problem}; {remedy}")
        where = {VISION: places(abstract_tower(self._parts))}
        return weights.load_params(model.path, self._parts.cfg, where, jnp.dtype(model.dtype))[VISION]


def abstract_tower(parts: Parts) -> Params:
    """The vision tower's parameters as shapes with shardings."""
    if parts.cfg.execution.tower != "freeze":
        return abstract_params(parts, parts.cfg)[VISION]
    tower = spec.abstract(parts.cfg.run_with(tower="train"))[VISION]
    return sharding.structs(tower, parts.mesh, sharding.TRAIN, jnp.dtype(parts.config.model.dtype))


def read_model(path: str, field: str = "model.path") -> tuple[DecoderConfig, Tokenizer]:
    """Architecture and tokenizer of a directory or hub name; `field`: the setting that names it."""
    cfg, tokenizer = families.read_config(path, field), load_tokenizer(path, field)
    tokenizer.check_fits(cfg.vocab, path, field)
    return cfg, tokenizer


def build(config: Config) -> Parts:
    """Read everything that can be refused before any device work, then lay out the mesh."""
    cfg, tokenizer = read_model(config.model.path)
    require_equal(lambda: _settings(config) | {"the model's config.json": repr(cfg)})
    parts = lay_out(config, tokenizer, cfg)
    return dataclasses.replace(parts, tower=Tower(parts)) if parts.cfg.vision else parts


def _settings(config: Config) -> dict[str, Any]:
    """By dotted name; without paths, since only the contents of files must be the same."""
    settings = configs.flat(configs.to_tree(config))
    return {k: v for k, v in settings.items() if k.split(".")[-1] not in ("runs", "path", "file")}


def lay_out(config: Config, tokenizer: Any, cfg: DecoderConfig, devices: list | None = None) -> Parts:
    """The mesh over `devices` (by default all there are), once every size is known to divide."""
    mesh = sharding.make_mesh(config.mesh, devices)
    platform, m = mesh.devices.flat[0].platform, config.model
    execution = Execution(
        dtype=jnp.dtype(m.dtype).type,
        remat=m.remat,
        lora=m.lora,
        splash=platform == "tpu" and m.attention == "auto" and not config.learn.row_sizes,
        unroll=platform != "tpu" and config.sample.layout == "gathered",
        narrow=platform == "cpu",
        tower=m.vision,
    )
    if m.vision != "freeze" and cfg.vision is None:
        raise ConfigError(f"model.vision: {m.vision}: {m.path} has no vision tower; set it to freeze")
    if m.vision == "merger" and m.init == "random":
        problem = "the tower's blocks would stay random"
        raise ConfigError(f"model.vision: merger: {problem}; set it to train, or model.init to pretrained")
    cfg = dataclasses.replace(cfg, execution=execution)
    cfg = dataclasses.replace(cfg, vision=vision_of(cfg, config))
    sizes = {"sample.questions": config.sample.questions, "learn.minibatch": config.learn.minibatch}
    sizes["learn.microbatch"] = config.learn.microbatch or config.learn.minibatch
    sizes["eval.batch"] = config.eval.batch
    for name, size in sizes.items():
        sharding.check_divides(name, size, mesh, sharding.BATCH)
    check_widths(cfg, mesh)
    return Parts(config, tokenizer, cfg, cfg.run_with(value_head=True, tower="freeze"), mesh)


def check_widths(cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh that cannot split the decoder's sizes."""
    widths = {"attention heads": cfg.heads, "MLP width": cfg.ffn, "vocabulary": cfg.vocab}
    sharding.check_model(mesh, "tensor", widths)
    sharding.check_model(mesh, "fsdp", {"embedding width": cfg.embed})


def vision_of(cfg: DecoderConfig, config: Config) -> VisionConfig | None:
    """How the model sees images, none larger than `prompt.max_pixels`."""
    if cfg.vision is None or config.prompt.max_pixels is None:
        return cfg.vision
    return dataclasses.replace(cfg.vision, max_pixels=config.prompt.max_pixels)


def check_positions(parts: Parts, prompt: int, new: int, field: str) -> None:
    """Refuse rows with more positions than the model was trained for: its answers get worse there, silently.

    `prompt`: tokens of the longest prompt (in fine-tuning: of that of the longest row); `field`: the setting
    that allows `new` more.
    """
    limit, path = parts.cfg.max_positions, parts.config.model.path
    if limit is not None and prompt + new > limit:
        beyond = f"that is beyond max_position_embeddings = {limit} of {path}'s config.json"
        lower = f"lower it to {limit - prompt} or less, or " if prompt < limit else ""
        remedy = f"{lower}lower prompt.max_tokens, which drops longer prompts, or take another model"
        raise ConfigError(f"{field}: {new}: after a prompt of {prompt} tokens {beyond}; {remedy}")


# --- shapes, dtypes and shardings, of which everything below is made ---


def abstract_params(parts: Parts, cfg: DecoderConfig, table: dict = sharding.TRAIN) -> Params:
    """All parameters of a decoder as ShapeDtypeStructs with shardings. Those that are trained with adapters
    are float32, the others `model.param_dtype`.
    """
    float32, stored = jnp.dtype("float32"), jnp.dtype(parts.config.model.param_dtype)

    def dtype(path: tuple[str, ...]) -> jnp.dtype:
        return float32 if cfg.execution.lora and spec.row_of(path).trained_with_lora else stored

    boxed = spec.abstract(cfg)
    places = lora.flat(sharding.shardings(boxed, parts.mesh, table))
    struct = lambda path, box: jax.ShapeDtypeStruct(box.value.shape, dtype(path), sharding=places[path])
    return unflatten_dict({path: struct(path, box) for path, box in lora.flat(boxed).items()})


def abstract_base(parts: Parts) -> Params:
    """What `load_base` returns, abstractly."""
    return lora.frozen(abstract_params(parts, lora.off(parts.cfg)), parts.cfg)


def abstract_learner(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> Learner:
    """A learner as ShapeDtypeStructs with the shardings it has while it learns."""
    params = lora.trained(abstract_params(parts, cfg), cfg)
    state = jax.eval_shape(tx.init, params)
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
    return Learner(params, jax.tree.map(place, state, sharding.like(state, params, parts.mesh)))


def places(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda s: s.sharding, abstract)


# --- the same, with values ---


def load_base(parts: Parts) -> Params:
    """What is frozen of the policy's parameters: the decoder under adapters, the tower's blocks under a
    trained merger; {} where all weights are trained.
    """
    return _values(parts, lora.off(parts.cfg), abstract_base(parts))


def load_params(parts: Parts, cfg: DecoderConfig) -> Params:
    """What a run trains at its start: all weights, read or random; or new adapters (and a value head)."""
    return _values(parts, cfg, lora.trained(abstract_params(parts, cfg), cfg))


def _values(parts: Parts, cfg: DecoderConfig, abstract: Params) -> Params:
    """Start values of the parameters in `abstract`, which are some of `cfg`'s."""
    c, wanted = parts.config, lora.flat(abstract)
    new = lambda path: cfg.execution.lora is not None and spec.row_of(path).trained_with_lora
    fresh = {path: p for path, p in wanted.items() if c.model.init == "random" or new(path)}
    stored = unflatten_dict({path: p.sharding for path, p in wanted.items() if path not in fresh})
    values = {}
    if stored:
        values = weights.load_params(c.model.path, cfg, stored, jnp.dtype(c.model.param_dtype))
    if not fresh:
        return values

    def start(key: Array) -> dict[tuple, Array]:
        params = lora.flat(spec.init(cfg, key))
        return {path: params[path].astype(p.dtype) for path, p in fresh.items()}

    key = jax.random.key(c.seed)
    if cfg.execution.lora:
        key = jax.random.fold_in(key, cfg.execution.value_head)
    initial = jax.jit(start, out_shardings=places(fresh))(key)
    return lora.join(values, unflatten_dict(initial))


def load_policy(parts: Parts) -> Params:
    """All parameters of the policy that a run starts with."""
    return lora.join(load_base(parts), load_params(parts, parts.cfg))


def abstract_frozen(parts: Parts) -> Frozen:
    """Base and reference, as shapes. The reference has the base, too, and a copy of the start of all else
    that is trained but adapters; without a KL penalty there is none.
    """
    if parts.config.kl.coef == 0:
        return Frozen(abstract_base(parts), None)
    trained = lora.flat(lora.trained(abstract_params(parts, parts.cfg), parts.cfg))
    copied = {path: p for path, p in trained.items() if not spec.row_of(path).trained_with_lora}
    return Frozen(abstract_base(parts), unflatten_dict(copied))


def load_frozen(parts: Parts) -> Frozen:
    """The same with values; the reference in host memory if offloaded."""
    reference = abstract_frozen(parts).reference
    if reference:
        reference = _values(parts, parts.cfg, reference)
        if parts.config.learn.offload:
            reference = sharding.to_memory(reference, "pinned_host")
    return Frozen(load_base(parts), reference)


def init_learner(
    parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation
) -> tuple[Learner, Learner]:
    """A learner at its start, and its shardings."""
    params = load_params(parts, cfg)
    placed = places(abstract_learner(parts, cfg, tx))
    return Learner(params, jax.jit(tx.init, out_shardings=placed.opt_state)(params)), placed


def updates_in(config: Config, steps: int) -> int:
    """Optimiser steps of a whole run."""
    return steps * config.learn.epochs * (config.sample.questions // config.learn.minibatch)


def total_steps(config: Config, n: int) -> int:
    """Steps of a run over n questions: `steps`, or `passes` over them."""
    if config.sample.questions > n:
        why = f"{config.sample.questions} is more than the {n} questions there are"
        raise ConfigError(f"sample.questions: {why}; lower it to {n} or less")
    return config.steps or max(1, round((config.passes or 0) * (n // config.sample.questions)))

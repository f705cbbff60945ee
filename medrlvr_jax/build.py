"""Build what every run needs at its start: tokenizer, decoder, mesh, sharded weights, optimiser states."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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
    """What stays constant during a run: settings, tokenizer, architectures and mesh."""

    config: Config
    tokenizer: Tokenizer
    cfg: DecoderConfig
    critic_cfg: DecoderConfig
    mesh: jax.sharding.Mesh
    # Returns the frozen vision tower, loaded at the first call. None for a text model, and in a plan.
    tower: Callable[[], Params] | None = None

    @property
    def sampler_cfg(self) -> DecoderConfig:
        """The decoder that samples rollouts, with int8 weights if set. Evaluation samples from `cfg`."""
        return self.cfg.run_with(int8=self.config.sample.weights == "int8")


def read_model(path: str, field: str = "model.path") -> tuple[DecoderConfig, Tokenizer]:
    """Read the architecture and tokenizer of a directory or hub name. Errors name the setting `field`."""
    cfg, tokenizer = families.read_config(path, field), load_tokenizer(path, field)
    tokenizer.check_fits(cfg.vocab, path, field)
    return cfg, tokenizer


def build(config: Config) -> Parts:
    """Check the model and settings before any device work, then make the mesh and the `Parts` of a run."""
    cfg, tokenizer = read_model(config.model.path)
    require_equal(lambda: _shared_settings(config) | {"the model's config.json": repr(cfg)})
    parts = lay_out(config, tokenizer, cfg)
    return dataclasses.replace(parts, tower=cache(partial(load_tower, parts))) if parts.cfg.vision else parts


def _shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that must be equal in all processes, by dotted name. Paths may differ: the contents
    of the files are compared instead.
    """
    settings = configs.flat(configs.to_tree(config))
    return {k: v for k, v in settings.items() if k.split(".")[-1] not in ("runs", "path", "file")}


def lay_out(config: Config, tokenizer: Any, cfg: DecoderConfig, devices: list | None = None) -> Parts:
    """Make the mesh over `devices` (default: all) and return the `Parts`, without a tower.

    Raise `ConfigError` if the mesh cannot split the batches or the decoder, or `model.vision` cannot work.
    """
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
        problem = f"no vision tower of {m.path} is computed"
        raise ConfigError(f"model.vision: {m.vision}: {problem}; set it to freeze")
    if m.vision == "merger" and m.init == "random":
        problem = "the tower's blocks would stay random"
        raise ConfigError(f"model.vision: merger: {problem}; set it to train, or model.init to pretrained")
    cfg = dataclasses.replace(cfg, execution=execution, vision=limit_pixels(cfg, config))
    batches = {
        "sample.questions": config.sample.questions,
        "learn.minibatch": config.learn.minibatch,
        "learn.microbatch": config.learn.microbatch or config.learn.minibatch,
        "eval.batch": config.eval.batch,
    }
    for name, size in batches.items():
        sharding.check_divides(name, size, mesh, sharding.BATCH)
    check_widths(cfg, mesh)
    return Parts(config, tokenizer, cfg, cfg.run_with(value_head=True, tower="freeze"), mesh)


def check_widths(cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> None:
    """Raise `ConfigError` if the mesh cannot split the decoder's dimensions."""
    widths = {"attention heads": cfg.heads, "MLP width": cfg.ffn, "vocabulary": cfg.vocab}
    sharding.check_model_sizes(mesh, "tensor", widths)
    sharding.check_model_sizes(mesh, "fsdp", {"embedding width": cfg.embed})


def limit_pixels(cfg: DecoderConfig, config: Config) -> VisionConfig | None:
    """Return the model's vision settings, with `prompt.max_pixels` as the limit if that is set."""
    if cfg.vision is None or config.prompt.max_pixels is None:
        return cfg.vision
    return dataclasses.replace(cfg.vision, max_pixels=config.prompt.max_pixels)


def check_positions(parts: Parts, prompt: int, new: int, field: str) -> None:
    """Raise `ConfigError` if rows have more positions than the model was trained for.

    Beyond them a model's answers get worse without any error. `prompt`: tokens of the longest prompt (in
    fine-tuning: of the longest row's prompt). `field`: the setting that allows `new` more tokens.
    """
    limit, path = parts.cfg.max_positions, parts.config.model.path
    if limit is not None and prompt + new > limit:
        beyond = f"that is beyond max_position_embeddings = {limit} of {path}'s config.json"
        lower = f"lower it to {limit - prompt} or less, or " if prompt < limit else ""
        remedy = f"{lower}lower prompt.max_tokens, which drops longer prompts, or use another model"
        raise ConfigError(f"{field}: {new}: after a prompt of {prompt} tokens {beyond}; {remedy}")


# --- parameters and optimiser states as shapes, dtypes and shardings ---


def abstract_params(parts: Parts, cfg: DecoderConfig, table: dict = sharding.TRAIN) -> Params:
    """Return all parameters of a decoder as ShapeDtypeStructs with shardings.

    Their dtype is `model.param_dtype`. With LoRA, the trained ones (adapters, value head) are float32.
    """
    dtype = jnp.dtype(parts.config.model.param_dtype)
    structs = lora.flat(sharding.abstract_arrays(spec.abstract(cfg), parts.mesh, table, dtype))
    if cfg.execution.lora:
        adapters = {path: s for path, s in structs.items() if spec.row_of(path).trained_with_lora}
        structs |= {path: s.update(dtype=jnp.float32) for path, s in adapters.items()}
    return unflatten_dict(structs)


def abstract_tower(parts: Parts) -> Params:
    """Return the vision tower's parameters as ShapeDtypeStructs with shardings."""
    if parts.cfg.execution.tower != "freeze":
        return abstract_params(parts, parts.cfg)[VISION]
    tower = spec.abstract(parts.cfg.run_with(tower="train"))[VISION]
    return sharding.abstract_arrays(tower, parts.mesh, sharding.TRAIN, jnp.dtype(parts.config.model.dtype))


def abstract_base(parts: Parts) -> Params:
    """Return the tree of `load_base` as ShapeDtypeStructs with shardings."""
    return lora.frozen(abstract_params(parts, lora.without_adapters(parts.cfg)), parts.cfg)


def abstract_learner(parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation) -> Learner:
    """Return a learner as ShapeDtypeStructs with the shardings it has during learning."""
    params = lora.trained(abstract_params(parts, cfg), cfg)
    state = jax.eval_shape(tx.init, params)
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
    shardings = sharding.optimizer_shardings(state, params, parts.mesh)
    return Learner(params, jax.tree.map(place, state, shardings))


def abstract_frozen(parts: Parts) -> Frozen:
    """Return the base and the reference as ShapeDtypeStructs with shardings.

    The reference shares the base. Its own part is the start value of all other trained parameters except the
    adapters, which are off in it. It is None without a KL penalty.
    """
    if parts.config.kl.coef == 0:
        return Frozen(abstract_base(parts), None)
    trained = lora.flat(lora.trained(abstract_params(parts, parts.cfg), parts.cfg))
    copied = {path: p for path, p in trained.items() if not spec.row_of(path).trained_with_lora}
    return Frozen(abstract_base(parts), unflatten_dict(copied))


def shardings_of(abstract: Any) -> Any:
    """Return the shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda s: s.sharding, abstract)


# --- parameters and optimiser states with values ---


def load_base(parts: Parts) -> Params:
    """Load the policy's frozen parameters: the decoder under adapters, or the blocks of the vision tower
    under a trained merger. Return {} if all weights are trained.
    """
    return _start_values(parts, lora.without_adapters(parts.cfg), abstract_base(parts))


def load_tower(parts: Parts) -> Params:
    """Load the frozen vision tower as `model.dtype`. Raise `ConfigError` if `model.init` is random."""
    model = parts.config.model
    if model.init == "random":
        problem = "the vision tower would be random and frozen, so its features would mean nothing"
        remedy = "set model.init to pretrained, set model.vision to train, or remove the images"
        raise ConfigError(f"model.init: random: {problem}; {remedy}")
    shardings = {VISION: shardings_of(abstract_tower(parts))}
    return weights.load_params(model.path, parts.cfg, shardings, jnp.dtype(model.dtype))[VISION]


def load_params(parts: Parts, cfg: DecoderConfig) -> Params:
    """Return the start values of the trained parameters: all weights, read or random; or, with LoRA, new
    adapters and, of a critic, a new value head.
    """
    return _start_values(parts, cfg, lora.trained(abstract_params(parts, cfg), cfg))


def _start_values(parts: Parts, cfg: DecoderConfig, abstract: Params) -> Params:
    """Return the start values of the parameters in `abstract`, which are some of `cfg`'s: those that the
    model's directory has are loaded, the others are initialised at random.
    """
    model, wanted = parts.config.model, lora.flat(abstract)
    is_new = lambda path: cfg.execution.lora is not None and spec.row_of(path).trained_with_lora
    random = {path: p for path, p in wanted.items() if model.init == "random" or is_new(path)}
    stored = unflatten_dict({path: p.sharding for path, p in wanted.items() if path not in random})
    loaded = weights.load_params(model.path, cfg, stored, jnp.dtype(model.param_dtype)) if stored else {}
    if not random:
        return loaded

    def initialise(key: Array) -> dict[tuple, Array]:
        params = lora.flat(spec.init(cfg, key))
        return {path: params[path].astype(p.dtype) for path, p in random.items()}

    key = jax.random.key(parts.config.seed)
    if cfg.execution.lora:
        key = jax.random.fold_in(key, cfg.execution.value_head)
    initial = jax.jit(initialise, out_shardings=shardings_of(random))(key)
    return lora.join(loaded, unflatten_dict(initial))


def load_policy(parts: Parts) -> Params:
    """Return all parameters of the policy at the start of a run."""
    return lora.join(load_base(parts), load_params(parts, parts.cfg))


def load_frozen(parts: Parts) -> Frozen:
    """Load the base and the reference. With `learn.offload` the reference is in host memory."""
    reference = abstract_frozen(parts).reference
    if reference:
        reference = _start_values(parts, parts.cfg, reference)
        if parts.config.learn.offload:
            reference = sharding.to_memory(reference, "pinned_host")
    return Frozen(load_base(parts), reference)


def init_learner(
    parts: Parts, cfg: DecoderConfig, tx: optax.GradientTransformation
) -> tuple[Learner, Learner]:
    """Return a learner with its start values, and its shardings as a tree of the same structure."""
    params = load_params(parts, cfg)
    shardings = shardings_of(abstract_learner(parts, cfg, tx))
    return Learner(params, jax.jit(tx.init, out_shardings=shardings.opt_state)(params)), shardings


def count_updates(config: Config, steps: int) -> int:
    """Return the number of optimiser updates in `steps` steps."""
    return steps * config.learn.epochs * (config.sample.questions // config.learn.minibatch)


def total_steps(config: Config, n: int) -> int:
    """Return the steps of a run over n questions: `steps`, or as many as `passes` over the questions need."""
    if config.sample.questions > n:
        why = f"{config.sample.questions} is more than the {n} questions of the data"
        raise ConfigError(f"sample.questions: {why}; lower it to {n} or less")
    return config.steps or max(1, round((config.passes or 0) * (n // config.sample.questions)))

"""A model by itself, apart from a run's settings: so that a run can have a second one, such as a verifier."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from medrlvr_jax import sharding
from medrlvr_jax.build import check_widths, shardings_of
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import spec, weights
from medrlvr_jax.model.architecture import DecoderConfig, Execution
from medrlvr_jax.types import Params


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A decoder with its tokenizer on a mesh."""

    cfg: DecoderConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    params: Params  # sharded over `mesh`; as shapes (ShapeDtypeStructs) before they are loaded

    def in_memory(self, kind: str) -> "FrozenModel":
        """The same with its parameters in the memory named: "device" or "pinned_host"."""
        return dataclasses.replace(self, params=sharding.to_memory(self.params, kind))


def lay_out(
    cfg: DecoderConfig, tokenizer: Any, mesh: jax.sharding.Mesh, dtype: str, table: dict, field: str
) -> FrozenModel:
    """A model that never learns, its parameters as shapes: of one dtype, laid out by `table` (sharding.TRAIN
    or DECODE). `field`: the setting that names it.
    """
    platform = mesh.devices.flat[0].platform
    execution = Execution(
        dtype=jnp.dtype(dtype).type,
        remat="none",
        splash=platform == "tpu",
        unroll=platform != "tpu",
        narrow=platform == "cpu",
    )
    try:
        check_widths(cfg, mesh)
    except ConfigError as e:
        raise ConfigError(f"{field}: {e}; or take another model") from None
    cfg = dataclasses.replace(cfg, execution=execution)
    params = sharding.structs(spec.abstract(cfg), mesh, table, jnp.dtype(dtype))
    return FrozenModel(cfg, tokenizer, mesh, params)


def load(model: FrozenModel, path: str) -> FrozenModel:
    """A laid out model with the weights of the directory or hub name `path`."""
    dtype = jax.tree.leaves(model.params)[0].dtype
    params = weights.load_params(path, model.cfg, shardings_of(model.params), dtype)
    return dataclasses.replace(model, params=params)

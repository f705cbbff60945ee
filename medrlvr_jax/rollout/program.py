"""A compiled program before it is compiled: a jitted function and the shapes that it is called with. Those of a rollout."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medrlvr_jax import build, sharding
from medrlvr_jax.build import Parts, Relay
from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.model import attention
from medrlvr_jax.model.decoder import DecoderConfig
from medrlvr_jax.rollout.generate import generate
from medrlvr_jax.types import Prompts


class Program(NamedTuple):
    """A jitted function, its arguments as shapes, and what else is in memory meanwhile."""

    name: str
    function: Any
    args: tuple
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    others: tuple = ()  # trees of shapes that live on while it runs and are not among its arguments
    visited: Mapping[str, float] = MappingProxyType({})  # see `attention.visited`


def array(parts: Parts, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Of a batch: its leading axis over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(parts.mesh))


def a_key(parts: Parts) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=sharding.replicated(parts.mesh))


def draw_program(parts: Parts, cfg: DecoderConfig, sample: SampleConfig, width: int, name: str = "generate", **kept: Any) -> Program:
    """`generate` as `experience` calls it: prompts of `width` columns, a sampler `cfg`."""
    q = sample.questions
    prompts = Prompts(array(parts, jnp.int32, q, width), array(parts, jnp.bool_, q, width), array(parts, jnp.uint32, q))
    tokenizer = parts.tokenizer
    args = build.abstract_decode(parts, cfg), cfg, prompts, a_key(parts), sample, tokenizer.stop_ids, tokenizer.pad_id
    visited = attention.visited(width, 0, width) if cfg.splash else {}
    return Program(name, generate, args, {"entropies": False}, visited=visited, **kept)


def relay_program(relay: Relay, **kept: Any) -> list[Program]:
    """The relay's, where it copies anything."""
    return [Program("relay", relay.program, (relay.moved,), **kept)] if relay.moved else []

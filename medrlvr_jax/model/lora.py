"""Trained and frozen parameters as two trees, and LoRA (Hu et al. 2021, arXiv 2106.09685).

The decoder computes with `join(base, trained)`. If all weights are trained, the base is the empty tree. With
`model.lora` the base is the whole decoder, in memory once for policy, critic and reference. The policy trains
its adapters `<name>_a` and `<name>_b`, the critic its own adapters and its value head. `join(base, {})` is
the policy without its adapters. If only the merger of a vision tower is trained, the tower's blocks are in
the base.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.spec import PARAMETERS, is_trained
from medrlvr_jax.types import Array, Params


def join(base: Params, trained: Params) -> Params:
    """Join two trees that share no path. Nothing is copied."""
    return unflatten_dict(flat(base) | flat(trained))


def flat(tree: Params) -> dict[tuple, Any]:
    """Return a tree as a dict from paths to leaves."""
    return dict(flatten_dict(tree))


def trained(params: Params, cfg: DecoderConfig) -> Params:
    """Select the trained part of a tree of parameters, shapes or shardings."""
    return unflatten_dict({path: leaf for path, leaf in flat(params).items() if is_trained(path, cfg)})


def frozen(params: Params, cfg: DecoderConfig) -> Params:
    """Select the part of a tree that is not trained."""
    return unflatten_dict({path: leaf for path, leaf in flat(params).items() if not is_trained(path, cfg)})


def without_adapters(cfg: DecoderConfig) -> DecoderConfig:
    """Return the configuration of the base: without adapters and value head."""
    return cfg.run_with(lora=None, value_head=False)


def merge(params: Params, cfg: DecoderConfig, dtype: Any = None) -> Params:
    """Merge the adapters into their matrices: W + A·B·alpha/rank, summed in float32. The result is a tree of
    `without_adapters(cfg)`.

    The sums are cast to `dtype`, by default to W's dtype. bfloat16 loses five sixths of an adapter that is
    small beside its matrix (B ~ 1e-4).
    """
    layers, lora = params["layers"], cfg.execution.lora
    if lora is None:
        return params

    def add(w: Array, a: Array, b: Array) -> Array:
        """Merge one layer's W [in…, out…], A [in…, r] and B [r, out…]."""
        product = jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=jnp.float32)
        return (w.astype(jnp.float32) + product * (lora.alpha / lora.rank)).astype(dtype or w.dtype)

    parts = lambda name: (layers[name], layers[f"{name}_a"], layers[f"{name}_b"])
    merged = {name: jax.lax.map(lambda x: add(*x), parts(name)) for name in lora.targets}
    others = {name: w for name, w in layers.items() if PARAMETERS[name].kind != "adapter"}
    return params | {"layers": others | merged}

"""LoRA (Hu et al. 2021, arXiv 2106.09685): what is trained as a tree of its own, beside weights that stay as
they are.

The parameters that the decoder computes with are always `join(base, trained)`. Where all weights are trained,
the base is the empty tree. With `model.lora` the base is the whole decoder, held once for policy, critic and
reference; a policy trains its adapters `<name>_a` and `<name>_b`, a critic its own and its value head. The
policy with its adapter off is `join(base, {})`. Of a vision tower whose merger alone is trained, the blocks
are in the base.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.spec import PARAMETERS, is_trained
from medrlvr_jax.types import Array, Params


def join(base: Params, trained: Params) -> Params:
    """One tree of two that share no leaf; nothing is copied."""
    return unflatten_dict(flat(base) | flat(trained))


def flat(tree: Params) -> dict[tuple, Any]:
    """Path -> leaf."""
    return dict(flatten_dict(tree))


def trained(params: Params, cfg: DecoderConfig) -> Params:
    """The part of a whole tree (of anything, such as shapes or shardings) that is trained."""
    return unflatten_dict({path: leaf for path, leaf in flat(params).items() if is_trained(path, cfg)})


def frozen(params: Params, cfg: DecoderConfig) -> Params:
    """The rest: what `trained` leaves out."""
    return unflatten_dict({path: leaf for path, leaf in flat(params).items() if not is_trained(path, cfg)})


def off(cfg: DecoderConfig) -> DecoderConfig:
    """The decoder of the base alone: no adapters, no value head."""
    return cfg.run_with(lora=None, value_head=False)


def merge(params: Params, cfg: DecoderConfig, dtype: Any = None) -> Params:
    """W + A·B·alpha/rank for every adapted matrix, summed in float32; a tree of `off(cfg)`.

    The sums are rounded to `dtype`, or to W's own: bfloat16 loses of an adapter that is small beside its
    matrix (B ~ 1e-4) five sixths.
    """
    layers, lora = params["layers"], cfg.execution.lora
    if lora is None:
        return params

    def add(w: Array, a: Array, b: Array) -> Array:
        """One layer's W [in…, out…], A [in…, r] and B [r, out…]."""
        product = jnp.tensordot(a, b, 1, precision="highest", preferred_element_type=jnp.float32)
        return (w.astype(jnp.float32) + product * (lora.alpha / lora.rank)).astype(dtype or w.dtype)

    parts = lambda name: (layers[name], layers[f"{name}_a"], layers[f"{name}_b"])
    merged = {name: jax.lax.map(lambda x: add(*x), parts(name)) for name in lora.targets}
    others = {name: w for name, w in layers.items() if PARAMETERS[name].kind != "adapter"}
    return params | {"layers": others | merged}

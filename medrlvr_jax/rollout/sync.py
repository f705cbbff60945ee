"""The copy of the weights from the training layout to the sampling layout, once per rollout.

Training shards every matrix over `fsdp` and keeps `param_dtype`. The sampler reads all weights for each
token. It uses a copy that is gathered along `fsdp` and has the dtype of the arithmetic, so that no token
needs an all-gather or a cast.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts, abstract_params
from medrlvr_jax.model import decoder
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.lora import flat
from medrlvr_jax.model.spec import MATRICES, VISION, row_of
from medrlvr_jax.types import Array, Params

Path = tuple[str, ...]  # in the parameter tree


def abstract_decode(parts: Parts, cfg: DecoderConfig) -> Params:
    """Return the sampler's parameters as ShapeDtypeStructs: gathered along `fsdp` and in the dtype of the
    arithmetic. Norms and biases keep their dtype.

    With `unroll`, layers keep the training layout, because `decode.prepare` gathers them one by one; with
    `sample.layout: sharded` they keep their shards. int8 matrices have float32 scales. A vision tower keeps
    its layout, because it is read once per rollout.
    """
    model = parts.config.model
    sharded = flat(abstract_params(parts, cfg, sharding.TRAIN))
    by_layer = cfg.execution.unroll or parts.config.sample.layout == "sharded"

    def wanted(path: Path, p: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if path[0] == VISION:
            return sharded[path]
        row, in_layer = row_of(path), path[0] == "layers"
        dtype = p.dtype if row.keeps_dtype or (in_layer and cfg.execution.unroll) else jnp.dtype(model.dtype)
        if cfg.execution.int8 and row.kind in ("matrix", "scale"):
            dtype = jnp.dtype("int8" if row.kind == "matrix" else "float32")
        place = sharded[path] if in_layer and by_layer else p
        return jax.ShapeDtypeStruct(p.shape, dtype, sharding=place.sharding)

    gathered = flat(abstract_params(parts, cfg, sharding.DECODE))
    return unflatten_dict({path: wanted(path, p) for path, p in gathered.items()})


@dataclass(frozen=True)
class WeightSync:
    """A function from a model's parameters to the sampler's (`abstract_decode`).

    Parameters that already have the target dtype and sharding are passed through, so a frozen bfloat16 base
    on one chip is not copied. Adapters are not merged: small ones would be lost in a sum that is rounded to
    bfloat16, and the sampler's log-probs would differ from the trainer's.
    """

    program: Any  # jitted: the parameters named by `moved` → their copies
    moved: dict[Path, jax.ShapeDtypeStruct]  # those that the sampler needs in another dtype or sharding

    def __call__(self, params: Params) -> Params:
        if not self.moved:
            return params
        leaves = flat(params)
        return unflatten_dict(leaves | self.program({path: leaves[path] for path in self.moved}))


def make_weight_sync(parts: Parts, cfg: DecoderConfig) -> WeightSync:
    """Return the copy from the policy's parameters to those of a sampler `cfg`. Nothing is compiled yet."""
    have = flat(abstract_params(parts, parts.cfg))
    want = flat(abstract_decode(parts, cfg))

    def stays(path: Path, p: jax.ShapeDtypeStruct) -> bool:
        target = want[path]
        return p.dtype == target.dtype and p.sharding.is_equivalent_to(target.sharding, p.ndim)

    moved = {path: p for path, p in have.items() if not stays(path, p)}
    places = {path: p.sharding for path, p in want.items() if path in moved or path not in have}
    layers = {path: place for path, place in places.items() if path[0] == "layers"}
    of_layer = sharding.layer_shardings(layers)
    shards = sharding.layer_shardings({path: have[path].sharding for path in layers if path in have})
    put = jax.lax.with_sharding_constraint

    def quantized(layer: dict[Path, Array]) -> dict[Path, Array]:
        """Quantise matrices before they are gathered, so that one byte per weight is sent."""
        out = dict(layer)
        for path, w in layer.items():
            if want[path].dtype == jnp.int8:
                matrix, scale = decoder.quantize(w, MATRICES[path[-1]])
                out |= {path: put(matrix, shards[path]), (*path[:-1], f"{path[-1]}_scale"): scale}
        return out

    def place_all(params: dict[Path, Array], places: dict) -> dict[Path, Array]:
        return {path: put(params[path].astype(want[path].dtype), place) for path, place in places.items()}

    def sync_weights(params: dict[Path, Array]) -> dict[Path, Array]:
        """Copy layer by layer. If all were copied at once, XLA would hold the gathered weights twice."""
        stacked = {path: params[path] for path in shards}
        placed = jax.lax.map(lambda layer: place_all(quantized(layer), of_layer), stacked) if stacked else {}
        return place_all(params, {path: s for path, s in places.items() if path not in layers}) | placed

    return WeightSync(jax.jit(sync_weights, out_shardings=places), moved)

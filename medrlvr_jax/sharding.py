"""Where arrays live: the mesh, two tables from logical to mesh axes, and the only uses of `PartitionSpec`.

TRAIN shards every weight over `fsdp` and `tensor`; DECODE keeps `tensor` only, so that no token pays an all-gather.
Activations follow one table in both.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medrlvr_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
TRAIN = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "layers": None, "head_dim": None}
DECODE = TRAIN | {"embed": None}
WORDS = ("tensor", "fsdp")
ACTIVATIONS = DECODE | {"batch": BATCH, "replica": "data", "embed_shard": "fsdp", "words": WORDS}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; sizes that do not multiply out are refused."""
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    if data < 1 or data * inner != len(devices):
        asked = f"mesh.data={config.data} × mesh.fsdp={config.fsdp} × mesh.tensor={config.tensor}"
        raise ConfigError(f"{asked} does not make the {len(devices)} devices here; set their product to {len(devices)}, or mesh.data to -1")
    # Auto axes: the compiler propagates; the default of jax.make_mesh is Explicit.
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def constrain(x: jax.Array, *axes: str | None, table: dict = ACTIVATIONS) -> jax.Array:
    """Pin an array to the mesh by logical axis names; nothing happens outside a mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, table, dict(mesh.shape)))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(w: jax.Array, axes: tuple) -> jax.Array:
    """A weight whole along `fsdp`; its gradient comes back in TRAIN's shards, by a reduce-scatter.

    Said aloud, or XLA:TPU gathers states and weights in rings inside each product: eight times the traffic, and more memory.
    """
    return constrain(w, *axes, table=DECODE)


gather.defvjp(lambda w, axes: (gather(w, axes), None), lambda axes, _, g: (constrain(g, *axes, table=TRAIN),))


def by_rows(tree: Any) -> Any:
    """Pin the leading axis of every array to data × fsdp, so that a program's results lie as the next program's arguments."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def splits_words(vocab: int) -> bool:
    """Whether the mesh in use divides the vocabulary over `tensor` and `fsdp` together."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or vocab % int(np.prod([mesh.shape[a] for a in WORDS])) == 0


def _spec(axes: tuple, shape: tuple[int, ...], table: dict, sizes: dict[str, int]) -> PartitionSpec:
    """Axes that do not divide are replicated: small key/value heads on a wide `tensor` axis; `check_divides` refuses the rest."""

    def resolve(name, dim):
        target = table.get(name)
        parts = target if isinstance(target, tuple) else (target,)
        ways = int(np.prod([sizes.get(p, 1) for p in parts if p]))
        return target if ways > 1 and dim % ways == 0 else None

    return PartitionSpec(*(resolve(name, dim) for name, dim in zip(axes, shape, strict=True)))


def shardings(boxed: Any, mesh: Mesh, table: dict) -> Any:
    """NamedShardings for a tree of `nn.Partitioned` abstract parameters (`jax.eval_shape` of `init`)."""

    def one(leaf):
        return NamedSharding(mesh, _spec(leaf.names, leaf.value.shape, table, dict(mesh.shape)))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def of_one(stacked: Any) -> Any:
    """Shardings of one layer, from those of all layers stacked along a leading axis."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])), stacked)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis over data × fsdp: every array of a rollout."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Host arrays onto the mesh, leading axis sharded."""
    return jax.device_put(tree, rows(mesh))


def to_host(tree: Any) -> Any:
    return jax.device_get(tree)


def check_divides(name: str, value: int, mesh: Mesh, axes: tuple[str, ...]) -> None:
    """Refuse a size that the mesh cannot split, with the nearest ones that work."""
    ways = int(np.prod([mesh.shape[a] for a in axes]))
    if value % ways:
        near = [n for n in (value // ways * ways, -(-value // ways) * ways) if n]
        raise ConfigError(f"{name}: {value} must divide by mesh {' × '.join(axes)} = {ways}; the nearest that do: {near}")


def like(state: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters (optimiser moments): theirs where the shape recurs, else replicated.

    Matching is by path suffix, so that two parameters of one shape never mix.
    """
    known = {
        tuple(str(k) for k in path): s
        for path, s in jax.tree_util.tree_flatten_with_path(param_shardings, is_leaf=lambda s: isinstance(s, NamedSharding))[0]
    }

    def find(path, leaf):
        keys = tuple(str(k) for k in path)
        for start in range(len(keys)):
            if keys[start:] in known and leaf.ndim:
                return known[keys[start:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, state)

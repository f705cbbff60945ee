"""Where arrays live: the mesh, two tables from logical to mesh axes, and the only uses of `PartitionSpec`.

TRAIN shards every weight over `fsdp` and `tensor`; DECODE keeps `tensor` only, so that no token pays an all-gather.
Activations follow one table in both.
"""

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
ACTIVATIONS = {"batch": BATCH, "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}


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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh by logical axis names; nothing happens outside a mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, ACTIVATIONS, dict(mesh.shape)))


def batch_ways(size: int) -> int:
    """Over how many devices a batch axis of `size` is split in the current mesh; 1 where it does not divide, or outside a mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    ways = int(np.prod([sizes.get(axis, 1) for axis in ACTIVATIONS["batch"]]))
    return ways if size % ways == 0 else 1


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


def like(state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds arrays after the parameters' pattern (optimiser moments); `params` are shapes with shardings.

    A copy of a parameter lies as it does, one that lacks an axis (Adafactor's row and column means) as its other axes do, all else
    is replicated. Matching is by path suffix, so that two parameters of one shape never mix.
    """
    known = {tuple(str(k) for k in path): p for path, p in jax.tree_util.tree_flatten_with_path(params)[0]}

    def find(path, leaf):
        keys = tuple(str(k) for k in path)
        param = next((known[keys[start:]] for start in range(len(keys)) if keys[start:] in known), None)
        if param is None or not leaf.ndim:
            return replicated(mesh)
        if leaf.shape == param.shape:
            return param.sharding
        for axis in range(param.ndim):
            if leaf.shape == param.shape[:axis] + param.shape[axis + 1 :]:
                spec = tuple(param.sharding.spec) + (None,) * (param.ndim - len(param.sharding.spec))
                return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, state)


def to_memory(tree: Any, kind: str) -> Any:
    """The arrays as they lie, but in the memory named: "device" or "pinned_host". Those that are there already are not copied."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))

"""The mesh, the tables from logical to mesh axes, and the only uses of `PartitionSpec`.

TRAIN shards every weight over `fsdp` and `tensor`. DECODE shards only over `tensor`, so that no token needs
an all-gather. Activations use one table in both. The outermost axis, `slice`, splits only the batch. So one
sum of gradients per optimiser step is all that crosses the slow network between slices or nodes.

A process encodes only the rows of a batch that its devices hold. If `tensor` spans processes, several hold
the same rows. Exactly one of them decodes, scores and counts a row, each in turn.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain, groupby
from math import gcd
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medrlvr_jax.config.check import nearest_divisors
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.host.errors import ConfigError

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")
TRAIN = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "layers": None,
    "head_dim": None,
}
DECODE = TRAIN | {"embed": None}
WORDS = ("tensor", "fsdp")
OF_STATES = {"batch": BATCH, "replica": ("slice", "data"), "embed_shard": "fsdp", "words": WORDS}
ACTIVATIONS: dict[str, Any] = DECODE | OF_STATES


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a (slice, data, fsdp, tensor) mesh over all devices. Raise `ConfigError` if the product of the
    sizes is not the number of devices.

    It does what `create_hybrid_device_mesh` does with one outer axis, but its granules may be smaller than a
    slice, such as one process per GPU.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.slices * config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    n = len(devices)
    if data < 1 or data * inner != n:
        names = ("slices", "data", "fsdp", "tensor") if config.slices > 1 else ("data", "fsdp", "tensor")
        product = " × ".join(f"mesh.{name}={getattr(config, name)}" for name in names)
        remedy = f"set their product to {n}, or mesh.data to -1"
        raise ConfigError(f"{product} does not make the {n} devices here; {remedy}")
    # Most shapes on v5e and v6e need a physical axis to be split. Elsewhere the argument has no effect.
    block = partial(mesh_utils.create_device_mesh, allow_split_physical_axes=True)
    shape = (data, config.fsdp, config.tensor)
    blocks = np.stack([block(shape, part) for part in _slices(devices, config.slices)])
    # With Auto axes the compiler propagates shardings.
    return Mesh(blocks, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any], n: int) -> list[list[Any]]:
    """Split devices into `n` parts that a slow network connects: by slice index (TPU, NVLink domain) if there
    is one, else by process. Devices of one process, such as fake ones, are split by their number.
    """
    where = {d: (getattr(d, "slice_index", 0), d.process_index) for d in devices}
    physical = len({s for s, _ in where.values()})
    if physical > 1 and devices[0].platform == "tpu" and n % physical:
        raise ConfigError(f"mesh.slices: {n}, and there are {physical} TPU slices; set it to {physical}")
    ordered = sorted(devices, key=lambda d: (*where[d], d.id))
    granules = [list(g) for _, g in groupby(ordered, key=where.get)]
    if len(granules) < n:
        granules = [[d] for d in ordered]
    if len(granules) % n:
        near, parts = nearest_divisors(n, len(granules)), f"{len(granules)} processes or slices here"
        raise ConfigError(f"mesh.slices: {n} does not divide the {parts}; the nearest that do: {near}")
    size = len(granules) // n
    return [list(chain.from_iterable(granules[i * size : (i + 1) * size])) for i in range(n)]


def constrain(x: jax.Array, *axes: str | None, table: dict = ACTIVATIONS) -> jax.Array:
    """Constrain the sharding of an array by logical axis names. Without a mesh (`jax.set_mesh`) return it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, table, dict(mesh.shape)))


def map_shards(f: Callable, axes: Sequence[tuple], out: int) -> Callable:
    """Apply `jax.shard_map` to f, whose arguments have these logical axes: for code that XLA cannot
    partition. The result is sharded as argument number `out`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f

    def mapped(*args):
        sizes = dict(mesh.shape)
        specs = tuple(_spec(a, x.shape, ACTIVATIONS, sizes) for a, x in zip(axes, args, strict=True))
        return jax.shard_map(f, in_specs=specs, out_specs=specs[out], check_vma=False)(*args)

    return mapped


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(w: jax.Array, axes: tuple) -> jax.Array:
    """Gather a weight along `fsdp`. A reduce-scatter shards its gradient by TRAIN.

    Without this explicit constraint XLA:TPU selects a collective matmul, which gathers states and weights
    inside each product. That needs eight times the traffic, and more memory.
    """
    return constrain(w, *axes, table=DECODE)


gather.defvjp(lambda w, axes: (gather(w, axes), None), lambda axes, _, g: (constrain(g, *axes, table=TRAIN),))


def by_rows(tree: Any) -> Any:
    """Shard the leading axis of every array over `BATCH`, as the next program expects its arguments."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def split_rows(tree: Any, size: int) -> Any:
    """Split arrays of n rows into [n / size, size, …], strided, so that each part spans all data shards."""
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), tree)


def map_rows(f: Callable[[Any], Any], tree: Any, size: int) -> Any:
    """Apply f to arrays of rows, `size` rows at a time to save memory. The result is sharded by rows."""
    if size == len(jax.tree.leaves(tree)[0]):
        return by_rows(f(tree))
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # the inverse of `split_rows`
    return by_rows(jax.tree.map(join, jax.lax.map(f, split_rows(tree, size))))


def splits_words(vocab: int) -> bool:
    """Return whether the vocabulary divides over `tensor` and `fsdp` of the current mesh together."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or vocab % int(np.prod([mesh.shape[a] for a in WORDS])) == 0


def round_up_rows(mesh: Mesh, n: int) -> int:
    """Round a number of rows up to one that the mesh can split."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    return -(-n // ways) * ways


def batch_ways(size: int) -> int:
    """Return over how many devices the current mesh splits a batch axis of `size`; 1 if it does not."""
    ways = int(np.prod([axis_ways(axis) for axis in BATCH]))
    return ways if size % ways == 0 else 1


def axis_ways(name: str) -> int:
    """Return the number of devices along an axis of the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def _spec(axes: tuple, shape: tuple[int, ...], table: dict, sizes: dict[str, int]) -> PartitionSpec:
    """Axes that do not divide are replicated, such as few KV heads on a large `tensor`. Sizes for which that
    is not meant are refused by `check_divides`.
    """

    def resolve(name, dim):
        target = table.get(name)
        parts = target if isinstance(target, tuple) else (target,)
        ways = int(np.prod([sizes.get(p, 1) for p in parts if p]))
        return target if ways > 1 and dim % ways == 0 else None

    return PartitionSpec(*(resolve(name, dim) for name, dim in zip(axes, shape, strict=True)))


def shardings(boxed: Any, mesh: Mesh, table: dict) -> Any:
    """Return NamedShardings for a tree of abstract parameters (`spec.abstract`)."""

    def place(leaf):
        return NamedSharding(mesh, _spec(leaf.names, leaf.value.shape, table, dict(mesh.shape)))

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def abstract_arrays(boxed: Any, mesh: Mesh, table: dict, dtype: Any) -> Any:
    """Return ShapeDtypeStructs of one dtype, with shardings, for a tree of abstract parameters."""
    struct = lambda box, place: jax.ShapeDtypeStruct(box.value.shape, dtype, sharding=place)
    is_leaf = lambda leaf: isinstance(leaf, nn.Partitioned)
    return jax.tree.map(struct, boxed, shardings(boxed, mesh, table), is_leaf=is_leaf)


def layer_shardings(stacked: Any) -> Any:
    """Return the shardings of one layer, from those of layers that are stacked along a leading axis."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])), stacked)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of rollouts: the leading axis over slice × data × fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


@cache
def local_rows(n: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows, of n, that this process's devices hold, ascending int [H]; and bool
    [H], True for the rows that this process scores and counts.

    Exactly one of the processes that hold a row counts it. They take turns, so that the work is even.
    """
    holds = np.zeros((n, jax.process_count()), bool)
    for device, index in rows(mesh).devices_indices_map((n,)).items():
        holds[(*index, device.process_index)] = True
    process = jax.process_index()
    held, before = np.flatnonzero(holds[:, process]), holds[:, :process].sum(1)
    return held, (before == np.arange(n) % holds.sum(1))[held]


def place_rows(tree: Any, n: int, mesh: Mesh) -> Any:
    """Make global arrays of n rows from this process's rows [H, …]. Processes do not communicate."""
    held, _ = local_rows(n, mesh)

    def place(x):
        piece = lambda index: x[np.searchsorted(held, np.arange(n)[index[0]])]
        return jax.make_array_from_callback((n, *x.shape[1:]), rows(mesh), piece)

    return jax.tree.map(place, tree)


def fetch_rows(tree: Any, mesh: Mesh) -> Any:
    """Copy this process's rows [H, …] of arrays that are sharded by `rows` to the host. Processes do not
    communicate.
    """

    def fetch(x):
        if not x.sharding.is_equivalent_to(rows(mesh), x.ndim):
            raise ValueError(f"rows are fetched from arrays sharded by `rows`; this one has {x.sharding}")
        held, _ = local_rows(len(x), mesh)
        out = np.empty((len(held), *x.shape[1:]), x.dtype)
        for shard in x.addressable_shards:
            out[np.searchsorted(held, np.arange(len(x))[shard.index[0]])] = shard.data
        return out

    return jax.tree.map(fetch, tree)


def to_host(tree: Any) -> Any:
    return jax.device_get(tree)


def check_divides(name: str, value: int, mesh: Mesh, axes: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a size that the mesh cannot split, with the nearest sizes that it can."""
    ways = int(np.prod([mesh.shape[a] for a in axes]))
    if value % ways:
        near = [n for n in (value // ways * ways, -(-value // ways) * ways) if n]
        product = f"mesh {' × '.join(axes)} = {ways}"
        raise ConfigError(f"{name}: {value} must divide by {product}; the nearest that do: {near}")


def check_model_sizes(mesh: Mesh, axis: str, sizes: dict[str, int]) -> None:
    """Raise `ConfigError` for a mesh axis that cannot split all sizes of a model."""
    ways = mesh.shape[axis]
    for name, size in sizes.items():
        if size % ways:
            problem = f"mesh.{axis}: {ways} does not divide the model's {name} = {size}"
            listed = ", ".join(f"{n} = {s}" for n, s in sizes.items())
            near = nearest_divisors(ways, gcd(*sizes.values()))
            raise ConfigError(f"{problem}; the nearest that divide {listed}: {near}")


def optimizer_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Return shardings for an optimiser's state; `params` are shapes with shardings.

    An array with a parameter's shape is sharded as the parameter. An array that lacks one of its axes
    (Adafactor's row and column means) is sharded as the other axes. Everything else is replicated. Parameters
    are found by the end of the path, so that two of the same shape are not confused.
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
    """Move arrays to the memory `kind`, "device" or "pinned_host". Their shardings stay the same."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))

"""Where arrays live: the mesh, two tables from logical to mesh axes, and the only uses of `PartitionSpec`.

TRAIN shards every weight over `fsdp` and `tensor`; DECODE keeps `tensor` only, so that no token pays an
all-gather. Activations follow one table in both. The outermost axis, `slice`, splits the batch alone: what
crosses the slow network between slices or nodes is one sum of gradients an optimiser step.

A process holds the rows of a batch that its devices hold, and no others: it encodes those. Where `tensor`
spans processes, several hold the same rows; they take turns, and each row is decoded, scored and counted by
one of them.
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
    """A (slice, data, fsdp, tensor) mesh over all devices; sizes that do not multiply out are refused.

    What `create_hybrid_device_mesh` does for one outer axis, for granules that may be finer than a slice (one
    process per GPU).
    """
    devices = jax.devices() if devices is None else devices
    inner = config.slices * config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    n = len(devices)
    if data < 1 or data * inner != n:
        names = ("slices", "data", "fsdp", "tensor") if config.slices > 1 else ("data", "fsdp", "tensor")
        asked = " × ".join(f"mesh.{name}={getattr(config, name)}" for name in names)
        remedy = f"set their product to {n}, or mesh.data to -1"
        raise ConfigError(f"{asked} does not make the {n} devices here; {remedy}")
    # Splitting a physical axis is how a v5e or v6e slice makes most shapes; elsewhere the argument is unused.
    block = partial(mesh_utils.create_device_mesh, allow_split_physical_axes=True)
    shape = (data, config.fsdp, config.tensor)
    blocks = np.stack([block(shape, part) for part in _slices(devices, config.slices)])
    # Auto axes: the compiler propagates.
    return Mesh(blocks, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any], n: int) -> list[list[Any]]:
    """Devices in `n` parts between which the network is slow: by slice (TPU; NVLink domain) where devices
    have a slice index, else by process; within one process by number, as fake devices are.
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
    """Pin an array to the mesh by logical axis names; nothing happens outside a mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, table, dict(mesh.shape)))


def map_shards(f: Callable, axes: Sequence[tuple], out: int) -> Callable:
    """shard_map of f over arrays with these logical axes, for what XLA cannot split. The result is sharded as
    argument number `out`.
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
    """A weight gathered along `fsdp`; its gradient comes back in TRAIN's shards, by a reduce-scatter.

    Without this explicit constraint XLA:TPU picks a collective matmul, which gathers states and weights
    inside each product: eight times the traffic, and more memory.
    """
    return constrain(w, *axes, table=DECODE)


gather.defvjp(lambda w, axes: (gather(w, axes), None), lambda axes, _, g: (constrain(g, *axes, table=TRAIN),))


def by_rows(tree: Any) -> Any:
    """Pin the leading axis of every array to `BATCH`, as the next program expects its arguments."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def split_rows(tree: Any, size: int) -> Any:
    """Arrays of n rows as [n / size, size, …]: strided, so that each part spans all data shards."""
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1), tree)


def map_rows(f: Callable[[Any], Any], tree: Any, size: int) -> Any:
    """f of a tree of arrays of rows, `size` rows at a time to hold less memory; the result lies by rows."""
    if size == len(jax.tree.leaves(tree)[0]):
        return by_rows(f(tree))
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # what `split_rows` split
    return by_rows(jax.tree.map(join, jax.lax.map(f, split_rows(tree, size))))


def splits_words(vocab: int) -> bool:
    """Whether the mesh in use divides the vocabulary over `tensor` and `fsdp` together."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or vocab % int(np.prod([mesh.shape[a] for a in WORDS])) == 0


def round_up_rows(mesh: Mesh, least: int) -> int:
    """The least number of rows from `least` on that the mesh can split."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    return -(-least // ways) * ways


def batch_ways(size: int) -> int:
    """Devices over which the mesh in use splits a batch axis of `size`; 1 if it does not, or without one."""
    ways = int(np.prod([axis_ways(axis) for axis in BATCH]))
    return ways if size % ways == 0 else 1


def axis_ways(name: str) -> int:
    """Devices along a mesh axis; 1 outside a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def _spec(axes: tuple, shape: tuple[int, ...], table: dict, sizes: dict[str, int]) -> PartitionSpec:
    """Axes that do not divide are replicated: few key/value heads on a wide `tensor`; see `check_divides`."""

    def resolve(name, dim):
        target = table.get(name)
        parts = target if isinstance(target, tuple) else (target,)
        ways = int(np.prod([sizes.get(p, 1) for p in parts if p]))
        return target if ways > 1 and dim % ways == 0 else None

    return PartitionSpec(*(resolve(name, dim) for name, dim in zip(axes, shape, strict=True)))


def shardings(boxed: Any, mesh: Mesh, table: dict) -> Any:
    """NamedShardings for a tree of `nn.Partitioned` abstract parameters (`jax.eval_shape` of `init`)."""

    def place(leaf):
        return NamedSharding(mesh, _spec(leaf.names, leaf.value.shape, table, dict(mesh.shape)))

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def abstract_arrays(boxed: Any, mesh: Mesh, table: dict, dtype: Any) -> Any:
    """ShapeDtypeStructs of one dtype, with shardings, for a tree as `shardings` takes it."""
    struct = lambda box, place: jax.ShapeDtypeStruct(box.value.shape, dtype, sharding=place)
    is_leaf = lambda leaf: isinstance(leaf, nn.Partitioned)
    return jax.tree.map(struct, boxed, shardings(boxed, mesh, table), is_leaf=is_leaf)


def layer_shardings(stacked: Any) -> Any:
    """Shardings of one layer, from those of all layers stacked along a leading axis."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])), stacked)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis over slice × data × fsdp: every array of a rollout."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


@cache
def local_rows(n: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Which of n rows this process's devices hold, ascending int [H]; and bool [H], True for those that it
    scores and counts.

    Of the processes that hold a row, exactly one counts it; they take turns from row to row, so that none of
    them waits.
    """
    holds = np.zeros((n, jax.process_count()), bool)
    for device, index in rows(mesh).devices_indices_map((n,)).items():
        holds[(*index, device.process_index)] = True
    process = jax.process_index()
    held, before = np.flatnonzero(holds[:, process]), holds[:, :process].sum(1)
    return held, (before == np.arange(n) % holds.sum(1))[held]


def place_rows(tree: Any, n: int, mesh: Mesh) -> Any:
    """This process's rows [H, …] on the host as arrays of all n rows; nothing crosses processes."""
    held, _ = local_rows(n, mesh)

    def place(x):
        piece = lambda index: x[np.searchsorted(held, np.arange(n)[index[0]])]
        return jax.make_array_from_callback((n, *x.shape[1:]), rows(mesh), piece)

    return jax.tree.map(place, tree)


def fetch_rows(tree: Any, mesh: Mesh) -> Any:
    """This process's rows [H, …] of arrays laid out by `rows`, on the host; nothing crosses processes."""

    def fetch(x):
        if not x.sharding.is_equivalent_to(rows(mesh), x.ndim):
            raise ValueError(f"rows are fetched from arrays laid out by `rows`; this one is by {x.sharding}")
        held, _ = local_rows(len(x), mesh)
        out = np.empty((len(held), *x.shape[1:]), x.dtype)
        for shard in x.addressable_shards:
            out[np.searchsorted(held, np.arange(len(x))[shard.index[0]])] = shard.data
        return out

    return jax.tree.map(fetch, tree)


def to_host(tree: Any) -> Any:
    return jax.device_get(tree)


def check_divides(name: str, value: int, mesh: Mesh, axes: tuple[str, ...]) -> None:
    """Refuse a size that the mesh cannot split, with the nearest ones that work."""
    ways = int(np.prod([mesh.shape[a] for a in axes]))
    if value % ways:
        near = [n for n in (value // ways * ways, -(-value // ways) * ways) if n]
        product = f"mesh {' × '.join(axes)} = {ways}"
        raise ConfigError(f"{name}: {value} must divide by {product}; the nearest that do: {near}")


def check_model_sizes(mesh: Mesh, axis: str, sizes: dict[str, int]) -> None:
    """Refuse a mesh that cannot split a model's sizes, with the nearest that can; KV heads: see `_spec`."""
    ways = mesh.shape[axis]
    for name, size in sizes.items():
        if size % ways:
            problem = f"mesh.{axis}: {ways} does not divide the model's {name} = {size}"
            every = ", ".join(f"{n} = {s}" for n, s in sizes.items())
            near = nearest_divisors(ways, gcd(*sizes.values()))
            raise ConfigError(f"{problem}; the nearest that divide {every}: {near}")


def optimizer_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for an optimiser's state; `params` are shapes with shardings.

    An array of a parameter's shape lies as the parameter does, one that lacks an axis (Adafactor's row and
    column means) as its other axes do, all else is replicated. Matching is by path suffix, so that two
    parameters of one shape never mix.
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
    """The arrays as they lie, but in the memory "device" or "pinned_host"; copied only if not there yet."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))

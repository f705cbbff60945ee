"""Safetensors of Hugging Face directories to parameter trees.

Nothing is loaded by halves. A tensor that no parameter takes, a parameter that no tensor sets, a tensor given
twice, a shape or a setting that the decoder does not compute: each is refused by name, since a half-loaded
model trains quietly and badly.

Weights stream: a tensor is read in blocks of about a megabyte, each turned, cast and put in its place. So a
load needs the parameters plus one of them, and a host reads only the slices its devices hold. Two things in a
file are passed over: the rotary buffers of old checkpoints, and an `lm_head.weight` that repeats the
embedding of a tied model (one that differs is refused: transformers would untie it).
"""

import gc
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import safe_open

from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.families import resolve
from medrlvr_jax.model.lora import flat
from medrlvr_jax.model.spec import PARAMETERS, abstract, parameters
from medrlvr_jax.types import Params

# Prefixes of names in the files of transformers 5 and of some families, and what this library calls them. All
# are read; `published_name` is written.
RENAMED = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.visual.": "visual.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
EMBED, HEAD = PARAMETERS["embed"].tensor, PARAMETERS["head"].tensor
BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # computed, never learned
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 2**20  # bytes read at once: small enough that turning a block stays in the processor's cache
INDEX = "model.safetensors.index.json"
SAMPLED = 4096  # bytes of a tensor that `_digests` reads in each of three places


class Source(NamedTuple):
    """A tensor that a model needs, and the parameter that takes it. Axes have the names of spec.py."""

    path: tuple[str, ...]
    layer: int | None  # where the parameter is stacked
    axes: list[str]  # the parameter's axes, without that of the layers
    tensor_axes: list[str]  # the same in the tensor's order
    shape: tuple[int, ...]  # the tensor's, which joins some of its axes

    def __str__(self) -> str:
        return "/".join(self.path) + ("" if self.layer is None else f"[{self.layer}]")


class Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """To take slices of. The file is mapped into memory only meanwhile, since what was read of it counts
        as resident until it is closed.
        """
        with safe_open(self.file, framework="numpy") as file:
            yield file.get_slice(self.name)


def sources(cfg: DecoderConfig) -> dict[str, Source]:
    """All tensors that a model needs, by name; those of its vision tower, whether it is trained or not."""
    shapes, out = _shapes(cfg), {}
    for path, row in parameters(_whole(cfg)).items():
        if not row.tensor:
            continue
        axes, groups = row.axes.split(), row.tensor_groups
        tensor_axes = [axis for group in groups for axis in group]
        size = dict(zip(axes, shapes[path][row.stacked :], strict=True))
        shape = tuple(prod(size[axis] for axis in group) for group in groups)
        for layer in range(shapes[path][0]) if row.stacked else (None,):
            name = row.tensor.format(layer)
            source = Source(path, layer, axes, tensor_axes, shape)
            if name in out:
                raise ConfigError(f"{name}: both {out[name]} and {source} take it, and one may")
            out[name] = source
    return out


@cache
def _shapes(cfg: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    """Path -> shape of every parameter, those of the vision tower among them."""
    return {path: box.value.shape for path, box in flat(abstract(_whole(cfg))).items()}


def _whole(cfg: DecoderConfig) -> DecoderConfig:
    return cfg.run_with(tower="train")


def load_params(path: str | Path, cfg: DecoderConfig, shardings: Params, dtype: Any) -> Params:
    """The parameters of a directory as `dtype`, each laid out by its sharding. A critic gets the same body
    and a value head of zeros. `shardings` of some of the parameters alone give these alone.
    """
    places, loaded, taken = flat(shardings), {}, {}
    shapes = {key: shape for key, shape in _shapes(cfg).items() if key in places}
    tensors = open_tensors(resolve(path))
    _check(tensors, cfg)
    label = f"weights of {Path(path).name}, "
    require_equal(lambda: {label + name: digest for name, digest in _digests(tensors).items()})
    for name, source in sources(cfg).items():
        taken.setdefault(source.path, []).append((source, tensors[name]))
    # The largest first: the host's copy of a parameter then never stands beside a full set of the device's.
    for key in sorted(shapes, key=lambda key: -prod(shapes[key])):
        read = partial(_read, taken.get(key, []), shapes[key], jnp.dtype(dtype))
        gc.collect(0)  # jax lets go of the last parameter's host copy only when Python collects
        loaded[key] = jax.block_until_ready(jax.make_array_from_callback(shapes[key], places[key], read))
    return unflatten_dict({key: loaded[key] for key in shapes})


def _read(
    taken: list[tuple[Source, Tensor]], shape: tuple[int, ...], dtype: np.dtype, index: Any
) -> np.ndarray:
    """One device's slice of a parameter, from its tensors (one for each layer); without any, zeros."""
    bounds = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    out = np.zeros([len(b) for b in bounds], dtype)
    if taken and taken[0][0].layer is None:
        _fill(out, *taken[0], shape, bounds)
    elif taken:
        for row, layer in zip(out, bounds[0], strict=True):
            _fill(row, *taken[layer], shape[1:], bounds[1:])
    return out


def _fill(
    out: np.ndarray, source: Source, tensor: Tensor, shape: tuple[int, ...], bounds: list[range]
) -> None:
    """out = tensor, turned to our axes, within `bounds` of them; read block by block along its first axis."""
    axes, (first, *rest) = source.axes, source.tensor_axes
    size, within = dict(zip(axes, shape, strict=True)), dict(zip(axes, bounds, strict=True))
    unit = tensor.shape[0] // size[first]  # rows of one step along the first axis: a head's
    step = max(1, BLOCK // (unit * tensor.row_bytes))
    turn = [source.tensor_axes.index(axis) for axis in axes]
    cut = tuple(slice(within[axis].start, within[axis].stop) for axis in rest)
    with tensor.opened() as data:
        for start in range(within[first].start, within[first].stop, step):
            stop = min(start + step, within[first].stop)
            block = data[start * unit : stop * unit].reshape(stop - start, *(size[axis] for axis in rest))
            place = slice(start - within[first].start, stop - within[first].start)
            block = block[:, *cut].astype(out.dtype).transpose(turn)
            out[tuple(place if axis == first else slice(None) for axis in axes)] = block


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Eight hex digits for each tensor, of its dtype, shape and first, middle and last `SAMPLED` bytes.

    To read all of them would take as long as loading does. Training moves every weight a little, so that
    other weights are seen; a change of a few numbers elsewhere in a large tensor is not.
    """
    out = {}
    for name, tensor in sorted(tensors.items()):
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
        width, size = tensor.row_bytes, prod(tensor.shape) * tensor.dtype.itemsize
        with tensor.opened() as data:
            for start in sorted({0, max(0, (size - SAMPLED) // 2), max(0, size - SAMPLED)}):
                first, last = start // width, -(-min(start + SAMPLED, size) // width)
                digest.update(data[first:last].tobytes()[start - first * width :][:SAMPLED])
        out[name] = digest.hexdigest()[:8]
    return out


def weight_digests(path: str | Path) -> dict[str, str]:
    """`_digests` of a directory."""
    return _digests(open_tensors(resolve(path)))


def check_weights(path: str | Path, cfg: DecoderConfig) -> None:
    """Refuse a directory whose weights `load_params` would refuse; only headers are read."""
    _check(open_tensors(resolve(path)), cfg)


def ignored_files(path: str | Path) -> list[str]:
    """Names of the weight files of a directory that are not read: a model.safetensors comes before them, as
    it does in transformers.
    """
    directory = resolve(path)
    every = (file.name for file in directory.glob("model*.safetensors*"))
    others = sorted(name for name in every if name != "model.safetensors")
    return others if (directory / "model.safetensors").is_file() else []


def _weight_files(path: Path) -> list[Path]:
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (path / INDEX).is_file():
        remedy = "download the directory again"
        shards = files.read_json(path / INDEX, remedy).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ConfigError(
                f"{path / INDEX}: weight_map: the file of each tensor is needed, by name; {remedy}"
            )
        named = sorted({path / name for name in shards.values()})
        if gone := [file.name for file in named if not file.is_file()]:
            raise ConfigError(
                f"{path}: {', '.join(gone)}: named by {INDEX}, and not there; the download is incomplete"
            )
        return named
    if old := sorted(file.name for file in path.glob("*.bin")):
        raise ConfigError(
            f"{path}: only {old[0]}, a pickle, which is not read; save it once more as safetensors: "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)"
        )
    raise ConfigError(f"{path}: no model.safetensors and no {INDEX}; model.init random needs none")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by its published name; only headers are read."""
    out: dict[str, Tensor] = {}
    for source in _weight_files(path):
        with (
            files.reading(source, "the download is incomplete or damaged; download it again"),
            safe_open(source, framework="numpy") as file,
        ):
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        for given, (dtype, shape) in header.items():
            name = given
            for new, published in RENAMED.items():
                name = published + name.removeprefix(new) if name.startswith(new) else name
            if name in out:
                raise ConfigError(f"{name}: set twice, by {out[name].file.name} and by {source.name}")
            if dtype not in DTYPES:
                raise ConfigError(
                    f"{source}: {name}: stored as {dtype}; {', '.join(DTYPES)} are read, "
                    "quantised weights are not"
                )
            out[name] = Tensor(source, given, jnp.dtype(DTYPES[dtype]), shape)
    return out


def published_name(name: str, cfg: DecoderConfig) -> str:
    """What the published files of the model's family call a tensor."""
    for ours, published in cfg.file_prefixes:
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def _check(tensors: dict[str, Tensor], cfg: DecoderConfig) -> None:
    """Every tensor has its parameter, every parameter its tensor, and the shapes agree; else all that is
    wrong, by name.
    """
    needed, wrong = sources(cfg), []
    for name, source in needed.items():
        if name not in tensors:
            wrong.append(f"{name}: missing; {source} needs it, of shape {source.shape}")
        elif tensors[name].shape != source.shape:
            wrong.append(f"{name}: of shape {tensors[name].shape}; {source} needs {source.shape}")
    for name, tensor in tensors.items():
        if name in needed or name.startswith(cfg.unread) or BUFFER.fullmatch(name):
            continue
        why = "no parameter of this model takes it"
        if name == HEAD:
            if cfg.execution.value_head or (cfg.tied and _equal(tensor, tensors.get(EMBED))):
                continue
            why = "tie_word_embeddings is true, and it is not the embedding"
        wrong.append(f"{name}: of shape {tensor.shape}; {why}")
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ConfigError("the weights do not fit config.json:\n" + "\n".join(wrong[:8] + more))


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, BLOCK // a.row_bytes)
    with a.opened() as x, b.opened() as y:
        blocks = (slice(start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step))
        return all(np.array_equal(x[block], y[block]) for block in blocks)

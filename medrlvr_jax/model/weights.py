"""Read parameter trees from the safetensors of Hugging Face directories.

A model is never loaded in part, since it would train badly without an error. Tensors without a parameter,
parameters without a tensor, tensors that occur twice and wrong shapes are refused by name.

Weights are streamed: blocks of about a megabyte are read, transposed, cast and copied. So loading needs
memory for the parameters and for one more of them, and a host reads only the slices that its devices hold.
Rotary buffers of old checkpoints are ignored. So is an `lm_head.weight` that equals the embedding of a tied
model. One that differs is refused, because transformers would untie it.
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

# From prefixes of tensor names in files to this library's. All of them are read; `published_name` is written.
RENAMED = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.visual.": "visual.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
EMBED, HEAD = PARAMETERS["embed"].tensor, PARAMETERS["head"].tensor
BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # computed, not trained
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 2**20  # bytes that are read at once, few enough to be transposed within the processor's cache
INDEX = "model.safetensors.index.json"
SAMPLED = 4096  # bytes of a tensor that `_digests` reads at each of three positions


class Source(NamedTuple):
    """The parameter to which a tensor belongs. Axes have the names of spec.py."""

    path: tuple[str, ...]
    layer: int | None  # None if the parameter is not stacked
    axes: list[str]  # of the parameter, without the axis of layers
    tensor_axes: list[str]  # the same axes in the tensor's order
    shape: tuple[int, ...]  # of the tensor, in which some axes are joined

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
        """Open the tensor for slicing. The file is closed afterwards, since all that was read of a mapped
        file counts as resident memory until then.
        """
        with safe_open(self.file, framework="numpy") as file:
            yield file.get_slice(self.name)


def sources(cfg: DecoderConfig) -> dict[str, Source]:
    """Return the sources of all tensors of a model by name, including those of a frozen vision tower."""
    shapes, out = _shapes(cfg), {}
    for path, row in parameters(cfg.run_with(tower="train")).items():
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
                raise ConfigError(f"{name}: both {out[name]} and {source} use it, and only one can")
            out[name] = source
    return out


@cache
def _shapes(cfg: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    """Return the shape of every parameter by path, including those of a frozen vision tower."""
    return {path: box.value.shape for path, box in flat(abstract(cfg.run_with(tower="train"))).items()}


def load_params(path: str | Path, cfg: DecoderConfig, shardings: Params, dtype: Any) -> Params:
    """Load those parameters of a directory for which there are `shardings`, as `dtype`. A critic gets the
    policy's body and a value head of zeros. Raise `ConfigError` if config.json and weights do not agree.
    """
    wanted, loaded, tensors_at = flat(shardings), {}, {}
    shapes = {key: shape for key, shape in _shapes(cfg).items() if key in wanted}
    tensors = open_tensors(resolve(path))
    _check(tensors, cfg)
    label = f"weights of {Path(path).name}, "
    require_equal(lambda: {label + name: digest for name, digest in _digests(tensors).items()})
    for name, source in sources(cfg).items():
        tensors_at.setdefault(source.path, []).append((source, tensors[name]))
    # The largest first, so that its copy on the host does not coexist with all parameters on the device.
    for key in sorted(shapes, key=lambda key: -prod(shapes[key])):
        read = partial(_read, tensors_at.get(key, []), shapes[key], jnp.dtype(dtype))
        gc.collect(0)  # else JAX keeps the last parameter's copy on the host
        loaded[key] = jax.block_until_ready(jax.make_array_from_callback(shapes[key], wanted[key], read))
    return unflatten_dict({key: loaded[key] for key in shapes})


def _read(
    tensors: list[tuple[Source, Tensor]], shape: tuple[int, ...], dtype: np.dtype, index: Any
) -> np.ndarray:
    """Read one device's slice of a parameter from its tensors, one for each layer; zeros without tensors."""
    bounds = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    out = np.zeros([len(b) for b in bounds], dtype)
    if tensors and tensors[0][0].layer is None:
        _fill(out, *tensors[0], shape, bounds)
    elif tensors:
        for row, layer in zip(out, bounds[0], strict=True):
            _fill(row, *tensors[layer], shape[1:], bounds[1:])
    return out


def _fill(
    out: np.ndarray, source: Source, tensor: Tensor, shape: tuple[int, ...], bounds: list[range]
) -> None:
    """Copy the part of a tensor within `bounds` of the parameter's axes to `out`, block by block along the
    tensor's first axis.
    """
    axes, (first, *rest) = source.axes, source.tensor_axes
    size, within = dict(zip(axes, shape, strict=True)), dict(zip(axes, bounds, strict=True))
    unit = tensor.shape[0] // size[first]  # rows of one index of the first axis, such as those of a head
    step = max(1, BLOCK // (unit * tensor.row_bytes))
    order = [source.tensor_axes.index(axis) for axis in axes]
    cut = tuple(slice(within[axis].start, within[axis].stop) for axis in rest)
    with tensor.opened() as data:
        for start in range(within[first].start, within[first].stop, step):
            stop = min(start + step, within[first].stop)
            block = data[start * unit : stop * unit].reshape(stop - start, *(size[axis] for axis in rest))
            place = slice(start - within[first].start, stop - within[first].start)
            block = block[:, *cut].astype(out.dtype).transpose(order)
            out[tuple(place if axis == first else slice(None) for axis in axes)] = block


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return eight hex digits for each tensor: a hash of dtype, shape and the first, middle and last
    `SAMPLED` bytes.

    Reading all bytes would take as long as loading. Training changes every weight, so weights of another run
    have other digests. A change of a few numbers in a large tensor may be missed.
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
    """Return `_digests` of a directory."""
    return _digests(open_tensors(resolve(path)))


def check_weights(path: str | Path, cfg: DecoderConfig) -> None:
    """Raise the `ConfigError` that `load_params` would raise for a directory. Only headers are read."""
    _check(open_tensors(resolve(path)), cfg)


def ignored_files(path: str | Path) -> list[str]:
    """Return the names of weight files that are not read, because there is a model.safetensors. transformers
    does not read them, either.
    """
    directory = resolve(path)
    names = (file.name for file in directory.glob("model*.safetensors*"))
    others = sorted(name for name in names if name != "model.safetensors")
    return others if (directory / "model.safetensors").is_file() else []


def _weight_files(path: Path) -> list[Path]:
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (path / INDEX).is_file():
        remedy = "download the directory again"
        shards = files.read_json(path / INDEX, remedy).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ConfigError(f"{path / INDEX}: weight_map: it must map tensor names to file names; {remedy}")
        named = sorted({path / name for name in shards.values()})
        if gone := [file.name for file in named if not file.is_file()]:
            raise ConfigError(
                f"{path}: {', '.join(gone)}: listed in {INDEX} but missing; the download is incomplete"
            )
        return named
    if old := sorted(file.name for file in path.glob("*.bin")):
        raise ConfigError(
            f"{path}: only {old[0]}, a pickle, which is not read; save the model again as safetensors: "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)"
        )
    raise ConfigError(f"{path}: no model.safetensors and no {INDEX}; model.init random needs none")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a directory by this library's names. Only headers are read."""
    out: dict[str, Tensor] = {}
    for source in _weight_files(path):
        with (
            files.reading(source, "the download is incomplete or damaged; download it again"),
            safe_open(source, framework="numpy") as file,
        ):
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        for stored_name, (dtype, shape) in header.items():
            name = stored_name
            for new, published in RENAMED.items():
                name = published + name.removeprefix(new) if name.startswith(new) else name
            if name in out:
                raise ConfigError(f"{name}: both {out[name].file.name} and {source.name} have it")
            if dtype not in DTYPES:
                raise ConfigError(
                    f"{source}: {name}: stored as {dtype}; {', '.join(DTYPES)} are read, "
                    "quantised weights are not"
                )
            out[name] = Tensor(source, stored_name, jnp.dtype(DTYPES[dtype]), shape)
    return out


def published_name(name: str, cfg: DecoderConfig) -> str:
    """Return the name of a tensor in the published files of the model's family."""
    for prefix, published in cfg.file_prefixes:
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def _check(tensors: dict[str, Tensor], cfg: DecoderConfig) -> None:
    """Raise `ConfigError` unless tensors and parameters correspond one to one, with the same shapes."""
    needed, wrong = sources(cfg), []
    for name, source in needed.items():
        if name not in tensors:
            wrong.append(f"{name}: missing; {source} needs it, of shape {source.shape}")
        elif tensors[name].shape != source.shape:
            wrong.append(f"{name}: of shape {tensors[name].shape}; {source} needs {source.shape}")
    for name, tensor in tensors.items():
        if name in needed or name.startswith(cfg.unread) or BUFFER.fullmatch(name):
            continue
        why = "this model has no parameter for it"
        if name == HEAD:
            if cfg.execution.value_head or (cfg.tied and _equal(tensor, tensors.get(EMBED))):
                continue
            why = "tie_word_embeddings is true, but it differs from the embedding"
        wrong.append(f"{name}: of shape {tensor.shape}; {why}")
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ConfigError("the weights do not match config.json:\n" + "\n".join(wrong[:8] + more))


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, BLOCK // a.row_bytes)
    with a.opened() as x, b.opened() as y:
        blocks = (slice(start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step))
        return all(np.array_equal(x[block], y[block]) for block in blocks)

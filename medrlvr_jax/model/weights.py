"""Hugging Face directories to parameter trees and back: config.json, safetensors, and one table between the
names.

Nothing is loaded by halves. A tensor that no parameter takes, a parameter that no tensor sets, a tensor given
twice, a shape or a setting that the decoder does not compute: each is refused by name, since a half-loaded
model trains quietly and badly.

Weights stream: `pread` in blocks of about a megabyte, each turned, cast and put in its place; so a load needs
the parameters plus one of them, and a host reads only the slices its devices hold. (A memory map would count
the whole file as resident.) Two things in a file are passed over: the rotary buffers of old checkpoints, and
an `lm_head.weight` that repeats the embedding of a tied model (one that differs is refused: transformers
would untie it).
"""

import gc
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from jax.experimental.multihost_utils import process_allgather
from safetensors import safe_open

from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import require_equal
from medrlvr_jax.model import vision
from medrlvr_jax.model.spec import PARAMETERS, DecoderConfig, Parameter, RopeScaling, abstract, path_of
from medrlvr_jax.types import Params


class Entry(NamedTuple):
    """A tensor of the file and our parameter, axis by axis; "hd e" is a matrix whose rows are heads × head
    size.
    """

    name: str  # {i}: the layer; ours are stacked along a leading axis
    theirs: str
    ours: str


AXES = {"vocab": "v", "embed": "e", "width": "e", "heads": "h", "kv_heads": "h", "head_dim": "d", "ffn": "f"}
AXES |= {"channels": "c", "frames": "t", "rows": "y", "columns": "x"}  # of the tower's patches
AXES |= {"three": "n", "square": "s", "merged": "m", "out": "o"}


def _entry(row: Parameter, prefix: str = "", of_layer: str = "model.layers.{i}.") -> Entry:
    """A row of a table of parameters with a letter an axis: "(heads head_dim) embed" is "hd e"."""
    groups = [joined or single for joined, single in re.findall(r"\((.*?)\)|(\S+)", row.tensor_axes)]
    theirs = ("".join(AXES[axis] for axis in group.split()) for group in groups)
    name = f"{of_layer if row.stacked else prefix}{row.tensor}"
    return Entry(name, " ".join(theirs), " ".join(AXES[axis] for axis in row.axes.split()))


TABLE = {path_of(name): _entry(row) for name, row in PARAMETERS.items() if row.tensor}
TABLE |= {
    ("vision", *vision.path_of(name)): _entry(row, "visual.", "visual.blocks.{i}.")
    for name, row in vision.PARAMETERS.items()
}
# How transformers 5 names what the published files name otherwise; both are read, and the latter written.
RENAMED = {"model.language_model.": "model.", "model.visual.": "visual."}
EMBED, HEAD = TABLE["embed",].name, TABLE["head",].name
# computed, never learned
BUFFERS = ("model.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq")
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
}
BLOCK = 2**20  # bytes read at once: small enough that turning a block stays in the processor's cache
INDEX = "model.safetensors.index.json"
SAMPLED = 4096  # bytes of a tensor that `_digests` reads in each of three places
SHARD_BYTES = 5 * 10**9  # of one exported file, as transformers had it

FAMILIES = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}, "llama": {}}
SEEING = ("qwen2_vl", "qwen2_5_vl")  # Qwen2 with a vision tower
ONLY = {  # settings that would change the arithmetic, and the one value that does not
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "rope_interleave": False,
    "rope_interleaved": False,
    "quantization_config": None,
}
# what transformers takes from config.json where there is no generation_config.json
TOKENS = ("bos_token_id", "pad_token_id")
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.jinja",
    "generation_config.json",
)


def resolve(path: str | Path) -> Path:
    """The directory of a source such as "embedded", of a path, or of a hub name (downloaded, or found in the
    hub's cache).
    """
    if source := SOURCES.get(str(path)):
        return source.model
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    beside = bool(local.parent.name) and local.parent.is_dir()  # models/typo, where there is a folder models
    if beside or local.exists() or local.is_absolute() or str(path).startswith(".") or len(local.parts) > 2:
        raise ConfigError(
            f"model.path: {path}: no such directory; give a Hugging Face directory, a hub name, or embedded"
        )
    with files.reading(f"model.path: {path}", "it is no directory here, and the hub did not give it"):
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "model*.safetensors", *SIDE_FILES])
        )


def read_config(path: str | Path) -> DecoderConfig:
    """config.json in our words; `dataclasses.replace` then sets what the run decides (dtype, remat,
    value_head).
    """
    file = resolve(path) / "config.json"
    if not file.is_file():
        run = file.parent if (file.parent / "checkpoints").is_dir() else None
        remedy = (
            f"this is a run: medrlvr export {run} {run}/hf, then model.path={run}/hf"
            if run
            else "a Hugging Face directory has one"
        )
        raise ConfigError(f"{file}: not there; {remedy}")
    given = files.read_json(file)
    kind = given.get("model_type")
    sees = kind in SEEING
    # transformers 5 writes the decoder's settings into a section; the published files have them beside it.
    said = given | (given.get("text_config") or {}) if sees else given
    said |= {key: given[key] for key in ("model_type", "tie_word_embeddings") if key in given}

    def need(key: str, where: dict[str, Any] = said) -> Any:
        if where.get(key) is None:
            raise ConfigError(f"{file}: {key}: needed, and not given")
        return where[key]

    need("model_type")
    if kind not in (*FAMILIES, *SEEING):
        names = ", ".join([*FAMILIES, *SEEING])
        raise ConfigError(f"{file}: model_type: {kind!r}: this decoder computes {names}")
    # transformers 5 writes rope_parameters; 4 wrote rope_scaling (type, then rope_type) beside a rope_theta;
    # 5 reads them in this order.
    rope = {"rope_theta": said.get("rope_theta")} | (
        said.get("rope_scaling") or said.get("rope_parameters") or {}
    )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    found = [
        (key, got, value)
        for key, value in ONLY.items()
        for got in (said.get(key), rope.get(key))
        if got is not None
    ]
    found += [("layer_types", got, "full_attention") for got in said.get("layer_types") or ()]
    rope_types = ("default", "mrope") if sees else ("default", "llama3")
    found += [("rope_type", rope_type, " or ".join(rope_types))] if rope_type not in rope_types else []
    for key, got, value in found:
        # Qwen2 has query, key and value biases whatever attention_bias says.
        if got != value and (key != "attention_bias" or kind not in ("qwen2", *SEEING)):
            raise ConfigError(f"{file}: {key}: {got!r}: this decoder computes only {value!r}")
    need("hidden_act")
    if kind == "qwen3":
        # transformers would assume 128 here, and hidden_size / num_attention_heads elsewhere
        need("head_dim")
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return DecoderConfig(
        vocab=need("vocab_size"),
        embed=need("hidden_size"),
        layers=need("num_hidden_layers"),
        heads=need("num_attention_heads"),
        kv_heads=need("num_key_value_heads"),
        head_dim=said.get("head_dim") or need("hidden_size") // need("num_attention_heads"),
        ffn=need("intermediate_size"),
        rope_theta=need("rope_theta", rope),
        norm_eps=need("rms_norm_eps"),
        tied=need("tie_word_embeddings"),
        rope_scaling=RopeScaling(*(need(key, rope) for key in stretch)) if rope_type == "llama3" else None,
        max_positions=said.get("max_position_embeddings"),  # of a stretched rope: after the stretching
        **FAMILIES["qwen2" if sees else need("model_type")],
        rope_axes=vision.rope_axes(need("mrope_section", rope)) if sees else None,
        vision=vision.read_config(given, file.parent) if sees else None,
    )


class Tensor(NamedTuple):
    """A tensor in an open safetensors file."""

    file: BinaryIO
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        width = prod(self.shape[1:]) * self.dtype.itemsize
        data = os.pread(self.file.fileno(), (stop - start) * width, self.start + start * width)
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def load_params(path: str | Path, cfg: DecoderConfig, shardings: Params, dtype: Any) -> Params:
    """The parameters of a directory as `dtype`, each laid out by its sharding. A critic gets the same body
    and a value head of zeros. `shardings` of `{"vision": …}` alone give the vision tower alone.
    """
    places, loaded = _flat(shardings), {}
    shapes = _shapes(cfg) | _tower_shapes(cfg)
    shapes = {path: shape for path, shape in shapes.items() if path in places}
    with ExitStack() as opened:
        tensors = _open(resolve(path), opened)
        _check(tensors, cfg)
        require_equal(
            lambda: {
                f"weights of {Path(path).name}, {name}": digest for name, digest in _digests(tensors).items()
            }
        )
        # The largest first: the host's copy of a parameter then never stands beside a full set of the
        # device's.
        for key in sorted(shapes, key=lambda k: -prod(shapes[k])):
            read = partial(_read, tensors, key, shapes[key], jnp.dtype(dtype))
            gc.collect(0)  # jax lets go of the last parameter's host copy only when Python collects
            loaded[key] = jax.block_until_ready(jax.make_array_from_callback(shapes[key], places[key], read))
    return unflatten_dict({key: loaded[key] for key in shapes})


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Eight hex digits for each tensor, of its dtype, shape and first, middle and last `SAMPLED` bytes.

    To read all of them would take as long as loading does. Training moves every weight a little, so that
    other weights are seen; a change of a few numbers elsewhere in a large tensor is not.
    """
    out = {}
    for name, t in sorted(tensors.items()):
        digest, size = hashlib.sha256(f"{t.dtype} {t.shape}".encode()), prod(t.shape) * t.dtype.itemsize
        for start in sorted({0, max(0, (size - SAMPLED) // 2), max(0, size - SAMPLED)}):
            digest.update(os.pread(t.file.fileno(), min(SAMPLED, size - start), t.start + start))
        out[name] = digest.hexdigest()[:8]
    return out


def _read(
    tensors: dict[str, Tensor], key: tuple, shape: tuple[int, ...], dtype: np.dtype, index: Any
) -> np.ndarray:
    """One device's slice of a parameter: `index` holds a slice for each axis."""
    bounds = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    if key == ("value",):
        return np.zeros([len(b) for b in bounds], dtype)
    out = np.empty([len(b) for b in bounds], dtype)
    if "layers" not in key:
        _fill(out, tensors[TABLE[key].name], TABLE[key], shape, bounds)
    for row, i in enumerate(bounds[0] if "layers" in key else ()):
        _fill(out[row], tensors[TABLE[key].name.format(i=i)], TABLE[key], shape[1:], bounds[1:])
    return out


def _fill(out: np.ndarray, tensor: Tensor, entry: Entry, shape: tuple[int, ...], bounds: list[range]) -> None:
    """out = tensor, turned to our axes, within `bounds` of them; read along the tensor's first axis, block by
    block.
    """
    ours, theirs = entry.ours.split(), entry.theirs.replace(" ", "")
    size, within = dict(zip(ours, shape, strict=True)), dict(zip(ours, bounds, strict=True))
    first, rest = theirs[0], theirs[1:]
    unit = tensor.shape[0] // size[first]  # rows of one step along the first axis: a head's
    step = max(1, BLOCK // (unit * prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for start in range(within[first].start, within[first].stop, step):
        stop = min(start + step, within[first].stop)
        block = tensor.rows(start * unit, stop * unit).reshape(stop - start, *(size[a] for a in rest))
        block = block[:, *(slice(within[a].start, within[a].stop) for a in rest)].astype(out.dtype)
        here = slice(start - within[first].start, stop - within[first].start)
        out[tuple(here if a == first else slice(None) for a in ours)] = block.transpose(
            [theirs.index(a) for a in ours]
        )


@cache
def _shapes(cfg: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    """Path -> shape of every parameter, as the decoder itself declares them."""
    return {path: box.value.shape for path, box in _flat(abstract(cfg)).items()}


@cache
def _tower_shapes(cfg: DecoderConfig) -> dict[tuple, tuple[int, ...]]:
    """The same of the vision tower; {} without one."""
    tree = {"vision": vision.abstract(cfg.vision)} if cfg.vision else {}
    return {path: box.value.shape for path, box in _flat(tree).items()}


def _flat(tree: Params) -> dict[tuple, Any]:
    return dict(flatten_dict(tree))


def _names(
    shapes: dict[tuple, tuple[int, ...]],
) -> dict[str, tuple[tuple, int | None, tuple[int, ...]]]:
    """Tensor name -> path, layer and the shape it has in the file."""
    out = {}
    for key in shapes:
        if key == ("value",):
            continue
        layers = range(shapes[key][0]) if "layers" in key else (None,)
        size = dict(zip(TABLE[key].ours.split(), shapes[key]["layers" in key :], strict=True))
        for i in layers:
            name = TABLE[key].name.format(i=i)
            if name in out:
                raise ConfigError(
                    f"{name}: both {_say(*out[name][:2])} and {_say(key, i)} take it; TABLE must name it once"
                )
            out[name] = key, i, tuple(prod(size[a] for a in group) for group in TABLE[key].theirs.split())
    return out


def _say(key: tuple, layer: int | None) -> str:
    return "/".join(key) + ("" if layer is None else f"[{layer}]")


def check_weights(path: str | Path, cfg: DecoderConfig) -> None:
    """Refuse a directory whose weights `load_params` would refuse; only headers are read."""
    with ExitStack() as opened:
        _check(_open(resolve(path), opened), cfg)


def passed_over(path: str | Path) -> list[str]:
    """Names of the weight files of a directory that are not read: a model.safetensors comes before them, as
    it does in transformers.
    """
    directory = resolve(path)
    others = sorted(
        file.name for file in directory.glob("model*.safetensors*") if file.name != "model.safetensors"
    )
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


def _open(path: Path, opened: ExitStack) -> dict[str, Tensor]:
    """Every tensor of a directory by name; only headers are read."""
    out: dict[str, Tensor] = {}
    for source in _weight_files(path):
        with (
            files.reading(source, "the download is incomplete or damaged; download it again"),
            safe_open(source, framework="numpy"),
        ):
            pass  # the header is whole, and tells of as many bytes as there are
        file = opened.enter_context(open(source, "rb"))
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for given, t in header.items():
            name = given
            for new, published in RENAMED.items():
                name = published + name.removeprefix(new) if name.startswith(new) else name
            if name in out:
                raise ConfigError(
                    f"{name}: set twice, by {Path(out[name].file.name).name} and by {source.name}"
                )
            if t["dtype"] not in DTYPES:
                raise ConfigError(
                    f"{source}: {name}: stored as {t['dtype']}; {', '.join(DTYPES)} are read, "
                    "quantised weights are not"
                )
            out[name] = Tensor(file, 8 + length + t["data_offsets"][0], DTYPES[t["dtype"]], tuple(t["shape"]))
    return out


def _is_buffer(name: str) -> bool:
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    return name in [pattern.format(i=layer) for pattern in BUFFERS]


def _check(tensors: dict[str, Tensor], cfg: DecoderConfig) -> None:
    """Every tensor has its parameter, every parameter its tensor, and the shapes agree; else all that is
    wrong, by name.
    """
    names, wrong = _names(_shapes(cfg) | _tower_shapes(cfg)), []
    for name, (key, i, shape) in names.items():
        if name not in tensors:
            wrong.append(f"{name}: missing; {_say(key, i)} needs it, of shape {shape}")
        elif tensors[name].shape != shape:
            wrong.append(f"{name}: of shape {tensors[name].shape}; {_say(key, i)} needs {shape}")
    for name, tensor in tensors.items():
        spare_head = name == HEAD and (
            cfg.execution.value_head or (cfg.tied and _equal(tensor, tensors.get(EMBED)))
        )
        if name not in names and not spare_head and not _is_buffer(name):
            why = (
                "tie_word_embeddings is true, and it is not the embedding"
                if name == HEAD
                else "no parameter of this model takes it"
            )
            wrong.append(f"{name}: of shape {tensor.shape}; {why}")
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ConfigError("the weights do not fit config.json:\n" + "\n".join(wrong[:8] + more))


def _equal(a: Tensor, b: Tensor | None) -> bool:
    if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, BLOCK // (a.shape[1] * a.dtype.itemsize))
    spans = [(start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step)]
    return all(np.array_equal(a.rows(*span), b.rows(*span)) for span in spans)


def weight_digests(path: str | Path) -> dict[str, str]:
    """`_digests` of a directory."""
    with ExitStack() as opened:
        return _digests(_open(resolve(path), opened))


def save_params(
    params: Params,
    cfg: DecoderConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: Any = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """A directory that transformers loads: our weights (as `dtype`, or as they are), all else from where the
    model came.

    But for `stop_ids`, the tokens that ended the policy's responses: its `generate` is to stop at each of
    them, too, and reads them in generation_config.json; other programs read config.json.

    In a run of many processes every one calls it and the first one writes. The directory appears whole: it is
    written beside itself as `.NAME.partial` and renamed.
    """
    if cfg.execution.value_head:
        raise ConfigError(
            "a critic has no output matrix, so transformers has no use for it: export the policy"
        )
    source, out, flat = resolve(source_dir), Path(out_dir), _flat(params)
    shapes = {key: tuple(p.shape) for key, p in flat.items()}
    if shapes != (needed := _shapes(cfg)):
        raise ConfigError(
            f"{out}: the parameters are not this model's: "
            f"{sorted(set(shapes.items()) ^ set(needed.items()))[:4]}"
        )
    stored, writer = jnp.dtype(dtype or flat["embed",].dtype), jax.process_index() == 0
    partial_dir = _begin(out)
    shapes |= _tower_shapes(cfg)
    shards = _shards({name: shape for name, (_, _, shape) in _names(shapes).items()}, stored.itemsize)
    with ExitStack() as opened:
        frozen = _open(source, opened) if cfg.vision else {}
        for file, tensors in shards.items():
            with open(partial_dir / file if writer else os.devnull, "wb") as f:
                _write(f, tensors, stored, _to_theirs(flat, frozen, shapes, tensors, stored))
    if writer:
        if len(shards) > 1:
            total = sum(map(prod, shapes.values())) * stored.itemsize
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
            }
            (partial_dir / INDEX).write_text(json.dumps(index, indent=1))
        said = files.read_json(source / "config.json")
        said["torch_dtype" if "torch_dtype" in said else "dtype"] = stored.name  # transformers 4 | 5
        for file in {file for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file()}:
            shutil.copyfile(file, partial_dir / file.name)
        if stop_ids:
            said["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
            file = partial_dir / "generation_config.json"
            chosen = files.read_json(file) if file.is_file() else {k: said[k] for k in TOKENS if k in said}
            file.write_text(
                json.dumps(chosen | {"eos_token_id": said["eos_token_id"]}, indent=1), encoding="utf-8"
            )
        (partial_dir / "config.json").write_text(
            json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        os.replace(partial_dir, out)


def save_adapter(
    params: Params, cfg: DecoderConfig, source_dir: str | Path, out_dir: str | Path, dtype: Any = None
) -> None:
    """The adapters alone in the format of PEFT (adapter_config.json, adapter_model.safetensors), as `dtype`
    or as they are.

    PEFT's A is [rank, in] and its B [out, rank]; both add B·A·lora_alpha/r to the matrix, as ours do.
    """
    lora, source, out, flat = cfg.execution.lora, resolve(source_dir), Path(out_dir), _flat(params)
    if lora is None:
        raise ConfigError("--adapter: this run trained all weights (model.lora null); leave --adapter out")
    stored = jnp.dtype(dtype or "float32")
    tensors, targets = {}, [TABLE["layers", name].name.split(".")[-2] for name in lora.targets]
    for name in lora.targets:
        for half, shape in (("a", (-1, lora.rank)), ("b", (lora.rank, -1))):
            layers = np.asarray(process_allgather(flat["layers", f"{name}_{half}"], tiled=True))
            for i, layer in enumerate(layers):
                module = TABLE["layers", name].name.format(i=i).removesuffix(".weight")
                tensor = np.ascontiguousarray(layer.reshape(shape).T, stored)
                tensors[f"base_model.model.{module}.lora_{half.upper()}.weight"] = tensor
    partial_dir = _begin(out)
    if jax.process_index() == 0:
        with open(partial_dir / "adapter_model.safetensors", "wb") as f:
            _write(
                f, {name: tensor.shape for name, tensor in tensors.items()}, stored, iter(tensors.values())
            )
        base = (
            str(source_dir)
            if str(source_dir) not in SOURCES and not Path(source_dir).expanduser().is_dir()
            else str(source.resolve())
        )
        scale = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": False, "use_dora": False}
        usual = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0}
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "target_modules": targets,
        }
        files.write_json(partial_dir / "adapter_config.json", about | scale | usual)
        os.replace(partial_dir, out)


def _begin(out: Path) -> Path:
    """The empty directory beside `out` in which process 0 writes what then gets its name; refused where
    something is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; name another directory")
    partial_dir = out.absolute().with_name(f".{out.name}.partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial_dir, ignore_errors=True)  # left by a killed export
        partial_dir.mkdir(parents=True)
    return partial_dir


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> its tensors' shapes, each file at most `SHARD_BYTES` (one tensor at least)."""
    shards: list[dict] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(map(prod, [*shards[-1].values(), shape])) * itemsize > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _to_theirs(
    flat: dict, frozen: dict[str, Tensor], shapes: dict, wanted: dict, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The file's tensors in the order wanted, one on the host at a time; `process_allgather` since a process
    may hold only a part. A parameter that is not in `flat` was never trained: it is copied from `frozen`.
    """
    names = _names(shapes)
    for name in wanted:
        key, i, shape = names[name]
        if key not in flat:
            yield np.ascontiguousarray(frozen[name].rows(0, shape[0]), dtype)
            continue
        entry = TABLE[key]
        value = np.asarray(process_allgather(flat[key] if i is None else flat[key][i], tiled=True))
        value = value.transpose([entry.ours.split().index(a) for a in entry.theirs.replace(" ", "")])
        yield np.ascontiguousarray(value, dtype).reshape(shape)


def _write(
    f: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, arrays: Iterator[np.ndarray]
) -> None:
    """One safetensors file: the header's length, the header padded to 8 bytes, the tensors end to end."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        f.write(array.view(np.uint8).data)

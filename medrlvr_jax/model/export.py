"""Write parameter trees as Hugging Face directories or as PEFT adapters."""

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental.multihost_utils import process_allgather
from safetensors.numpy import save_file

from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.families import SIDE_FILES, resolve
from medrlvr_jax.model.lora import flat
from medrlvr_jax.model.spec import PARAMETERS, abstract
from medrlvr_jax.model.weights import (
    INDEX,
    Source,
    Tensor,
    open_tensors,
    published_name,
    sources,
)
from medrlvr_jax.types import Params

SHARD_BYTES = 5 * 10**9  # of an exported file, as in transformers 4; also the memory that an export needs
# Settings that transformers reads from config.json if there is no generation_config.json.
TOKENS = ("bos_token_id", "pad_token_id")


def save_params(
    params: Params,
    cfg: DecoderConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: Any = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a directory that transformers can load: the parameters, cast to `dtype` if it is given, and all
    other files of `source_dir`.

    `stop_ids` are the tokens that ended the policy's responses. They become the end tokens in
    generation_config.json, which transformers reads, and in config.json, which other programs read.

    All processes must call it; the first one writes. The directory is written as `.NAME.partial` and renamed
    at the end, so it is never incomplete.
    """
    if cfg.execution.value_head:
        raise ConfigError("a critic has no output matrix, which transformers needs: export the policy")
    source, out, leaves = resolve(source_dir), Path(out_dir), flat(params)
    shapes = {path: tuple(p.shape) for path, p in leaves.items()}
    needed = {path: box.value.shape for path, box in flat(abstract(cfg)).items()}
    if shapes != needed:
        differ = sorted(set(shapes.items()) ^ set(needed.items()))[:4]
        raise ConfigError(f"{out}: the parameters are not this model's: {differ}")
    stored, computed = jnp.dtype(dtype or leaves["embed",].dtype), sources(cfg)
    absent = {name for name, s in computed.items() if s.path not in leaves}
    published = open_tensors(source) if absent or cfg.unread else {}
    copied = {name: t for name, t in published.items() if name in absent or name.startswith(cfg.unread)}
    tensors: dict[str, Source | Tensor] = computed | copied
    partial_dir, size = _begin(out), lambda source: prod(source.shape) * stored.itemsize
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    gather = lambda name: _gather(leaves, tensors[name], stored)
    for file, names in shards.filename_to_tensors.items():
        gathered = ((published_name(name, cfg), gather(name)) for name in names)
        if jax.process_index() == 0:
            save_file(dict(gathered), partial_dir / file, {"format": "pt"})
        else:
            for _ in gathered:  # processes that do not write take part in the gathering
                pass
    if jax.process_index() == 0:
        if shards.is_sharded:
            files_of = {published_name(n, cfg): file for n, file in shards.tensor_to_filename.items()}
            files.write_json(partial_dir / INDEX, {"metadata": shards.metadata, "weight_map": files_of})
        _copy_settings(source, partial_dir, stored.name, stop_ids)
        os.replace(partial_dir, out)


def _copy_settings(source: Path, out: Path, dtype: str, stop_ids: Sequence[int]) -> None:
    """Copy the other files of a model's directory, and set dtype and end tokens in its settings."""
    config = files.read_json(source / "config.json")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype  # transformers 4 | 5
    for file in {file for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, out / file.name)
    if stop_ids:
        config["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
        file = out / "generation_config.json"
        settings = files.read_json(file) if file.is_file() else {k: config[k] for k in TOKENS if k in config}
        settings |= {"eos_token_id": config["eos_token_id"]}
        files.write_json(file, settings)
    files.write_json(out / "config.json", config)


def save_adapter(
    params: Params, cfg: DecoderConfig, source_dir: str | Path, out_dir: str | Path, dtype: Any = None
) -> None:
    """Write the adapters as PEFT does (adapter_config.json, adapter_model.safetensors), cast to `dtype` if it
    is given.

    In PEFT, A is [rank, in], B is [out, rank], and B·A·lora_alpha/r is added to the matrix.
    """
    lora, source, out = cfg.execution.lora, resolve(source_dir), Path(out_dir)
    if lora is None:
        raise ConfigError("--adapter: this run trained all weights (model.lora null); omit --adapter")
    stored, wrapped = jnp.dtype(dtype or "float32"), bool(cfg.vision or cfg.unread)
    tensors, targets = {}, [PARAMETERS[name].tensor.split(".")[-2] for name in lora.targets]
    for name in lora.targets:
        module = PARAMETERS[name].tensor.removesuffix(".weight")
        if wrapped:  # the name in transformers 5
            module = module.replace("model.", "model.language_model.", 1)
        for half, shape in (("a", (-1, lora.rank)), ("b", (lora.rank, -1))):
            layers = np.asarray(process_allgather(params["layers"][f"{name}_{half}"], tiled=True))
            for i, layer in enumerate(layers):
                tensor = np.ascontiguousarray(layer.reshape(shape).T, stored)
                tensors[f"base_model.model.{module.format(i)}.lora_{half.upper()}.weight"] = tensor
    partial_dir = _begin(out)
    if jax.process_index() == 0:
        save_file(tensors, partial_dir / "adapter_model.safetensors", {"format": "pt"})
        local = str(source_dir) in SOURCES or Path(source_dir).expanduser().is_dir()
        # The pattern excludes the vision tower, whose matrices have the same names.
        modules = rf".*language_model.*\.({'|'.join(targets)})" if wrapped else targets
        about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": modules}
        about["base_model_name_or_path"] = str(source.resolve() if local else source_dir)
        scale = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": False, "use_dora": False}
        usual = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0}
        files.write_json(partial_dir / "adapter_config.json", about | scale | usual)
        os.replace(partial_dir, out)


def _begin(out: Path) -> Path:
    """Create the directory that process 0 renames to `out` at the end. `out` must be missing or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; name another directory")
    partial_dir = out.absolute().with_name(f".{out.name}.partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial_dir, ignore_errors=True)  # of an export that was killed
        partial_dir.mkdir(parents=True)
    return partial_dir


def _gather(leaves: dict, source: Source | Tensor, dtype: np.dtype) -> np.ndarray:
    """Return a tensor from a file, or from a parameter that is sharded over all processes."""
    if isinstance(source, Source):
        value = leaves[source.path] if source.layer is None else leaves[source.path][source.layer]
        order = [source.axes.index(axis) for axis in source.tensor_axes]
        value = np.asarray(process_allgather(value, tiled=True)).transpose(order)
    else:
        with source.opened() as data:
            value = data[:]
    return np.ascontiguousarray(value, dtype).reshape(source.shape)

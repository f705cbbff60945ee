"""Where a model's directory is, and the architecture that its config.json describes. Of well-known models the
settings are in known.yaml, so that planning needs neither the hub nor weights.
"""

from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from medrlvr_jax.config.load import read_yaml
from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import vision
from medrlvr_jax.model.architecture import DecoderConfig, RopeScaling
from medrlvr_jax.model.vision import rope_axes

KNOWN = Path(__file__).with_name("known.yaml")
FAMILIES = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}, "llama": {}}
SEEING = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}  # with a tower: whose decoder
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


def resolve(path: str | Path, field: str = "model.path") -> Path:
    """The directory of a source such as "embedded", of a path, or of a hub name (downloaded, or found in the
    hub's cache). `field`: the setting that names it, for `ConfigError`s.
    """
    if source := SOURCES.get(str(path)):
        return source.model
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    beside = bool(local.parent.name) and local.parent.is_dir()  # models/typo, where there is a folder models
    if beside or local.exists() or local.is_absolute() or str(path).startswith(".") or len(local.parts) > 2:
        remedy = "give a Hugging Face directory, a hub name, or embedded"
        raise ConfigError(f"{field}: {path}: no such directory; {remedy}")
    with files.reading(f"{field}: {path}", "it is no directory here, and the hub did not give it"):
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "model*.safetensors", *SIDE_FILES])
        )


def read_config(path: str | Path, field: str = "model.path") -> DecoderConfig:
    """The architecture that a directory's config.json describes. `field`: see `resolve`."""
    file = resolve(path, field) / "config.json"
    if not file.is_file():
        run, remedy = file.parent, "a Hugging Face directory has one"
        if (run / "checkpoints").is_dir():
            remedy = f"this is a run: medrlvr export {run} {run}/hf, then {field}={run}/hf"
        raise ConfigError(f"{file}: not there; {remedy}")
    return architecture(files.read_json(file), file)


def architecture(given: dict[str, Any], file: Path) -> DecoderConfig:
    """The same of the settings themselves; `file` is where they are from."""
    kind = given.get("model_type")
    sees = kind in SEEING
    # transformers 5 writes the decoder's settings into a section; the published files have them beside it.
    config = given | (given.get("text_config") or {}) if sees else given
    config |= {key: given[key] for key in ("model_type", "tie_word_embeddings") if key in given}

    def need(key: str, where: dict[str, Any] = config) -> Any:
        if where.get(key) is None:
            raise ConfigError(f"{file}: {key}: needed, and not given")
        return where[key]

    need("model_type")
    if kind not in (*FAMILIES, *SEEING):
        names = ", ".join([*FAMILIES, *SEEING])
        raise ConfigError(f"{file}: model_type: {kind!r}: this decoder computes {names}")
    # transformers 5 writes rope_parameters; 4 wrote rope_scaling (type, then rope_type) beside a rope_theta;
    # 5 reads them in this order.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {"rope_theta": config.get("rope_theta"), "rope_type": rope.get("type", "default"), **rope}
    _check_settings(file, config, rope)
    need("hidden_act")
    family = str(SEEING.get(kind, kind))
    if family == "qwen3":
        # transformers would assume 128 here, and hidden_size / num_attention_heads elsewhere
        need("head_dim")
    stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    stretched = rope["rope_type"] == "llama3"
    return DecoderConfig(
        vocab=need("vocab_size"),
        embed=need("hidden_size"),
        layers=need("num_hidden_layers"),
        heads=need("num_attention_heads"),
        kv_heads=need("num_key_value_heads"),
        head_dim=config.get("head_dim") or need("hidden_size") // need("num_attention_heads"),
        ffn=need("intermediate_size"),
        rope_theta=need("rope_theta", rope),
        norm_eps=need("rms_norm_eps"),
        tied=need("tie_word_embeddings"),
        rope_scaling=RopeScaling(*(need(key, rope) for key in stretch)) if stretched else None,
        max_positions=config.get("max_position_embeddings"),  # of a stretched rope: after the stretching
        **FAMILIES[family],
        rope_axes=rope_axes(need("mrope_section", rope), kind == "qwen3_vl") if sees else None,
        vision=vision.read_config(given, file.parent) if sees else None,
    )


def _check_settings(file: Path, config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuse settings under which a decoder computes what this one does not."""
    kind, rope_type = config["model_type"], rope["rope_type"]
    settings = [
        (key, value, only) for key, only in ONLY.items() for value in (config.get(key), rope.get(key))
    ]
    settings += [("layer_types", value, "full_attention") for value in config.get("layer_types") or ()]
    rope_types = ("default", "mrope" if kind in SEEING else "llama3")
    if rope_type not in rope_types:
        settings.append(("rope_type", rope_type, " or ".join(rope_types)))
    for key, value, only in settings:
        # Qwen2 has query, key and value biases whatever attention_bias says.
        ignored = key == "attention_bias" and SEEING.get(kind, kind) == "qwen2"
        if value not in (None, only) and not ignored:
            raise ConfigError(f"{file}: {key}: {value!r}: this decoder computes only {only!r}")


def known(path: str) -> DecoderConfig:
    """Of a directory's config.json; else of known.yaml, `-Base` and `-Instruct` alike; else of the hub's."""
    names, name = _known(), path.removesuffix("-Base").removesuffix("-Instruct")
    if name in names and not Path(path).is_dir():
        return architecture(names[name], KNOWN)
    if path in SOURCES or Path(path).expanduser().is_dir() or path.count("/") != 1:
        return read_config(path)
    remedy = f"it is no directory here, none of {', '.join(names)}, and the hub did not give it"
    with files.reading(f"model.path: {path}", remedy):
        file = hf_hub_download(path, "config.json")
    return read_config(Path(file).parent)


@cache
def _known() -> dict[str, dict[str, Any]]:
    return read_yaml(KNOWN, "install the package again")

"""Where a model's directory is, and the architecture that its config.json describes. Of well-known models the
shapes are here (`KNOWN`), so that planning needs neither the hub nor weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download

from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import vision
from medrlvr_jax.model.architecture import DecoderConfig, RopeScaling, VisionConfig
from medrlvr_jax.model.vision import PIXELS, rope_axes

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
    given = files.read_json(file)
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


# --- well-known models, from their published config.json ---


def _qwen2(
    embed: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 151936, tied: bool = True
) -> DecoderConfig:
    head_dim = embed // heads
    return DecoderConfig(vocab, embed, layers, heads, kv_heads, head_dim, ffn, 1e6, 1e-6, tied, qkv_bias=True)


def _qwen3(embed: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool = True) -> DecoderConfig:
    return DecoderConfig(151936, embed, layers, heads, kv_heads, 128, ffn, 1e6, 1e-6, tied, qk_norm=True)


IDS = 151655, 151652, 151653  # of an image token, of an image's start and end


def _seeing(decoder: DecoderConfig, kind: Literal["qwen2_vl", "qwen2_5_vl"]) -> DecoderConfig:
    """The decoder with the vision tower of its family, which has one size."""
    windowed, layers = kind == "qwen2_5_vl", tuple(range(32))
    ffn, full = (3420, (7, 15, 23, 31)) if windowed else (5120, layers)
    tower = VisionConfig(kind, len(layers), 1280, 16, ffn, decoder.embed, *IDS, full_layers=full)
    return replace(decoder, rope_axes=rope_axes((16, 24, 24)), vision=tower)


def _seeing3(decoder: DecoderConfig) -> DecoderConfig:
    """Qwen3-VL: the tower of the 2B and the 4B."""
    layers = tuple(range(24))
    tower = VisionConfig("qwen3_vl", len(layers), 1024, 16, 4096, decoder.embed, *IDS, full_layers=layers)
    tower = replace(tower, patch=16, positions=48, deepstack=(5, 11, 17), **PIXELS["qwen3_vl"])
    return replace(decoder, rope_theta=5e6, rope_axes=rope_axes((24, 20, 20), True), vision=tower)


KNOWN = {
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11008),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
    "Qwen/Qwen2-VL-2B": _seeing(_qwen2(1536, 28, 12, 2, 8960), "qwen2_vl"),
    "Qwen/Qwen2-VL-7B": _seeing(_qwen2(3584, 28, 28, 4, 18944, 152064, tied=False), "qwen2_vl"),
    "Qwen/Qwen2.5-VL-3B": _seeing(_qwen2(2048, 36, 16, 2, 11008), "qwen2_5_vl"),
    "Qwen/Qwen2.5-VL-7B": _seeing(_qwen2(3584, 28, 28, 4, 18944, 152064, tied=False), "qwen2_5_vl"),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728),
    "Qwen/Qwen3-VL-2B": _seeing3(_qwen3(2048, 28, 16, 8, 6144)),
    "Qwen/Qwen3-VL-4B": _seeing3(_qwen3(2560, 36, 32, 8, 9728)),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, tied=False),
}


def known(path: str) -> DecoderConfig:
    """Of a directory's config.json; else of this table, `-Base` and `-Instruct` alike; else of the hub's."""
    name = path.removesuffix("-Base").removesuffix("-Instruct")
    if name in KNOWN and not Path(path).is_dir():
        return KNOWN[name]
    if path in SOURCES or Path(path).expanduser().is_dir() or path.count("/") != 1:
        return read_config(path)
    remedy = f"it is no directory here, none of {', '.join(KNOWN)}, and the hub did not give it"
    with files.reading(f"model.path: {path}", remedy):
        file = hf_hub_download(path, "config.json")
    return read_config(Path(file).parent)

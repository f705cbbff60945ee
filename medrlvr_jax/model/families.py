"""The directory of a model, and the architecture that its config.json describes. known.yaml has the settings
of well-known models, so that planning needs neither the hub nor weights.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download

from medrlvr_jax.config.load import read_yaml
from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import vision
from medrlvr_jax.model.architecture import DecoderConfig, RopeScaling, Window
from medrlvr_jax.model.rope import rope_axes

KNOWN = Path(__file__).with_name("known.yaml")


class Family(NamedTuple):
    """A `model_type` of text models."""

    fields: dict[str, Any]  # of `DecoderConfig`
    # transformers' defaults of settings that published files omit
    assumed: dict[str, Any] = {}  # noqa: RUF012
    windowed: bool = False  # whether some layers have a `sliding_window`


class Multimodal(NamedTuple):
    """A `model_type` whose config.json describes a decoder and a vision tower."""

    decoder: str  # the decoder's family
    has_vision: bool = True  # whether the tower is computed, too
    file_prefixes: tuple[tuple[str, str], ...] = ()  # as in `DecoderConfig`
    unread: tuple[str, ...] = ()  # as in `DecoderConfig`


GEMMA3 = {
    "qk_norm": True,
    "post_norms": True,
    "norm_offset": 1.0,
    "activation": "gelu_pytorch_tanh",
    "scaled_embedding": True,
}
GEMMA3_ASSUMED = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "qwen2": Family({"qkv_bias": True}),
    "qwen3": Family({"qk_norm": True}),
    "llama": Family({}),
    "gemma3_text": Family(GEMMA3, GEMMA3_ASSUMED, windowed=True),
}
QWEN3_VL_PREFIXES = (("model.", "model.language_model."), ("visual.", "model.visual."))
GEMMA3_TOWER = ("vision_tower.", "multi_modal_projector.")
MULTIMODAL = {
    "qwen2_vl": Multimodal("qwen2"),
    "qwen2_5_vl": Multimodal("qwen2"),
    "qwen3_vl": Multimodal("qwen3", file_prefixes=QWEN3_VL_PREFIXES),
    "gemma3": Multimodal("gemma3_text", False, (("model.", "language_model.model."),), GEMMA3_TOWER),
}
SLIDING = "sliding_attention"
TUNED = ("-Base", "-Instruct", "-pt", "-it")
# The settings of `RopeScaling` for each rope_type.
SCALINGS = {
    "default": (),
    "mrope": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ONLY = {  # settings of the arithmetic, and the only value that the decoder computes
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "rope_interleave": False,
    "rope_interleaved": False,
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
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
    """Return the directory of a source such as "embedded", of a path, or of a hub name, which is downloaded
    if it is not in the hub's cache. `field` is the setting that holds `path`, for `ConfigError`s.
    """
    if source := SOURCES.get(str(path)):
        return source.model
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    typo = bool(local.parent.name) and local.parent.is_dir()  # models/typo where there is a folder models
    if typo or local.exists() or local.is_absolute() or str(path).startswith(".") or len(local.parts) > 2:
        remedy = "give a Hugging Face directory, a hub name, or embedded"
        raise ConfigError(f"{field}: {path}: no such directory; {remedy}")
    with files.reading(f"{field}: {path}", "there is no such directory, and the hub did not provide it"):
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "model*.safetensors", *SIDE_FILES])
        )


def read_config(path: str | Path, field: str = "model.path") -> DecoderConfig:
    """Read the architecture from a directory's config.json. `path` and `field` as in `resolve`."""
    file = resolve(path, field) / "config.json"
    if not file.is_file():
        run, remedy = file.parent, "give a Hugging Face directory"
        if (run / "checkpoints").is_dir():
            remedy = f"{run} is a run: use medrlvr export {run} {run}/hf, then {field}={run}/hf"
        raise ConfigError(f"{file}: no such file; {remedy}")
    return architecture(files.read_json(file), file)


def architecture(content: dict[str, Any], file: Path) -> DecoderConfig:
    """Return the architecture that the content of the config.json `file` describes."""
    if content.get("model_type") is None:
        raise ConfigError(f"{file}: model_type: required, but not given")
    kind = str(content["model_type"])
    if kind not in (*FAMILIES, *MULTIMODAL):
        names = ", ".join([*FAMILIES, *MULTIMODAL])
        raise ConfigError(f"{file}: model_type: {kind!r}: this decoder computes {names}")
    wrapper = MULTIMODAL.get(kind, Multimodal(kind, has_vision=False))
    family = FAMILIES[wrapper.decoder]
    # The decoder's settings are in a section, or, in older files of Qwen, at the top level.
    settings = content | (content.get("text_config") or {}) if kind in MULTIMODAL else content
    settings |= {key: content[key] for key in ("model_type", "tie_word_embeddings") if key in content}
    config = family.assumed | {key: value for key, value in settings.items() if value is not None}
    rope, local_rope = _ropes(config, family.windowed)

    def need(key: str, where: dict[str, Any] = config) -> Any:
        if where.get(key) is None:
            raise ConfigError(f"{file}: {key}: required, but not given")
        return where[key]

    _check_settings(file, config, rope, local_rope)
    need("hidden_act")
    if wrapper.decoder == "qwen3":
        # Not every program that writes the file has the same default.
        need("head_dim")
    scaling = [need(key, rope) for key in SCALINGS[rope["rope_type"]]]
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
        query_size=config.get("query_pre_attn_scalar"),
        rope_scaling=RopeScaling(*scaling) if scaling else None,
        window=_window(config, need("rope_theta", local_rope)) if family.windowed else None,
        max_positions=config.get("max_position_embeddings"),  # with scaled frequencies: after the scaling
        **family.fields,
        rope_axes=rope_axes(need("mrope_section", rope), kind == "qwen3_vl") if wrapper.has_vision else None,
        vision=vision.read_config(content, file.parent) if wrapper.has_vision else None,
        file_prefixes=wrapper.file_prefixes,
        unread=wrapper.unread,
    )


def _ropes(config: dict[str, Any], windowed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rotary settings of layers with full attention, and of windowed layers.

    transformers 5 writes rope_parameters, with a section for each of the two kinds of layers if there are
    two. transformers 4 wrote rope_scaling (with type, later rope_type) beside rope_theta and
    rope_local_base_freq. If a file has both, version 5 uses rope_scaling.
    """
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    sections = [new.get(f"{kind}_attention") or {} for kind in ("full", "sliding")]
    rope, local_rope = (sections[0] | old, sections[1]) if windowed else (old or new, {})
    rope = {"rope_theta": config.get("rope_theta"), "rope_type": rope.get("type", "default"), **rope}
    return rope, {"rope_theta": config.get("rope_local_base_freq"), "rope_type": "default", **local_rope}


def _window(config: dict[str, Any], rope_theta: float) -> Window | None:
    """Return the window of the layers that `layer_types` or `sliding_window_pattern` select."""
    pattern = config.get("_sliding_window_pattern", config["sliding_window_pattern"])
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else SLIDING for i in range(config["num_hidden_layers"])
    ]
    layers = tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)
    return Window(config["sliding_window"], layers, rope_theta) if layers else None


def _check_settings(
    file: Path, config: dict[str, Any], rope: dict[str, Any], local_rope: dict[str, Any]
) -> None:
    """Raise `ConfigError` for settings that the decoder does not compute."""
    kind = config["model_type"]
    wrapper = MULTIMODAL.get(kind, Multimodal(kind, has_vision=False))
    family = FAMILIES[wrapper.decoder]
    settings = [(key, where.get(key), only) for key, only in ONLY.items() for where in (config, rope)]
    activation = family.fields.get("activation", "silu")
    settings += [(key, config.get(key), activation) for key in ("hidden_act", "hidden_activation")]
    kinds, types = ("full_attention", SLIDING)[: 1 + family.windowed], config.get("layer_types") or ()
    settings += [("layer_types", k, kinds[0]) for k in types if k not in kinds]
    if types and len(types) != config.get("num_hidden_layers"):
        settings.append(("layer_types", f"{len(types)} layers", config.get("num_hidden_layers")))
    settings.append(("rope_parameters.sliding_attention.rope_type", local_rope["rope_type"], "default"))
    rope_types = ("default", "mrope") if wrapper.has_vision else ("default", "linear", "llama3")
    if rope["rope_type"] not in rope_types:
        settings.append(("rope_type", rope["rope_type"], " or ".join(rope_types)))
    for key, value, only in settings:
        # Qwen2 has biases in attention and does not read attention_bias.
        ignored = key == "attention_bias" and wrapper.decoder == "qwen2"
        if value not in (None, only) and not ignored:
            raise ConfigError(f"{file}: {key}: {value!r}: this decoder computes only {only!r}")


def known(path: str) -> DecoderConfig:
    """Return the architecture of a model from a directory, else from known.yaml, else from the hub.
    known.yaml has one entry for a base model and its tuned forms, whose names end with `TUNED`.
    """
    names = _known()
    name = next((path.removesuffix(end) for end in TUNED if path.endswith(end)), path)
    if name in names and not Path(path).is_dir():
        return architecture(names[name], KNOWN)
    if path in SOURCES or Path(path).expanduser().is_dir() or path.count("/") != 1:
        return read_config(path)
    remedy = f"it is no directory and none of {', '.join(names)}, and the hub did not provide it"
    with files.reading(f"model.path: {path}", remedy):
        file = hf_hub_download(path, "config.json")
    return read_config(Path(file).parent)


@cache
def _known() -> dict[str, dict[str, Any]]:
    return read_yaml(KNOWN, "install the package again")

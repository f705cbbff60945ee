"""Shapes of well-known models, so that planning needs neither the hub nor weights. From their published
config.json.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download

from medrlvr_jax.config.sources import SOURCES
from medrlvr_jax.host import files
from medrlvr_jax.model import weights
from medrlvr_jax.model.spec import DecoderConfig, VisionConfig
from medrlvr_jax.model.vision import PIXELS, rope_axes


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
        return weights.read_config(path)
    remedy = f"it is no directory here, none of {', '.join(KNOWN)}, and the hub did not give it"
    with files.reading(f"model.path: {path}", remedy):
        file = hf_hub_download(path, "config.json")
    return weights.read_config(Path(file).parent)

"""The decoder of most tests: two layers in which every part affects the result."""

from typing import Any

from medrlvr_jax.model.architecture import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab": 40,
    "embed": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 64,
    "rope_theta": 1e4,
    "norm_eps": 1e-6,
    "tied": True,
}


def small(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**SIZES | changes)

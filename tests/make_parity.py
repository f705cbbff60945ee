"""The tiny models of `test_hf.py` and `test_parity.py`, and their results in transformers.

`python tests/make_parity.py` (with torch) writes `data/parity.npz`, which replaces transformers if torch is
not installed. The weights are not stored, because a seed determines them.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "data" / "parity.npz"
NEW = 16  # greedy tokens
BASE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# With original_max_position_embeddings 64, 1 of the 8 frequencies is unchanged, 2 are blended, 5 divided.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2_tied": BASE
    | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6, "use_sliding_window": False},
    "qwen2_untied": BASE
    | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32, "rope_scaling": None},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16, "attention_bias": False, "rope_theta": 1e6},
    "llama3": BASE
    | {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": LLAMA3 | {"rope_theta": 500.0},
        "rope_theta": None,
    },
    "smollm2": BASE
    | {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    # Layers 0 and 2 have windows of three tokens, shorter than a prompt or a response. Layer 1 has none.
    "gemma3": BASE
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 9,
        "tie_word_embeddings": True,
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 50.0,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Questions × samples with left-padded prompts, as in `decoder.py`."""

    prompts: np.ndarray  # int32 [Q, P]
    mask: np.ndarray  # bool [Q, P]
    tokens: np.ndarray  # int32 [Q, G, R]


def case() -> Case:
    draw = np.random.RandomState(7)
    lengths = np.array([7, 4, 1])
    prompts = draw.randint(1, 61, (3, 7)).astype(np.int32)
    mask = np.arange(7) >= 7 - lengths[:, None]
    return Case(np.where(mask, prompts, 0), mask, draw.randint(1, 61, (3, 2, 5)).astype(np.int32))


def weights(config: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Return a checkpoint with Hugging Face's names. No norm is near 1 and no bias near 0, so that a missing one
    is visible.
    """
    c, draw = config, np.random.RandomState(3)  # NEP 19 freezes this stream; default_rng's may change
    e, f, heads, kv = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
    )
    d = c.get("head_dim") or e // heads
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], e), "model.norm.weight": (e,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], e)
    for i in range(c["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (e,), "post_attention_layernorm.weight": (e,)}
        layer |= {"self_attn.q_proj.weight": (heads * d, e), "self_attn.o_proj.weight": (e, heads * d)}
        layer |= {"self_attn.k_proj.weight": (kv * d, e), "self_attn.v_proj.weight": (kv * d, e)}
        layer |= {
            "mlp.gate_proj.weight": (f, e),
            "mlp.up_proj.weight": (f, e),
            "mlp.down_proj.weight": (e, f),
        }
        if c["model_type"] == "qwen2":
            layer |= {f"self_attn.{x}_proj.bias": (n * d,) for x, n in (("q", heads), ("k", kv), ("v", kv))}
        if c["model_type"] == "gemma3_text":
            layer |= {f"{place}_feedforward_layernorm.weight": (e,) for place in ("pre", "post")}
        if c["model_type"] in ("qwen3", "gemma3_text"):
            layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}

    def centre(name):
        """Gemma's norms multiply by 1 + weight. Without large post-norms its embedding would dominate."""
        if "norm" not in name or c["model_type"] != "gemma3_text":
            return float("norm" in name)
        return 3.0 if "post_" in name else 0.0

    def one(name, shape):
        noise = draw.uniform(-1, 1, shape)
        scale = 0.5 if len(shape) == 1 else 2.5 / shape[1] ** 0.5
        return (centre(name) + scale * noise).astype(dtype)

    return {name: one(name, shape) for name, shape in shapes.items()}


def write(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Write a Hugging Face directory with safetensors."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None or k == "rope_scaling"})
    )
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def reference(directory: Path) -> dict[str, np.ndarray]:
    """Compute with transformers in float32: logits [Q, G, P + R, V] of rows prompt | response (0 on padding),
    and greedy tokens [Q, NEW].
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    c = case()
    groups = c.tokens.shape[1]
    rows = np.concatenate([np.repeat(c.prompts[:, None], groups, 1), c.tokens], -1).reshape(
        -1, c.prompts.shape[1] + c.tokens.shape[2]
    )
    mask = np.concatenate([np.repeat(c.mask[:, None], groups, 1), np.ones_like(c.tokens, bool)], -1).reshape(
        rows.shape
    )
    as_torch = [
        torch.tensor(x.astype(np.int64))
        for x in (rows, mask, np.maximum(mask.cumsum(1) - 1, 0), c.prompts, c.mask)
    ]
    with torch.no_grad():
        out = model(
            **dict(zip(("input_ids", "attention_mask", "position_ids"), as_torch[:3], strict=True))
        ).logits
        grown = model.generate(
            as_torch[3], attention_mask=as_torch[4], max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    logits = np.where(mask[..., None], out.numpy(), 0).reshape(*c.tokens.shape[:2], *out.shape[1:])
    return {"logits": logits, "greedy": grown[:, c.prompts.shape[1] :].numpy().astype(np.int32)}


if __name__ == "__main__":
    import tempfile

    golden = {}
    for name, config in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            result = reference(write(Path(directory), config, weights(config)))
        print(
            name,
            "logits within ±",
            np.abs(result["logits"]).max(),
            "different greedy tokens:",
            len(np.unique(result["greedy"])),
        )
        golden |= {f"{name}.{key}": value for key, value in result.items()}
    np.savez_compressed(GOLDEN, **golden)

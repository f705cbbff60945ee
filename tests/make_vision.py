"""The tiny vision-language models of `test_vision.py`, and their results in transformers.

`python tests/make_vision.py` (with torch) writes `data/vision.npz`, which replaces transformers if torch is
not installed. The weights are not stored, because a seed determines them.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from byte_tokenizer import byte_tokenizer
from make_parity import write
from PIL import Image

from medrlvr_jax.model import weights as hf
from medrlvr_jax.model.families import read_config

GOLDEN = Path(__file__).parent / "data" / "vision.npz"
NEW = 16  # greedy tokens
TOP = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # the published files have the decoder's settings here
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
# the fields that Qwen3-VL's published files have in a section for the decoder
DECODER = [name for name in TOP if name != "tie_word_embeddings" and not name.endswith("token_id")]
PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4}
CONFIGS = {
    "qwen2_5_vl": TOP
    | {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "vision_config": PATCHES
        | {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 100,
            "out_hidden_size": 48,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "hidden_act": "silu",
        },
    },
    "qwen2_vl": TOP
    | {
        "model_type": "qwen2_vl",
        "vision_config": PATCHES
        | {"depth": 3, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 48, "hidden_act": "quick_gelu"},
    },
    "qwen3_vl": {name: value for name, value in TOP.items() if name not in DECODER}
    | {
        "model_type": "qwen3_vl",
        "text_config": {name: TOP[name] for name in DECODER}
        | {"num_hidden_layers": 3, "head_dim": 16, "model_type": "qwen3_vl_text"}
        | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        "vision_config": PATCHES
        | {"depth": 4, "hidden_size": 64, "intermediate_size": 100, "out_hidden_size": 48, "patch_size": 16}
        | {"num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]},
    },
}
# Height and width of each question's images: two images; more rows than columns; padding; no image.
SIZES = [[(120, 260), (64, 64)], [(333, 190)], [(29, 200)], []]
LIMIT = 28 * 28 * 60  # pixels
PIXELS = {"qwen3_vl": {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}


def pictures() -> list[list[Image.Image]]:
    draw = np.random.RandomState(5)
    one = lambda size: Image.fromarray(draw.randint(0, 256, (*size, 3)).astype(np.uint8))
    return [[one(size) for size in sizes] for sizes in SIZES]


def rows(tokens: list[list[int]]) -> list[list[int]]:
    """Return the tokens of the questions. `tokens`: the number of image tokens of each image."""
    draw = np.random.RandomState(6)
    out = []
    for of_question in tokens:
        row = draw.randint(1, 90, 3).tolist()
        for n in of_question:
            row += [92] + [90] * n + [93] + draw.randint(1, 90, 2).tolist()
        out.append(row)
    return out


def weights(directory: Path) -> dict[str, np.ndarray]:
    """Return a checkpoint for the config.json in a directory. With transformers' initial values attention is
    almost uniform, and its faults would be invisible.
    """
    cfg = read_config(directory)
    draw, out = np.random.RandomState(3), {}
    for name, shape in sorted((name, source.shape) for name, source in hf.sources(cfg).items()):
        noise = draw.standard_normal(shape)
        scaled = noise * 2.5 * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.5 + 0.2 * noise
        out[hf.published_name(name, cfg)] = scaled.astype(np.float32)
    return out


def make(directory: Path, kind: str, **changes: Any) -> Path:
    """Write a directory with the model. `changes`: fields of its config.json."""
    config = CONFIGS[kind] | changes
    write(directory, config, {})
    pixels = {"size": {"shortest_edge": 56 * 56, "longest_edge": LIMIT}} | PIXELS.get(kind, {})
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    return write(directory, config, weights(directory))


def make_run(root: Path, questions: int = 16, **changes: Any) -> dict[str, Any]:
    """Write a tiny vision-language model with a byte tokenizer, and `data.jsonl` with questions with 0, 1 or 2
    images (every fourth has none). Return the settings `model` and `data` of a run on them. `changes`: fields
    of the model's config.json.
    """
    ids = {"image_token_id": 259, "vision_start_token_id": 258, "vision_end_token_id": 260}
    model = make(root / "model", "qwen2_5_vl", vocab_size=264, **ids, eos_token_id=257, **changes)
    hf = byte_tokenizer().hf
    hf.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|image|>", "<|end|>"]})
    hf.save_pretrained(model)
    draw, rows = np.random.RandomState(0), []
    for i in range(questions):
        row = {"question": f"Which {i}?", "options": ["red", "blue"], "answer": "AB"[i % 2], "id": f"q{i}"}
        names = [f"{i}-{k}.png" for k in range(i % 4 if i % 4 < 3 else 1)]
        for name in names:
            size = (28 * draw.randint(2, 6), 28 * draw.randint(2, 6), 3)
            Image.fromarray(draw.randint(0, 256, size).astype(np.uint8)).save(root / name)
        rows.append(row | {"images": names})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": {"path": str(model)}, "data": {"path": str(root / "data.jsonl")}}


def in_torch(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a directory in transformers, and its inputs for `pictures` and `rows`."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, problems = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(problems.values()), problems
    process = Qwen2VLImageProcessorPil(**json.loads((directory / "preprocessor_config.json").read_text()))
    made = process(images=list(chain.from_iterable(pictures())), return_tensors="pt")
    counts, tokens = iter((made["image_grid_thw"].prod(1) // 4).tolist()), []
    for of_question in SIZES:
        tokens.append([next(counts) for _ in of_question])
    ids, mask = pad(rows(tokens))
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == 90).long()}
    return model, inputs | {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}


def reference(directory: Path) -> dict[str, np.ndarray]:
    """Compute with transformers in float32: the features of all images in order; positions [Q, P, 3] and the
    next one [Q]; logits [Q, P, V], 0 on padding; greedy tokens [Q, NEW].
    """
    import torch

    model, inputs = in_torch(directory)
    ids, mask, grids = (inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw"))
    with torch.no_grad():
        seen = model.model.get_image_features(inputs["pixel_values"], grids)
        parts = [seen.pooler_output, *getattr(seen, "deepstack_features", [])]
        features = torch.cat([torch.cat(list(part)) for part in parts], -1)
        positions, deltas = model.model.get_rope_index(
            ids, inputs["mm_token_type_ids"], grids, attention_mask=mask
        )
        logits = model(**inputs).logits
        grown = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return {
        "features": features.numpy(),
        "positions": np.moveaxis(positions.numpy(), 0, -1).astype(np.int32),
        "next": (mask.sum(1) + deltas[:, 0]).numpy().astype(np.int32),
        "logits": np.where(mask[..., None], logits.numpy(), 0),
        "greedy": grown[:, ids.shape[1] :].numpy().astype(np.int32),
    }


def tower_gradients(directory: Path) -> dict[str, np.ndarray]:
    """Compute with transformers the gradient of `loss_weights`' loss, by the tower's published names."""
    import torch

    model, inputs = in_torch(directory)
    logits = model(**inputs).logits
    (
        logits * torch.tensor(loss_weights(tuple(logits.shape), inputs["attention_mask"].numpy()))
    ).sum().backward()
    named = model.model.visual.named_parameters()
    return {f"visual.{name}": p.grad.numpy() for name, p in named}


def loss_weights(shape: tuple[int, ...], mask: np.ndarray) -> np.ndarray:
    """Return random weights [Q, P, V], 0 on padding. The loss is the weighted sum of the logits."""
    weights = np.random.RandomState(7).standard_normal(shape).astype(np.float32)
    return np.where(mask[..., None] > 0, weights, 0)


def pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return left-padded tokens and their mask [Q, P]."""
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    return ids, np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])


if __name__ == "__main__":
    import tempfile

    golden = {}
    for kind in CONFIGS:
        with tempfile.TemporaryDirectory() as directory:
            result = reference(make(Path(directory), kind))
        print(kind, {key: (value.shape, float(np.abs(value).max())) for key, value in result.items()})
        print(result["greedy"])
        golden |= {f"{kind}.{key}": value for key, value in result.items()}
    np.savez_compressed(GOLDEN, **golden)

"""Our vision towers compute what transformers computes, and so does the decoder with images in its prompt.

Against transformers itself where torch is installed, else (and as well) against its stored numbers. When a
change of transformers is meant: `python tests/make_vision.py`.
"""

import json
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from make_vision import (
    CONFIGS,
    GOLDEN,
    NEW,
    SIZES,
    loss_weights,
    make,
    pad,
    pictures,
    reference,
    rows,
    tower_gradients,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from medrlvr_jax import sharding
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.data import patches
from medrlvr_jax.model import decoder, export, families, lora, scoring, spec, vision
from medrlvr_jax.model import weights as hf
from medrlvr_jax.model.rope import rope_axes
from medrlvr_jax.plan import flops
from medrlvr_jax.rollout import decode
from medrlvr_jax.types import Prompts

TOLERANCE = 1e-5  # of the largest value


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return cache(lambda kind: make(tmp_path_factory.mktemp(kind), kind))


@cache
def load(path):
    """Configuration, tower and decoder of a directory."""
    cfg = families.read_config(path)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    whole = spec.abstract(cfg.run_with(tower="train"))
    params = hf.load_params(path, cfg, sharding.shardings(whole, mesh, sharding.TRAIN), "float32")
    return cfg, params["vision"], {name: p for name, p in params.items() if name != "vision"}


def arrange(of_questions, windows, cfg):
    return patches.arrange_windows(
        [[patches.cut_patches(i, cfg) for i in row] for row in of_questions], windows, cfg
    )


def grids(cfg):
    return [tuple(patches.cut_patches(image, cfg.vision)[1] for image in row) for row in pictures()]


def features(cfg, tower):
    """Of each image, one after another, as `reference` has them; and of each question, by its slots."""
    of_questions = grids(cfg)
    windows = max(patches.window_count(row, cfg.vision) for row in of_questions)
    arranged = arrange(pictures(), windows, cfg.vision)
    seen = jax.jit(lambda p, x: vision.tower(p, cfg.vision, x, jnp.float32))(tower, arranged)
    assert np.isfinite(seen).all()
    slots = (patches.token_slots(row, cfg.vision) for row in of_questions)
    return np.concatenate([np.asarray(row)[place] for row, place in zip(seen, slots, strict=True)]), seen


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def prompts_of(cfg, seen):
    of_questions = grids(cfg)
    tokens = rows([[grid.tokens for grid in row] for row in of_questions])
    ids, mask = pad(tokens)
    placed = patches.vision_inputs(tokens, of_questions, seen, ids.shape[1], cfg.vision)
    return Prompts(ids.astype(np.int32), mask.astype(bool), np.arange(len(ids), dtype=np.uint32), placed)


@cache
def ours(path):
    """What `reference` computes of transformers."""
    cfg, tower, params = load(path)
    flat, seen = features(cfg, tower)
    prompts = prompts_of(cfg, seen)
    logits = jax.jit(lambda p: decoder.logits(p, cfg, decoder.forward(p, cfg, prompts)[0]))(params)
    return {
        "features": flat,
        "positions": prompts.positions,
        "next": prompts.next_position,
        "logits": np.where(prompts.mask[..., None], logits, 0),
        "greedy": greedy(params, cfg, prompts),
    }


def greedy(params, cfg, prompts):
    """Prefill, then a token at a time; the trainer's pass over the result agrees with what chose it."""
    n, width = prompts.tokens.shape
    hidden, prompt_caches = jax.jit(partial(decode.prefill, cfg=cfg))(params, prompts=prompts)
    weights, caches = decode.prepare(params, cfg, width + NEW), decode.empty_caches(cfg, n, 1, NEW)

    @jax.jit
    def step(weights, tokens, caches, t):
        states, grown = decode.decode_step(weights, cfg, tokens, prompts, prompt_caches, caches, t)
        return decoder.logits(weights.params, cfg, states), grown

    logits = [decoder.logits(params, cfg, hidden)[:, None]]
    for t in range(NEW - 1):
        new, caches = step(weights, jnp.argmax(logits[-1], -1), caches, t)
        logits.append(new)
    tokens = np.asarray(jnp.argmax(jnp.stack(logits, 2), -1))
    states = jax.jit(lambda p: scoring.hidden_states(p, cfg, prompts, tokens))(params)
    close(np.asarray(jnp.stack(logits, 2)), np.asarray(decoder.logits(params, cfg, states)))
    return tokens.reshape(n, NEW)


def agree(ours, theirs):
    for name in ("positions", "next", "greedy"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in ("features", "logits"):
        close(ours[name], theirs[name])


@pytest.mark.parametrize("kind", CONFIGS)
def test_as_transformers_was(kind, directory):
    golden = np.load(GOLDEN)
    agree(ours(directory(kind)), {name: golden[f"{kind}.{name}"] for name in ours(directory(kind))})


@pytest.mark.parametrize("kind", CONFIGS)
def test_as_transformers_is(kind, directory):
    pytest.importorskip("torch")
    agree(ours(directory(kind)), reference(directory(kind)))


def test_gradients_of_the_tower_are_those_of_transformers(directory):
    """Through the decoder, by the tower that a trainer's pass asks where the prompts have no features."""
    pytest.importorskip("torch")
    cfg, tower, params = load(directory("qwen2_5_vl"))
    windows = max(patches.window_count(row, cfg.vision) for row in grids(cfg))
    prompts = prompts_of(cfg, None).with_vision(images=arrange(pictures(), windows, cfg.vision))
    weights = loss_weights((*prompts.mask.shape, cfg.vocab), prompts.mask)

    @jax.jit
    @jax.grad
    def gradients(tower):
        seen = prompts.with_vision(features=vision.see({"vision": tower}, cfg, prompts.vision.images))
        return (decoder.logits(params, cfg, decoder.forward(params, cfg, seen)[0]) * weights).sum()

    grads, theirs = lora.flat({"vision": gradients(tower)}), tower_gradients(directory("qwen2_5_vl"))
    sources = {name: s for name, s in hf.sources(cfg).items() if name.startswith("visual.")}
    assert sources.keys() == theirs.keys()
    for name, source in sources.items():
        ours = grads[source.path] if source.layer is None else grads[source.path][source.layer]
        order = [source.axes.index(axis) for axis in source.tensor_axes]
        close(np.asarray(ours).transpose(order).reshape(source.shape), theirs[name])


FAULTS = {
    "windows in all layers": lambda v: replace(v, full_layers=()),
    "images in all layers": lambda v: replace(v, full_layers=(0, 1, 2, 3)),
    "other layers": lambda v: replace(v, full_layers=(0, 2)),
    "smaller windows": lambda v: replace(v, window=4),
    "another mean": lambda v: replace(v, mean=(0.5, 0.5, 0.5)),
}


FAULTS3 = {
    "from other layers": lambda v: replace(v, deepstack=(1, 2)),
    "another activation": lambda v: replace(v, kind="qwen2_vl"),
}


@pytest.mark.parametrize(
    ("kind", "fault"), [*(("qwen2_5_vl", f) for f in FAULTS), *(("qwen3_vl", f) for f in FAULTS3)]
)
def test_a_fault_would_show(kind, fault, directory):
    cfg, tower, _ = load(directory(kind))
    wrong = features(replace(cfg, vision=(FAULTS | FAULTS3)[fault](cfg.vision)), tower)[0]
    assert np.abs(wrong - np.load(GOLDEN)[f"{kind}.features"]).max() > 0.05


DECODER_FAULTS = {
    "rows and columns swapped": lambda c, p: (replace(c, rope_axes=tuple(-a % 3 for a in c.rope_axes)), p),
    "text's positions": lambda c, p: (replace(c, rope_axes=(0,) * len(c.rope_axes)), p),
    "features in another order": lambda c, p: (
        c,
        replace(p, vision=replace(p.vision, slots=np.where(p.vision.slots < 0, -1, p.vision.slots ^ 1))),
    ),
    "one column to the left": lambda c, p: (
        c,
        replace(p, vision=replace(p.vision, slots=np.roll(p.vision.slots, -1, 1))),
    ),
}


def without_deepstack(cfg, prompts):
    seen = prompts.vision.features
    seen = np.where(np.arange(seen.shape[-1]) < cfg.embed, seen, 0)
    return cfg, replace(prompts, vision=replace(prompts.vision, features=seen))


DECODER_FAULTS3 = {
    "not interleaved": lambda c, p: (replace(c, rope_axes=rope_axes((4, 2, 2))), p),
    "nothing after the first layers": without_deepstack,
}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [*(("qwen2_vl", f) for f in DECODER_FAULTS), *(("qwen3_vl", f) for f in DECODER_FAULTS3)],
)
def test_a_fault_of_the_decoder_would_show(kind, fault, directory):
    cfg, tower, params = load(directory(kind))
    faults = DECODER_FAULTS | DECODER_FAULTS3
    cfg, prompts = faults[fault](cfg, prompts_of(cfg, features(cfg, tower)[1]))
    wrong = decoder.logits(params, cfg, decoder.forward(params, cfg, prompts)[0])
    right = np.load(GOLDEN)[f"{kind}.logits"]
    assert np.abs(np.where(prompts.mask[..., None], wrong, 0) - right).max() > 0.05


def published(kind, ffn, tied, vocab, **decoder):
    """config.json as published: the decoder's settings beside the tower's, or of Qwen3-VL in a section."""
    tower = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14}
    tower |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": decoder["hidden_size"]}
    else:
        tower |= {"hidden_size": 1280, "intermediate_size": 3420, "hidden_act": "silu", "window_size": 112}
        tower |= {"out_hidden_size": decoder["hidden_size"], "fullatt_block_indexes": [7, 15, 23, 31]}
    ids = {"image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
    more = {"intermediate_size": ffn, "tie_word_embeddings": tied, "vocab_size": vocab}
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    rope |= {"rms_norm_eps": 1e-6, "use_sliding_window": False, "hidden_act": "silu"}
    if kind == "qwen3_vl":
        tower = {"depth": 24, "num_heads": 16, "hidden_size": 1024, "intermediate_size": 4096}
        tower |= {"hidden_act": "gelu_pytorch_tanh", "out_hidden_size": decoder["hidden_size"]}
        tower |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}
        section = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}
        text = decoder | more | rope | {"rope_theta": 5e6, "rope_scaling": section, "head_dim": 128}
        top = {"model_type": kind, "tie_word_embeddings": tied, "vision_config": tower, "text_config": text}
        return top | ids
    return {"model_type": kind, "vision_config": tower} | ids | more | rope | decoder


def shape(width, layers, heads, kv_heads):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (width, layers, heads, kv_heads), strict=True))


SIZES_OF = {  # parameters of the tower and of the decoder
    "Qwen/Qwen3-VL-2B": ("qwen3_vl", 6144, True, 151936, shape(2048, 28, 16, 8), 406_957_056, 1_720_574_976),
    "Qwen/Qwen3-VL-4B": ("qwen3_vl", 9728, True, 151936, shape(2560, 36, 32, 8), 415_347_712, 4_022_468_096),
    "Qwen/Qwen2-VL-2B": ("qwen2_vl", 8960, True, 151936, shape(1536, 28, 12, 2), 665_271_296, 1_543_714_304),
    "Qwen/Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        11008,
        True,
        151936,
        shape(2048, 36, 16, 2),
        668_684_288,
        3_085_938_688,
    ),
    "Qwen/Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        18944,
        False,
        152064,
        shape(3584, 28, 28, 4),
        676_550_144,
        7_615_616_512,
    ),
}


@pytest.mark.parametrize("name", SIZES_OF)
def test_published_sizes(name, tmp_path):
    *settings, decoder_shape, tower, text = SIZES_OF[name]
    (tmp_path / "config.json").write_text(json.dumps(published(*settings, **decoder_shape)))
    cfg = families.read_config(tmp_path)
    assert cfg == families.known(f"{name}-Instruct")
    count = lambda tree: sum(np.prod(x.shape) for x in jax.tree.leaves(nn.meta.unbox(tree)))
    whole = spec.abstract(cfg.run_with(tower="train"))
    assert (count(whole["vision"]), count(spec.abstract(cfg))) == (tower, text)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_exported_is_the_same_model(kind, directory, tmp_path):
    """Ours is read by transformers, and what transformers saves, under its new names, by us."""
    path, out = directory(kind), tmp_path / "ours"
    cfg, tower, params = load(path)
    export.save_params(params, cfg, path, out)
    with (
        safe_open(out / "model.safetensors", framework="np") as saved,
        safe_open(path / "model.safetensors", framework="np") as source,
    ):
        assert set(saved.keys()) == set(source.keys())
        assert all(np.array_equal(saved.get_tensor(n), source.get_tensor(n)) for n in source.keys())
    assert (out / "preprocessor_config.json").read_bytes() == (path / "preprocessor_config.json").read_bytes()
    moved = jax.tree.map(lambda x: x * 1.5, tower)
    export.save_params(params | {"vision": moved}, cfg.run_with(tower="train"), path, tmp_path / "moved")
    for one, other in zip(*map(jax.tree.leaves, (load(tmp_path / "moved")[1], moved)), strict=True):
        np.testing.assert_array_equal(one, other)
    pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(out)
    model.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    old = r"^model\.(?!language_model|visual)"  # Qwen3-VL's are new
    new = {re.sub(old, "model.language_model.", name): t for name, t in saved.items()}
    save_file(
        {re.sub("^visual", "model.visual", name): t for name, t in new.items()},
        tmp_path / "theirs" / "model.safetensors",
    )
    again = load(tmp_path / "theirs")
    assert replace(again[0], vision=cfg.vision) == cfg
    for one, other in zip(jax.tree.leaves(again[1:]), jax.tree.leaves(load(path)[1:]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_of_the_tower_matters(kind, directory):
    """So a forgotten one would fail the tests above."""
    cfg, tower, _ = load(directory(kind))
    arranged = arrange([pictures()[2]], 4, cfg.vision)
    see = jax.jit(lambda p: vision.tower(p, cfg.vision, arranged, jnp.float32))
    usual, draw = np.asarray(see(tower)), np.random.RandomState(0)
    for name in [n for n, row in spec.TOWER.items() if row.exists(cfg.vision)]:
        [*group, _] = spec.path_of(name, spec.TOWER[name])
        branch = tower[group[0]] if group else tower
        changed = branch | {name: branch[name] * draw.uniform(0.5, 1.5, branch[name].shape)}
        moved = np.abs(np.asarray(see(tower | {group[0]: changed} if group else changed)) - usual)
        assert moved.max() > 1e-2, (name, moved.max())


@pytest.mark.parametrize("kind", CONFIGS)
def test_products_are_counted_by_formula(kind, directory):
    """What a plan counts of the tower are the products of its program."""
    cfg, tower, _ = load(directory(kind))
    arranged = arrange([pictures()[2]] * 2, 4, cfg.vision)
    see = lambda p: vision.see({"vision": p}, cfg, arranged)
    assert flops.traced_flops(jax.make_jaxpr(see)(tower)) == flops.tower_flops(cfg, arranged)


def test_another_image_changes_nothing(directory):
    """An image's features do not depend on what else is in the question, in the batch or in empty slots."""
    cfg, tower, _ = load(directory("qwen2_5_vl"))
    see = jax.jit(lambda x: vision.tower(tower, cfg.vision, x, jnp.float32))
    [both, *_] = pictures()
    together = np.asarray(see(arrange([both], 8, cfg.vision)))[0]
    alone = np.asarray(see(arrange([both[1:]], 8, cfg.vision)))[0]
    slots = patches.token_slots(grids(cfg)[0], cfg.vision)
    n = patches.cut_patches(both[1], cfg.vision)[1].tokens
    close(alone[:n], together[slots[-n:]])
    assert len(SIZES[0]) == 2

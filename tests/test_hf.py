"""Directories in and out: what is refused and in which words, what a load costs, and that nothing is lost on
the way.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import make_vision
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from make_parity import BASE, FAMILIES, weights, write
from safetensors.numpy import load_file, save_file
from test_parity import load

from medrlvr_jax.config.schema import LoRAConfig, MeshConfig
from medrlvr_jax.data.tokenizer import load_tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import decoder, export, families, lora, spec
from medrlvr_jax.model import weights as hf
from medrlvr_jax.model.architecture import RopeScaling, Window
from medrlvr_jax.model.families import read_config
from medrlvr_jax.types import Prompts

QWEN, LLAMA3, GEMMA3 = FAMILIES["qwen2_untied"], FAMILIES["llama3"], FAMILIES["gemma3"]


@pytest.fixture
def refused(tmp_path):
    """Load what is written, which must fail in words that hold all of these."""

    def check(config, tensors, *words, **replaced):
        path = tmp_path if tensors is None else write(tmp_path, config, tensors)
        with pytest.raises(ConfigError) as e:
            load(path, dataclasses.replace(read_config(path), **replaced))
        assert all(word in str(e.value) for word in words), str(e.value)

    return check


def config_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


def test_config_in_our_words(tmp_path):
    cfg = config_of(tmp_path, FAMILIES["qwen2_tied"])
    assert (cfg.vocab, cfg.embed, cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.ffn) == (
        61,
        48,
        2,
        4,
        2,
        12,
        80,
    )
    assert (cfg.rope_theta, cfg.norm_eps, cfg.tied, cfg.qkv_bias, cfg.qk_norm, cfg.rope_scaling) == (
        1e6,
        1e-6,
        True,
        True,
        False,
        None,
    )
    cfg = config_of(tmp_path, FAMILIES["qwen3"])
    assert (cfg.head_dim, cfg.qkv_bias, cfg.qk_norm, cfg.tied) == (16, False, True, False)


def test_both_ways_of_writing_rope(tmp_path):
    new = config_of(tmp_path, LLAMA3)
    stretch = {k: v for k, v in LLAMA3["rope_parameters"].items() if k != "rope_theta"}
    old = {k: v for k, v in LLAMA3.items() if k != "rope_parameters"} | {"rope_theta": 500.0}
    assert config_of(tmp_path, old | {"rope_scaling": stretch}) == new
    older = {"type" if k == "rope_type" else k: v for k, v in stretch.items()}
    assert config_of(tmp_path, old | {"rope_scaling": older}) == new
    assert tuple(new.rope_scaling or ()) == (8.0, 1.0, 4.0, 64)


def test_all_ways_of_writing_gemma3(tmp_path):
    """Those of transformers 4 and 5, and a multimodal model's, whose decoder's settings are a section."""
    old = config_of(tmp_path, GEMMA3)
    assert old.window == Window(3, (0, 2), 50.0) and old.rope_scaling == RopeScaling(8.0)
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    written = ("sliding_window_pattern", "rope_local_base_freq", "rope_theta", "rope_scaling")
    new = {k: v for k, v in GEMMA3.items() if k not in written} | kinds | {"rope_parameters": ropes}
    assert config_of(tmp_path, new) == old
    whole = config_of(tmp_path, {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {}})
    more = {"file_prefixes": (("model.", "language_model.model."),)}
    assert whole == dataclasses.replace(old, **more, unread=("vision_tower.", "multi_modal_projector."))
    short = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    short |= {"num_hidden_layers": 34, "sliding_window": 1024}  # what the published file of the 4B model has
    short |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    assert config_of(tmp_path, short) == dataclasses.replace(
        families.known("google/gemma-3-4b-it"), file_prefixes=(), unread=()
    )


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (QWEN, {"model_type": "mistral"}, "model_type: 'mistral'"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        (QWEN, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type: 'yarn'"),
        (QWEN, {"rope_scaling": {"rope_type": "linear"}}, "factor: required"),
        (QWEN, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type: 'dynamic'"),
        (
            QWEN,
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: 0.5",
        ),
        (QWEN, {"partial_rotary_factor": 0.25}, "partial_rotary_factor: 0.25"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window: True"),
        (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_attention'"),
        (
            QWEN,
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: {'quant_method': 'gptq'}",
        ),
        (LLAMA3, {"attention_bias": True}, "attention_bias: True"),
        (FAMILIES["qwen3"], {"attention_bias": True}, "attention_bias: True"),
        (LLAMA3, {"mlp_bias": True}, "mlp_bias: True"),
        (LLAMA3, {"rope_interleaved": True}, "rope_interleaved: True"),
        (
            LLAMA3,
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "low_freq_factor: required",
        ),
        (FAMILIES["qwen3"], {"head_dim": None}, "head_dim: required"),
        (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation: 'gelu'"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        (GEMMA3, {"layer_types": ["chunked_attention"]}, "layer_types: 'chunked_attention'"),
        (
            GEMMA3,
            {"layer_types": ["full_attention"] * 2},
            "layer_types: '2 layers': this decoder computes only 3",
        ),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention.rope_type: 'linear'",
        ),
        *(
            (QWEN, {key: None}, f"{key}: required")
            for key in ("model_type", "vocab_size", "hidden_act", "rope_theta", "num_key_value_heads")
        ),
    ],
    ids=lambda x: "_".join(x) if isinstance(x, dict) and len(x) == 1 else "",
)
def test_config_refusals(tmp_path, base, change, words):
    config_of(tmp_path, base)
    with pytest.raises(ConfigError) as e:
        config_of(tmp_path, base | change)
    assert words in str(e.value) and "config.json" in str(e.value)


def test_resolve(tmp_path, monkeypatch):
    assert families.resolve("embedded").name == "embedded"
    assert families.resolve(tmp_path) == tmp_path
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for gone in ("/nowhere/model", "./model", "../model", "~/no-such-model", "a/b/c", "models/typo"):
        with pytest.raises(ConfigError, match=f"{gone}: no such directory"):
            families.resolve(gone)
    asked = []
    monkeypatch.setattr(
        families,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path),
    )
    assert families.resolve("Qwen/Qwen2.5-3B") == tmp_path
    assert (
        asked[0][0] == "Qwen/Qwen2.5-3B"
        and "*.json" in asked[0][1]
        and not any("bin" in pattern for pattern in asked[0][1])
    )

    def fail(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(families, "snapshot_download", fail)
    with pytest.raises(
        ConfigError, match=r"Qwen/Qwen2\.5-3B: cannot be read: offline; there is no such directory"
    ):
        families.resolve("Qwen/Qwen2.5-3B")


def test_loads_every_number(tmp_path):
    """Against a plain transposition of the whole file, and in blocks so small that every loop turns."""
    tensors, cfg = weights(QWEN), read_config(write(tmp_path, QWEN, weights(QWEN)))
    params = load(tmp_path, cfg)
    q = tensors["model.layers.1.self_attn.q_proj.weight"].T.reshape(48, 4, 12)
    o = tensors["model.layers.1.self_attn.o_proj.weight"].T.reshape(4, 12, 48)
    np.testing.assert_array_equal(params["layers"]["q"][1], q)
    np.testing.assert_array_equal(params["layers"]["o"][1], o)
    np.testing.assert_array_equal(
        params["layers"]["k_bias"][0], tensors["model.layers.0.self_attn.k_proj.bias"].reshape(2, 12)
    )
    np.testing.assert_array_equal(
        params["layers"]["down"][0], tensors["model.layers.0.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_sharded_load_is_the_same(tmp_path, block, monkeypatch):
    write(tmp_path, QWEN, weights(QWEN))
    cfg = read_config(tmp_path)
    whole = flatten_dict(load(tmp_path, cfg))
    monkeypatch.setattr(hf, "BLOCK", block)
    sharded = flatten_dict(load(tmp_path, cfg, mesh=MeshConfig(data=2, fsdp=2, tensor=2), devices=8))
    assert sharded["layers", "q"].addressable_shards[0].data.shape == (2, 24, 2, 12)
    for key, value in whole.items():
        np.testing.assert_array_equal(value, sharded[key], err_msg=str(key))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, wanted):
    tensors = weights(QWEN, jax.numpy.dtype(stored))
    write(tmp_path, QWEN, tensors)
    params = load(tmp_path, read_config(tmp_path), wanted)
    assert {str(p.dtype) for p in jax.tree.leaves(params)} == {wanted}
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T.astype(wanted))


def test_critic(tmp_path):
    """The body of the policy, no output matrix, a value head that starts at zero; and it is not exported."""
    write(tmp_path / "policy", QWEN, weights(QWEN))
    cfg = read_config(tmp_path / "policy").run_with(value_head=True)
    critic = load(tmp_path / "policy", cfg)
    policy = load(tmp_path / "policy", read_config(tmp_path / "policy"))
    assert "head" not in critic and critic["value"].shape == (49,) and not critic["value"].any()
    assert jax.tree.all(jax.tree.map(np.array_equal, critic["layers"], policy["layers"]))
    with pytest.raises(ConfigError, match="a critic has no output matrix"):
        export.save_params(critic, cfg, tmp_path / "policy", tmp_path / "out")


def test_missing_and_superfluous_tensors(refused):
    tensors = weights(QWEN)
    bias = tensors.pop("model.layers.1.self_attn.k_proj.bias")
    tensors["score.weight"] = bias
    refused(
        QWEN,
        tensors,
        "model.layers.1.self_attn.k_proj.bias: missing; layers/k_bias[1] needs it, of shape (24,)",
    )
    refused(QWEN, tensors, "score.weight: of shape (24,); this model has no parameter for it")


def test_a_layer_too_many(refused):
    words = (
        "model.layers.1.mlp.down_proj.weight: of shape (48, 80); this model has no parameter for it",
        "and 4 more",
    )
    refused(QWEN | {"num_hidden_layers": 1}, weights(QWEN), *words)


def test_wrong_shape(refused):
    tensors = weights(QWEN)
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((79, 48), np.float32)
    refused(
        QWEN, tensors, "model.layers.0.mlp.gate_proj.weight: of shape (79, 48); layers/gate[0] needs (80, 48)"
    )


def test_a_tensor_that_two_parameters_take(refused, monkeypatch):
    monkeypatch.setitem(spec.PARAMETERS, "up", spec.PARAMETERS["gate"])
    refused(
        QWEN,
        weights(QWEN),
        "model.layers.0.mlp.gate_proj.weight: both layers/gate[0] and layers/up[0] use it",
    )


def test_set_twice_and_missing_shard(refused, tmp_path):
    tensors = weights(QWEN)
    write(tmp_path, QWEN, tensors)
    (tmp_path / "model.safetensors").unlink()
    index = {
        "weight_map": {name: "a.safetensors" for name in tensors} | {"model.norm.weight": "b.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, tmp_path / "a.safetensors")
    refused(QWEN, None, "b.safetensors: listed in model.safetensors.index.json but missing")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "b.safetensors")
    refused(QWEN, None, "model.norm.weight: both a.safetensors and b.safetensors have it")


def test_one_file_comes_before_shards_as_in_transformers(tmp_path):
    """Old shards beside a newer model.safetensors, or their index alone, are passed over; doctor says so."""
    tensors = weights(QWEN)
    cfg = read_config(write(tmp_path, QWEN, tensors))
    assert hf.ignored_files(tmp_path) == []
    old, names = {name: tensor + 1 for name, tensor in tensors.items()}, list(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(load(tmp_path, cfg)["embed"], tensors["model.embed_tokens.weight"])
    for file, part in shards.items():
        save_file({name: old[name] for name in part}, tmp_path / file)
    np.testing.assert_array_equal(load(tmp_path, cfg)["embed"], tensors["model.embed_tokens.weight"])
    assert hf.ignored_files(tmp_path) == [*shards, "model.safetensors.index.json"]
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(load(tmp_path, cfg)["embed"], old["model.embed_tokens.weight"])
    assert hf.ignored_files(tmp_path) == []


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"model.norm.weight": 1}}])
def test_an_index_without_its_map(refused, tmp_path, index):
    write(tmp_path, QWEN, {})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(QWEN, None, "model.safetensors.index.json: weight_map", "download the directory again")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b125\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><body>Not found</body></html>"


@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "git lfs pull"),
        (PAGE, "it is a web page"),
        ("", "the file is empty"),
        ("{broken", ""),
        ("[" * 20_000, ""),
        ('{"a": {}}', ""),
    ],
    ids=["pointer", "page", "empty", "broken", "nested", "foreign"],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, file, content, words):
    """Reading its header as a length, a git-LFS pointer was a MemoryError; a foreign tokenizer.json was a
    bare Exception.
    """
    shutil.copytree(families.resolve("embedded"), tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)

    def read():
        cfg = read_config(tmp_path)
        hf.check_weights(tmp_path, cfg)
        load_tokenizer(str(tmp_path))

    if content.startswith('{"a"') and file in ("tokenizer_config.json", "generation_config.json"):
        return read()  # what is not known there is passed over
    with pytest.raises(ConfigError) as e:
        read()
    assert file in str(e.value) and words in str(e.value) and str(tmp_path) in str(e.value), str(e.value)


def test_truncated_file(refused, tmp_path):
    path = write(tmp_path, QWEN, weights(QWEN)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(QWEN, None, "model.safetensors", "the download is incomplete")


def test_quantised_weights(refused):
    refused(
        QWEN, weights(QWEN) | {"model.norm.weight": np.ones(48, np.int8)}, "model.norm.weight: stored as I8"
    )


def test_pickles_and_nothing(refused, tmp_path):
    write(tmp_path, QWEN, weights(QWEN))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(
        QWEN,
        None,
        "only pytorch_model.bin",
        "AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)",
    )
    (tmp_path / "pytorch_model.bin").unlink()
    refused(QWEN, None, "no model.safetensors")


def test_tied_checkpoint_with_a_head(refused, tmp_path):
    """As transformers: a head that repeats the embedding is passed over; one that differs would untie the
    model.
    """
    tied = FAMILIES["qwen2_tied"]
    tensors = weights(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    load(write(tmp_path, tied, tensors), read_config(tmp_path))
    tensors["lm_head.weight"][60, 47] += 1
    refused(
        tied,
        tensors,
        "lm_head.weight: of shape (61, 48); tie_word_embeddings is true, but it differs from the embedding",
    )
    load(tmp_path, read_config(tmp_path).run_with(value_head=True))


def test_rotary_buffers_are_passed_over(refused, tmp_path):
    tensors = weights(QWEN) | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    load(write(tmp_path, QWEN, tensors), read_config(tmp_path))
    refused(
        QWEN,
        tensors | {"model.layers.1.rotary_emb.inv_freq": np.ones(6, np.float32)},
        "model.layers.1.rotary_emb.inv_freq",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_back_every_byte(family, tmp_path):
    tensors = weights(FAMILIES[family])
    source = write(tmp_path / "source", FAMILIES[family], tensors)
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text("{}")
    (source / "training_args.bin").write_text("")
    cfg = read_config(source)
    params = load(source, cfg, mesh=MeshConfig(fsdp=2, tensor=2), devices=4)
    export.save_params(params, cfg, source, tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(
        np.array_equal(back[name], tensors[name]) for name in tensors
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not (tmp_path / ".out.partial").exists()
    assert read_config(tmp_path / "out") == cfg
    assert jax.tree.all(jax.tree.map(np.array_equal, load(tmp_path / "out", cfg), params))
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export.save_params(params, cfg, source, tmp_path / "out")


def test_export_in_shards_and_another_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    source = write(tmp_path / "source", QWEN | {"torch_dtype": "float32"}, weights(QWEN))
    cfg = read_config(source)
    (tmp_path / ".out.partial").mkdir()  # left by a killed export
    (tmp_path / "out").mkdir()  # empty: may be filled
    export.save_params(load(source, cfg), cfg, source, tmp_path / "out", "bfloat16")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 35_000 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name: shard.name for shard in shards for name in load_file(shard)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(w.size for w in weights(QWEN).values()) * 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    expected = jax.tree.map(lambda p: p.astype("bfloat16"), load(source, cfg))
    assert jax.tree.all(jax.tree.map(np.array_equal, load(tmp_path / "out", cfg, "bfloat16"), expected))


def test_export_refuses_another_models_parameters(tmp_path):
    source = write(tmp_path / "source", QWEN, weights(QWEN))
    cfg = read_config(source)
    with pytest.raises(ConfigError, match="not this model's"):
        export.save_params(
            load(source, cfg), dataclasses.replace(cfg, qkv_bias=False), source, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3", "llama3", "gemma3"])
def test_transformers_loads_the_export(family, tmp_path):
    """The same logits to the last bit, with nothing missing and nothing left over."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = write(tmp_path / "source", FAMILIES[family], weights(FAMILIES[family]))
    cfg = read_config(source)
    export.save_params(load(source, cfg), cfg, source, tmp_path / "out")
    logits = []
    for path in (source, tmp_path / "out"):
        model, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and model.dtype == torch.float32
        with torch.no_grad():
            logits.append(model(torch.arange(1, 20)[None]).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_of_a_multimodal_gemma3(prefix, tmp_path):
    """Its decoder is read under both names, and exported together with the unchanged vision tower."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14} | sizes
    config = {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": tower}
    config |= {"mm_tokens_per_image": 1, "image_token_index": 60}
    config_of(tmp_path, config)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    drawn = load_file(tmp_path / "model.safetensors").items()
    rest = {name: tensor for name, tensor in drawn if "language_model" not in name}
    text = {prefix + name.removeprefix("model."): tensor for name, tensor in weights(GEMMA3).items()}
    source = write(tmp_path / "source", config, rest | text)
    cfg, tokens = read_config(source), np.arange(1, 20)[None]
    params = load(source, cfg)
    export.save_params(params, cfg, source, tmp_path / "out")
    model, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    state, _ = decoder.forward(params, cfg, Prompts(tokens, tokens > 0, np.zeros(1, np.uint32)))
    np.testing.assert_allclose(decoder.logits(params, cfg, state), theirs, atol=3e-5)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert rest and all(np.array_equal(back[n.removeprefix("model.")], tensor) for n, tensor in rest.items())


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 3, "top_k": 7}])
def test_an_export_stops_where_the_policy_stopped(generation, tmp_path):
    """Not at the base's end token alone: `generate` ends with the turn end that the chat template has, too."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = write(tmp_path / "source", QWEN | {"eos_token_id": 3, "pad_token_id": 4}, weights(QWEN))
    if generation:
        (source / "generation_config.json").write_text(json.dumps(generation))
    cfg, prompt = read_config(source), torch.arange(5, 12)[None]

    def generated(path):
        model = AutoModelForCausalLM.from_pretrained(path)
        kept = {k: getattr(model.generation_config, k) for k in generation or {"pad_token_id": 4}}
        return model.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :].tolist(), kept

    whole, kept = generated(source)
    turn_end = whole[4]
    export.save_params(load(source, cfg), cfg, source, tmp_path / "out", stop_ids=(3, turn_end))
    told, now = generated(tmp_path / "out")
    assert told == whole[: whole.index(turn_end) + 1] != whole
    assert now == kept | ({"eos_token_id": [3, turn_end]} if generation else {})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [3, turn_end]


@pytest.mark.parametrize("family", ["qwen2_tied", "llama3", "gemma3", "qwen2_5_vl"])
def test_peft_loads_the_adapter(family, tmp_path):
    """transformers with PEFT's adapter computes what our decoder computes with it: the scale, each matrix's
    axes, the names.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = family in make_vision.CONFIGS
    if sees:
        source = make_vision.make(tmp_path / "source", family)
    else:
        source = write(tmp_path / "source", FAMILIES[family], weights(FAMILIES[family]))
    base_cfg, tokens = read_config(source), np.arange(1, 20)[None]
    cfg = base_cfg.run_with(lora=LoRAConfig(rank=3, alpha=5.0, targets=("q", "v", "o", "gate", "down")))
    fresh = lora.trained(jax.eval_shape(lambda: spec.init(cfg, jax.random.key(0))), cfg)
    draw = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32) / 5, fresh)
    params = lora.join(load(source, base_cfg), adapters)
    export.save_adapter(params, cfg, source, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(source)
    prompts = Prompts(tokens, tokens > 0, np.zeros(1, np.uint32))
    state, _ = decoder.forward(params, cfg, prompts)
    ours = np.asarray(decoder.logits(params, cfg, state))
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    base = auto.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        without = base(torch.tensor(tokens)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(
            torch.tensor(tokens)
        ).logits.numpy()
    assert np.abs(theirs - without).max() > 1  # else this shows nothing
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"--adapter: this run trained all weights \(model\.lora null\)"):
        export.save_adapter(params, base_cfg, source, tmp_path / "none")


RESIDENT = """
import conftest, sys
from test_parity import load
from medrlvr_jax.model.families import read_config
def resident(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
small, large = sys.argv[1:]
load(small, read_config(small), "bfloat16")  # the runtime's own first allocations, some 25 MB, are not the load's
before, params = resident("VmRSS"), load(large, read_config(large), "bfloat16")
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_load_needs_little_more_than_the_parameters(tmp_path):
    """235 MB from a file of zeros that takes no room on the disk; the largest parameter is a fifth of that,
    so a copy of it shows.
    """
    small, large = write(tmp_path / "small", LLAMA3, weights(LLAMA3)), tmp_path / "large"
    large.mkdir()
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
    cfg = config_of(large, BASE | {"model_type": "llama"} | sizes)
    header, end = {}, 0
    for name, source in hf.sources(cfg).items():
        size = 2 * int(np.prod(source.shape))
        header[name] = {"dtype": "BF16", "shape": source.shape, "data_offsets": (end, end := end + size)}
    text = json.dumps(header).encode()
    with open(large / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, small, large], cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.12 * end, (int(done.stdout), end)

"""Our decoder computes what transformers computes: logits and greedy tokens of each family, with every norm
and bias at work.

Against transformers itself where torch is installed, else (and as well) against its stored numbers. When a
change of transformers is meant: `python tests/make_parity.py`.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from make_parity import FAMILIES, GOLDEN, NEW, case, reference, weights, write

from medrlvr_jax import sharding
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.model import decoder, export, scoring, spec
from medrlvr_jax.model import weights as hf
from medrlvr_jax.model.architecture import DecoderConfig, RopeScaling, Window
from medrlvr_jax.model.families import read_config
from medrlvr_jax.model.rope import rope_tables
from medrlvr_jax.rollout import decode
from medrlvr_jax.types import Prompts

TOLERANCE = 3e-5  # logits reach 5; float32 sums in another order differ by 5e-6 to 8e-6
ONE = MeshConfig()


def load(path, cfg, dtype="float32", mesh=ONE, devices=1):
    mesh = sharding.make_mesh(mesh, jax.devices()[:devices])
    return hf.load_params(path, cfg, sharding.shardings(abstract(cfg), mesh, sharding.TRAIN), dtype)


@cache
def abstract(cfg):
    return spec.abstract(cfg)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    @cache
    def make(family):
        return write(tmp_path_factory.mktemp(family), FAMILIES[family], weights(FAMILIES[family]))

    return make


@pytest.fixture(scope="session")
def ours(directory):
    """Family -> our logits, laid out as `reference` lays out transformers', and our greedy tokens."""

    @cache
    def compute(family):
        cfg = read_config(directory(family))
        params, c = load(directory(family), cfg), case()
        prompts, width, groups = batch(c), c.prompts.shape[1], c.tokens.shape[1]

        @jax.jit
        def score(params):
            prompt, _ = decoder.forward(params, cfg, prompts)
            # One column more than there are tokens: its state is the one after the last token.
            own = scoring.hidden_states(params, cfg, prompts, jnp.pad(c.tokens, ((0, 0), (0, 0), (0, 1))))
            return decoder.logits(params, cfg, prompt), decoder.logits(params, cfg, own)

        prompt, own = score(params)
        repeated = np.repeat(np.asarray(prompt)[:, None], groups, 1)
        # the state before the first response token
        np.testing.assert_allclose(own[:, :, 0], repeated[:, :, -1], rtol=0, atol=TOLERANCE)
        rows = np.concatenate([repeated, own[:, :, 1:]], 2)
        real = np.concatenate([np.repeat(c.mask[:, None], groups, 1), np.ones_like(c.tokens, bool)], 2)
        assert rows.shape[2] == width + c.tokens.shape[2]
        return {"logits": np.where(real[..., None], rows, 0), "greedy": greedy(params, cfg, c)}

    return compute


def batch(c):
    return Prompts(c.prompts, c.mask, np.arange(len(c.prompts), dtype=np.uint32))


def greedy(params, cfg, c):
    """`prefill`, then one `decode_step` a token, two samples of each question side by side."""
    groups, weights = 2, decode.prepare(params, cfg, c.prompts.shape[1] + NEW)
    hidden, prompt_caches = jax.jit(partial(decode.prefill, cfg=cfg))(params, prompts=batch(c))
    caches = decode.empty_caches(cfg, len(c.prompts), groups, NEW)

    @jax.jit
    def step(weights, tokens, caches, t):
        hidden, grown = decode.decode_step(weights, cfg, tokens, batch(c), prompt_caches, caches, t)
        return jnp.argmax(decoder.logits(weights.params, cfg, hidden), -1), grown

    tokens = jnp.repeat(jnp.argmax(decoder.logits(params, cfg, hidden), -1)[:, None], groups, 1)
    out = [tokens]
    for t in range(NEW - 1):
        tokens, caches = step(weights, tokens, caches, t)
        out.append(tokens)
    both = np.stack(out, -1)
    np.testing.assert_array_equal(both[:, 0], both[:, 1])
    return both[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_was(family, ours):
    golden = np.load(GOLDEN)
    np.testing.assert_allclose(ours(family)["logits"], golden[f"{family}.logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours(family)["greedy"], golden[f"{family}.greedy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_is(family, ours, directory, record_property):
    pytest.importorskip("torch")
    theirs = reference(directory(family))
    record_property("max_abs_difference", float(np.abs(ours(family)["logits"] - theirs["logits"]).max()))
    np.testing.assert_allclose(ours(family)["logits"], theirs["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ours(family)["greedy"], theirs["greedy"])


@pytest.mark.parametrize("family", ["qwen2_untied", "gemma3"])
def test_gradients_are_those_of_transformers(family, directory):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    cfg, tokens = read_config(directory(family)), np.arange(1, 20)[None]
    weight = np.random.default_rng(0).normal(size=(1, 19, cfg.vocab)).astype(np.float32)
    prompts = Prompts(tokens, tokens > 0, np.zeros(1, np.uint32))
    total = lambda p: (decoder.logits(p, cfg, decoder.forward(p, cfg, prompts)[0]) * weight).sum()
    ours = flatten_dict(jax.jit(jax.grad(total))(load(directory(family), cfg)))
    model = AutoModelForCausalLM.from_pretrained(directory(family), dtype=torch.float32)
    (model(torch.tensor(tokens)).logits * torch.tensor(weight)).sum().backward()
    for name, source in hf.sources(cfg).items():
        theirs = model.get_parameter(name).grad.numpy()
        found = export._gather(ours, source, np.dtype(np.float32))
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


def test_every_norm_and_bias_matters(directory):
    """So a forgotten one would fail the tests above: each, made neutral in one layer, moves the logits."""
    c = case()
    for family in ("qwen2_untied", "qwen3", "gemma3"):
        cfg = read_config(directory(family))
        score = jax.jit(lambda p, cfg=cfg: decoder.logits(p, cfg, decoder.forward(p, cfg, batch(c))[0]))
        flat = flatten_dict(load(directory(family), cfg))
        whole = np.asarray(score(unflatten_dict(flat)))
        for key in [key for key in flat if key[-1].endswith(("norm", "bias"))]:
            for layer in range(cfg.layers) if key[0] == "layers" else [...]:
                neutral = 1 - cfg.norm_offset if key[-1].endswith("norm") else 0
                without = unflatten_dict(flat | {key: flat[key].at[layer].set(neutral)})
                moved = np.abs(np.asarray(score(without)) - whole)[c.mask].max()
                assert moved > 100 * TOLERANCE, (family, key, layer, moved)


@pytest.mark.parametrize(
    "change",
    [
        {"window": None},
        {"window": Window(4, (0, 2), 50.0)},
        {"window": Window(3, (0, 1), 50.0)},
        {"window": Window(3, (0, 2), 1e6)},
        {"norm_offset": 0.0},
        {"activation": "silu"},
        {"scaled_embedding": False},
        {"query_size": None},
        {"rope_scaling": None},
    ],
    ids=str,
)
def test_every_setting_of_gemma3_matters(change, directory):
    c, cfg = case(), read_config(directory("gemma3"))
    params = load(directory("gemma3"), cfg)
    score = lambda cfg: decoder.logits(params, cfg, decoder.forward(params, cfg, batch(c))[0])
    moved = np.abs(score(dataclasses.replace(cfg, **change)) - score(cfg))[c.mask].max()
    assert moved > 100 * TOLERANCE


def test_llama3_frequencies():
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(
            hidden_size=2048,
            num_attention_heads=32,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        "cpu",
    )
    cfg = DecoderConfig(8, 2048, 1, 32, 8, 64, 8, 5e5, 1e-5, True, rope_scaling=scaling)
    ((cos, sin),) = rope_tables(jnp.ones(()), cfg)
    np.testing.assert_allclose(np.arctan2(sin, cos), theirs.numpy(), rtol=2e-6)

"""A second model on the mesh as verifier: its probabilities, its replies, what is refused."""

import dataclasses
import importlib.util
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from invariance import launch
from small_model import small

from medrlvr_jax import sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.reward import VerifierConfig
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import decoder, spec
from medrlvr_jax.model_rewards import verifier_models
from medrlvr_jax.model_rewards.verifier import LEAD
from medrlvr_jax.plan import aot, machines
from medrlvr_jax.rl import train
from medrlvr_jax.types import Prompts
from medrlvr_jax.world.open import verifier_tests

CFG = small(vocab=264)
TEXTS = ["a", "which is it? " * 3, "b" * 50, "which is it? " * 3, "c" * 80, "d" * 40]

HARD = {"score": "hard", "max_new_tokens": 8, "dtype": "bfloat16", "offload": True, "verdicts": ("Yes", "No")}


def asked(mesh=None, seed=0, tied=True, **settings):
    """A random verifier; large matrices, so that its opinions differ."""
    settings = {
        "model": "none",
        "max_tokens": 128,
        "batch": 4,
        "dtype": "float32",
        "verdicts": ("1", "0"),
    } | settings
    mesh = sharding.make_mesh(mesh or MeshConfig(data=1, fsdp=8))
    cfg = dataclasses.replace(CFG, tied=tied)
    made = verifier_models.lay_out(
        VerifierConfig(**settings), cfg, byte_tokenizer(), mesh, "reward.components.v"
    )
    params = jax.tree.map(lambda p: p * 3 if p.ndim > 2 else p, spec.init(cfg, jax.random.key(seed)))
    put = lambda p, s: jax.device_put(np.asarray(p.astype(s.dtype)), s.sharding)
    params = jax.tree.map(put, params, made.params)
    made = dataclasses.replace(made, verdicts=(ord("1"), ord("0")))
    return made, dataclasses.replace(made, params=params)


def directly(made, texts):
    """p(1) among 1 and 0, by the whole vocabulary's softmax after each text by itself, unpadded."""
    params = jax.tree.map(jnp.asarray, jax.device_get(made.params))

    @jax.jit
    def last(tokens):
        prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(1, jnp.uint32))
        states, _ = decoder.forward(params, made.cfg, prompts)
        return jax.nn.softmax(decoder.logits(params, made.cfg, states[:, -1])[0])

    rows = verifier_models.encode(byte_tokenizer(), texts, chat=False, soft=True)
    found = [np.asarray(last(jnp.array([row], jnp.int32))) for row in rows]
    return [p[ord("1")] / (p[ord("1")] + p[ord("0")]) for p in found]


@pytest.mark.parametrize("tied", [True, False])
def test_the_probability_is_that_of_a_direct_pass(tied):
    """Whatever the padding and the batch: three widths, six rows of five distinct ones, on eight devices."""
    _, made = asked(tied=tied)
    got = made.ask(TEXTS)
    np.testing.assert_allclose(got[::2], directly(made, TEXTS[::2]), atol=1e-5)
    assert np.std(got) > 0.05 and got[1] == got[3]
    if tied:
        _, other = asked(MeshConfig(data=2, fsdp=2, tensor=2), batch=3, max_tokens=112)
        np.testing.assert_allclose(other.ask(TEXTS[::-1]), got[::-1], atol=1e-5)


def test_the_packages_verifier_knows_the_held_out_rows():
    """As docs/pages/numbers/rewards.md: 98, 98 and 83 %; without rows of persuasion, 4 % of the second sort."""
    settings = VerifierConfig(model="embedded_verifier", max_tokens=128, batch=64, dtype="float32")
    made = verifier_models.read(settings, sharding.make_mesh(MeshConfig()), "reward.components.v").load()
    tests = verifier_tests(64)
    rows = [row for rows in tests.values() for row in rows]
    says = np.array(made.ask([row.prompt.removesuffix(LEAD) for row, _ in rows])) > 0.5
    right = (says == [yes for _, yes in rows]).reshape(len(tests), -1).mean(1)
    assert (right > [0.92, 0.92, 0.7]).all(), dict(zip(tests, right, strict=True))


SEVERAL = """
import json
import jax
from medrlvr_jax.host import processes
processes.initialize()
from test_verifier_models import TEXTS, MeshConfig, asked
said = []
for mesh in (MeshConfig(data=2, fsdp=2), MeshConfig(data=1, tensor=4)):
    _, made = asked(mesh)
    own = jax.process_index() == 1
    said += [made.ask(TEXTS[:2] if own else TEXTS[2:4]), made.ask(TEXTS[:4] if own else [])]
print("SAID", json.dumps(said), flush=True)
jax.distributed.shutdown()
"""


def test_processes_ask_together():
    """Each has its own texts, or none; whether they split the rows or both hold all of them."""
    started = launch(2, 2, ["-c", SEVERAL], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    printed = [p.communicate(timeout=300) for p in started]
    assert [p.returncode for p in started] == [0, 0], printed
    zero, one = (json.loads(out.partition("SAID ")[2]) for out, _ in printed)
    want = asked()[1].ask(TEXTS[:4])
    for split, alone in (((zero[0], one[0]), (zero[1], one[1])), ((zero[2], one[2]), (zero[3], one[3]))):
        np.testing.assert_allclose(split[1] + split[0], want, atol=1e-5)
        assert alone[0] == []
        np.testing.assert_allclose(alone[1], want, atol=1e-5)


def test_equal_prompts_are_one_row_and_long_ones_none(monkeypatch):
    _, made = asked(batch=8, max_tokens=64)
    rows = []
    program = verifier_models.yes_probability
    monkeypatch.setattr(
        verifier_models, "yes_probability", lambda *args: rows.append(args[2].tokens.shape) or program(*args)
    )
    got = made.ask(["a"] * 6 + ["x" * 60, "y" * 30])
    assert got[6] is None and len(set(got[:6])) == 1 and rows == [(8, 32), (8, 64)]
    assert made.ask([]) == []


def test_replies_are_read():
    """The verdict of what a greedy sampler writes; in bfloat16, out of the host's memory."""
    _, made = asked(**HARD)
    assert made.ask(TEXTS) == [None] * len(TEXTS)  # of random letters
    said = [
        made.tokenizer.encode_untrusted([text])[0]
        for text in ("Final Decision: Yes", "x\nFinal Decision: No", "Yes")
    ]
    tokens = np.zeros((3, 24), np.int32)
    for row, ids in zip(tokens, said, strict=True):
        row[: len(ids)] = ids
    assert made._read((tokens, tokens > 0)) == [1.0, 0.0, None]
    assert jax.tree.leaves(made.params)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("settings", [{}, HARD], ids=str)
def test_what_is_compiled_ahead_is_what_is_called(settings, monkeypatch):
    laid_out, made = asked(**settings)
    name = "greedy_reply" if settings else "yes_probability"
    calls, program = [], getattr(verifier_models, name)
    monkeypatch.setattr(verifier_models, name, lambda *args: calls.append(args) or program(*args))
    made.ask(TEXTS)
    monkeypatch.undo()
    with jax.set_mesh(made.mesh):
        called = [program.lower(*args).as_text() for args in calls]
        ahead = [p.function.lower(*p.args).as_text() for p in laid_out.programs(rows=6)]
    assert [p.calls for p in laid_out.programs(rows=20)] == [0, 0, 3]
    assert len(ahead) == 3 and list(dict.fromkeys(called)) == ahead


@pytest.mark.parametrize(
    ("verdicts", "problem"),
    [
        ((" Yes", " No"), r"' Yes' is not one token behind 'Final Decision:'.*score to hard"),
        (("1", "1"), "the same"),
    ],
)
def test_verdicts_that_are_no_tokens_are_refused(verdicts, problem):
    with pytest.raises(ConfigError, match=r"reward\.components\.v\.verdicts: .*" + problem):
        verifier_models.verdict_tokens(byte_tokenizer(), verdicts, "reward.components.v")


def test_other_models_are_refused():
    mesh = sharding.make_mesh(MeshConfig())
    refusals = {
        "reward.components.v.model: /none: no such directory": {"model": "/none"},
        "reward.components.v.max_tokens: 4096: .* max_position_embeddings = ": {
            "model": "embedded",
            "max_tokens": 4096,
        },
        "reward.components.v.chat: true, but the tokenizer has no chat template": {
            "model": "embedded",
            "max_tokens": 128,
            "chat": True,
        },
        "reward.components.v.verdicts: .*' Yes' is not one token": {"model": "embedded", "max_tokens": 128},
    }
    for words, settings in refusals.items():
        with pytest.raises(ConfigError, match=words):
            verifier_models.read(VerifierConfig(**settings), mesh, "reward.components.v")
    with pytest.raises(ConfigError, match=r"v\.model: mesh\.tensor: 8 does not divide"):
        asked(MeshConfig(data=1, tensor=8))


TREE = {
    "steps": 2,
    "model": {"path": "embedded"},
    "data": {"path": "embedded:train", "limit": 16},
    "prompt": {"template": "none", "max_tokens": 96},
    "sample": {"questions": 8, "samples": 2, "max_new_tokens": 24},
    "advantage": {"estimator": "group_mean"},
    "learn": {"minibatch": 8, "policy": {"lr": 1e-4}},
    "eval": {"batch": 8},
    "mesh": {"data": 4, "fsdp": 2},
    "checkpoint": {"every": 1},
    "log": {"samples_every": 1, "samples": 8},
}
JUDGED = {
    "kind": "verifier",
    "model": "embedded",
    "prompt": "{reference} {answer} ",
    "verdicts": ["Y", "N"],
    "when": "always",
    "max_tokens": 96,
    "offload": True,
}


def test_a_run_with_a_verifier(tmp_path):
    """The embedded model judges itself; a run that is stopped and resumed is the same run."""
    rewards = [JUDGED, {"kind": "rule", "weight": 0.5}]
    stop = {"whole": lambda step, metrics: False, "halves": lambda step, metrics: step == 1}
    for name in ("whole", "halves", "halves"):
        tree = TREE | {"name": name, "runs": str(tmp_path), "reward": rewards}
        train.train(configs.from_tree(tree), callbacks=stop[name])
        stop["halves"] = stop["whole"]
    whole, halves = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "halves")
    )
    assert len(whole) == len(halves) == 2
    named = [k for k in whole[0] if k.startswith(("reward", "verifier", "policy"))]
    assert [[m[k] for k in named] for m in whole] == [[m[k] for k in named] for m in halves]
    for m in whole:
        assert m["verifier_share"] == m["format_ok"] > 0 and m["verifier_unclear"] == 0
        assert m["reward"] == pytest.approx(m["reward/verifier"] + 0.5 * m["reward/rule"])
        assert abs(m["reward/verifier"]) < 1e-6  # standardised over the batch
    [*rows] = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").open()]
    values = {row["components"]["verifier"] for row in rows if row["format_ok"]}
    assert len(values) > 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
def test_a_plan_counts_the_verifier():
    config = configs.from_tree(TREE | {"name": "p", "reward": [JUDGED | {"offload": False}]})
    without = configs.from_tree(TREE | {"name": "p"})
    machine = machines.parse("v5e:2x4")
    listed = {p.name: p for p in aot.training_programs(aot.make_parts(config, machine), 2)}
    plain = {p.name: p for p in aot.training_programs(aot.make_parts(without, machine), 2)}
    assert listed.keys() - plain.keys() == {"verify 96"} and listed["verify 96"].calls == 1
    held = aot.bytes_per_device(listed["verify 96"].args[0])
    assert (
        held > 0
        and aot.bytes_per_device(listed["generate"].others) - aot.bytes_per_device(plain["generate"].others)
        == held
    )
    assert aot.bytes_per_device(listed["verify 96"].others) > aot.bytes_per_device(plain["generate"].others)

"""The planner: its FLOPs compared with a count by hand, its programs with those of training, and compilations
for TPUs without a TPU.
"""

import dataclasses
import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from small_model import small

from medrlvr_jax import build, cli
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import families, scoring, spec
from medrlvr_jax.plan import aot, flops, machines, plan
from medrlvr_jax.rl import train
from medrlvr_jax.rl.ahead import compile_ahead, step_programs
from medrlvr_jax.rl.programs import make_programs
from medrlvr_jax.rollout import generate, loops, rollout
from medrlvr_jax.rollout.program import Program, array
from medrlvr_jax.types import Prompts

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install '.[plan]'",
)
TREE = {
    "name": "tiny",
    "steps": 2,
    "model": {"path": "embedded", "init": "random", "remat": "full"},
    "data": {"path": "embedded:train", "limit": 16},
    "prompt": {"template": "none", "max_tokens": 96},
    "sample": {"questions": 8, "samples": 2, "max_new_tokens": 16},
    "learn": {"minibatch": 8, "microbatch": 4, "policy": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
    "eval": {"batch": 8},
    "mesh": {"data": 1, "fsdp": 4},
}
CFG = small(vocab=50, layers=3, ffn=48)
Q, P, G, R = 2, 5, 3, 7


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


@pytest.fixture(scope="module")
def compiled():
    """Return a cache of programs that several tests share."""
    return {}


def traced(f, *args):
    return flops.traced_flops(jax.jit(f).trace(*args).jaxpr)


def shapes(cfg):

    return jax.eval_shape(lambda: spec.init(cfg, jax.random.key(0)))


def test_flops_by_hand():
    """A layer has 32·(32 + 16 + 16) + 32·32 weights for q, k, v, o and 3·32·48 in the MLP."""
    assert flops.layer_weights(CFG) == 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48
    tokens, pairs = Q * (P + G * R), Q * (P * P + G * R * (P + R))
    by_hand = 3 * (2 * 7680 * tokens + 4 * 32 * pairs) + 2 * 32 * 50 * Q * G * R
    assert flops.forward_flops(CFG, Q, P, G, R) == by_hand


def generate_flops(cfg, questions, prompt, samples, new):
    """Count the prefill, and for each column attention to the prompt and to all columns of the cache."""
    rows, pair = questions * samples, 2 * cfg.heads * cfg.head_dim
    prefill = questions * prompt * (flops.layer_weights(cfg) + pair * prompt)
    loop_ends = zip(loops.segment_ends(new), loops.columns_of_loops(new), strict=True)
    pairs = sum((until - begin) * (prompt + room) for room, (begin, until) in loop_ends)
    steps = rows * ((new - 1) * flops.layer_weights(cfg) + pair * pairs)
    return 2.0 * (cfg.layers * (prefill + steps) + cfg.embed * cfg.vocab * rows * new)


def test_traced_flops_equal_the_formulas():
    """`traced_flops` equals the formula for scoring, its gradient with recomputation, and sampling."""
    i32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    prompts = Prompts(
        i32(Q, P), jax.ShapeDtypeStruct((Q, P), jnp.bool_), jax.ShapeDtypeStruct((Q,), jnp.uint32)
    )
    tokens = i32(Q, G, R)

    def score(params, prompts, tokens):
        hidden = scoring.hidden_states(params, CFG, prompts, tokens)
        return scoring.token_logprobs(params, CFG, hidden, tokens, 1.0, 10_000)[0].sum()

    forward = flops.forward_flops(CFG, Q, P, G, R)
    args = shapes(CFG), prompts, tokens
    assert traced(score, *args) == forward
    recomputed = forward  # remat full computes layers and logits once more
    assert traced(jax.grad(score), *args) == pytest.approx(3 * forward + recomputed, rel=0.05)
    key, cfg = jax.eval_shape(lambda: jax.random.key(0)), CFG.run_with(narrow=False)
    for new in (R, 300):  # with one loop and with two
        drawn = SampleConfig(questions=Q, samples=G, max_new_tokens=new)
        settings = generate.DrawSettings(cfg, drawn, (1,), 0)
        jaxpr = generate.generate.trace(shapes(cfg), prompts, key, settings).jaxpr
        assert flops.traced_flops(jaxpr) == generate_flops(cfg, Q, P, G, new)
    assert loops.columns_of_loops(300) == [(1, 151), (151, 300)] and loops.columns_of_loops(R) == [(1, R)]


def test_planned_programs_are_those_of_training(tiny, monkeypatch):
    """Lower each call of a training step on four fake devices. The text equals that of the planner."""
    c = configs.load(tiny)
    seen = {}

    def recording(name, f):
        def call(*args, **kwargs):
            seen[name] = f.lower(*args, **kwargs).as_text()
            return f(*args, **kwargs)

        return call

    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: four)
    parts = build.build(c)
    encoded = rollout.encode(parts.tokenizer, data.load(c.data), c)
    # the plan is for the longest prompt
    encoded = dataclasses.replace(encoded, width=rollout.width(c.prompt.max_tokens))
    made = make_programs(parts, 2)
    with jax.set_mesh(parts.mesh):
        training, state = train.init_training(parts, made)
        recorded = dataclasses.replace(training, programs=training.programs.wrapped(recording))
        train.train_step(recorded, encoded, state, 0)
        monkeypatch.undo()
        planned = {
            p.name: p.function.lower(*p.args, **p.kwargs).as_text()
            for p in step_programs(parts, made, encoded.width)
        }
    assert planned.keys() == seen.keys()
    for name in planned:
        assert planned[name] == seen[name], name


def test_memory_counts_shards_and_other_arrays(tiny):
    c = configs.load(tiny)
    parts = build.lay_out(c, aot.PlanTokenizer(), families.known("embedded"), jax.devices()[:4])
    planned = {p.name: p for p in aot.training_programs(parts, 2)}
    whole = 4 * sum(x.size for x in jax.tree.leaves(shapes(parts.cfg)))
    policy = aot.bytes_per_device(planned["learn_policy"].args[0])
    # params and two moments over 4 chips; norms and counters are not split
    assert 3 * whole / 4 < policy < 3 * whole / 4 * 1.02
    held = [
        aot.bytes_per_device((planned[n].args, planned[n].others))
        for n in ("learn_policy", "learn_critic", "assess")
    ]
    assert max(held) - min(held) < 0.05 * max(held)  # all states are in memory during each of them
    generate = planned["generate"]  # its layers are those of the policy
    assert aot.bytes_per_device((generate.others, generate.args[0]["layers"])) == pytest.approx(
        7 * whole / 4, rel=0.02
    )


def test_programs_count_with_all_their_calls_in_a_step(tiny):
    """Two calls take twice the FLOPs, traffic, collectives and times of one call, and the same memory."""
    parts = build.lay_out(
        configs.load(tiny), aot.PlanTokenizer(), families.known("embedded"), jax.devices()[:4]
    )
    total = jax.jit(lambda x: (x @ x.T).sum())
    machine, once = machines.parse("v5e:2x2"), Program("total", total, (array(parts, jnp.float32, 8, 8),))
    one, two = (
        aot.compile_program(once._replace(calls=calls), parts, machine, {}, options={}) for calls in (1, 2)
    )
    assert one.flops > 0 and one.traffic > 0 and one.collectives
    assert (two.flops, two.traffic, two.seconds) == (2 * one.flops, 2 * one.traffic, 2 * one.seconds)
    assert [c.bytes for c in two.collectives] == [2 * c.bytes for c in one.collectives]
    assert two.peak == one.peak


def test_times_over_nodes():
    """16 GPUs in two nodes receive 64 GB each, over NVLink, over eight NICs together, or over one NIC each."""
    h = machines.parse("h100:2x8")
    assert (h.count, h.nodes, machines.parse("v5e:4x4").count) == (16, 2, 16)
    assert h.seconds(64e9, 8, crosses=False) == 64 / 450
    assert h.seconds(64e9, 16, crosses=True) == pytest.approx(64 / 400)
    assert h.seconds(64e9, 2, crosses=True) == pytest.approx(64 / 50)
    mesh = jax.sharding.AbstractMesh((2, 8, 1), ("data", "fsdp", "tensor"))
    assert (
        aot.crosses_nodes("data", mesh, h)
        and not aot.crosses_nodes("fsdp", mesh, h)
        and aot.crosses_nodes("data+fsdp", mesh, h)
    )


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "h100:2x2x2", "v5e:0x"])
def test_bad_topologies_are_refused(tiny, topology, capsys):
    assert cli.main(["plan", str(tiny), "--topology", topology]) == 2
    assert "--topology" in capsys.readouterr().err


def test_out_of_memory_errors_are_parsed():
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.36G of 15.75G hbm. Exceeded hbm capacity by 7.61G."
    part = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total for HLO temporaries (1.00T) exceeds available HBM (15.75G)."
    assert (
        aot.refused_temporaries(whole, 2 * GIB) == pytest.approx(21.36 * GIB)
        and aot.refused_temporaries(part, 2 * GIB) == 1024 * GIB
    )
    assert aot.refused_temporaries("another error", 2 * GIB) is None


@needs_libtpu
def test_a_training_that_does_not_fit_is_refused_before_it_starts(tiny, monkeypatch):
    """The TPU's compiler refuses 16 GiB and a copy. The error does not wait for the compilation of later
    programs.
    """
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # one compilation at a time
    begun = []
    parts = aot.make_parts(configs.load(tiny, ["mesh={data: 1}"]), machines.parse("v5e:1x1"))
    large = Program("learn_policy", jax.jit(lambda x: (x, x + 1)), (array(parts, jnp.float32, 4 * GIB),))
    behind = [
        Program(f"{i}", jax.jit(lambda x, i=i: (begun.append(i), x + i)[1]), (array(parts, jnp.float32, 8),))
        for i in range(8)
    ]
    with pytest.raises(
        ConfigError, match=r"learn_policy does not fit this machine: RESOURCE_EXHAUSTED.*medrlvr plan"
    ):
        compile_ahead([large, *behind], parts, lambda *_: None)
    assert len(begun) < len(behind)


@needs_libtpu
def test_tiny_on_v5e_2x2(tiny, compiled, monkeypatch, capsys):
    """The command plans all six programs and prints JSON."""
    monkeypatch.setattr(plan, "plan", partial(plan.plan, cache=compiled))
    assert cli.main(["plan", str(tiny), "--topology", "v5e:2x2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    programs = {p["name"]: p for p in made["programs"]}
    assert list(programs) == [
        "sync_weights",
        "generate",
        "assess",
        "make_experience",
        "learn_policy",
        "learn_critic",
    ]
    assert made["fits"] and made["steps"] == 2 and 0 < made["mfu"] < 1
    for name, p in programs.items():
        assert p["peak"] < 0.1 * GIB and (p["seconds"] > 0) and p["fits"], name
    # FSDP gathers each layer's weights once or twice in each of two micro-batches: for a model this small the
    # compiler keeps them for the backward pass.
    cfg = families.known("embedded")
    layer = 2 * cfg.layers * flops.layer_weights(cfg) * 4 * 3 / 4
    [gathered] = [c["bytes"] for c in programs["learn_policy"]["collectives"] if c["kind"] == "all-gather"]
    assert layer < gathered < 2.6 * layer
    assert all(c["axis"] == "fsdp" for p in programs.values() for c in p["collectives"])


@needs_libtpu
def test_a_sharded_sampler_needs_less_memory_and_more_traffic(tiny, compiled):
    """Without a copy of the layers along fsdp, they are gathered for each of 16 tokens instead of once."""
    tpu, layers = (
        machines.parse("v5e:2x2"),
        4 * families.known("embedded").layers * flops.layer_weights(families.known("embedded")),
    )
    both = [configs.load(tiny, [f"sample.layout={layout}"]) for layout in ("gathered", "sharded")]
    made = [
        plan.plan(config, tpu, only=("sync_weights", "generate"), cache=compiled).programs for config in both
    ]
    (sync_weights, whole), (_, shards) = made
    # small shards are padded to the chip's tiles
    assert layers / 2 < whole.arguments - shards.arguments < layers * 3 / 4
    moved = [sum(c.bytes for c in p.collectives if c.kind == "all-gather") for p in (sync_weights, shards)]
    # 16 times with half the bytes, because the compiler gathers the products' inputs in bfloat16
    assert moved[1] > 6 * moved[0]


@needs_libtpu
def test_the_splash_kernel_compiles(tiny, compiled):
    """It compiles forward and backward. Its blocks of 128 take more FLOPs than such short rows need."""
    tpu = machines.parse("v5e:2x2")
    [learn] = plan.plan(configs.load(tiny), tpu, only=("learn_policy",), steps=2, cache=compiled).programs
    assert learn.fits and learn.flops > 1.3 * learn.useful
    for settings, splash in (
        ([], True),
        (["model.attention=xla"], False),
        (["learn.row_sizes=[0.5]"], False),
    ):
        assert aot.make_parts(configs.load(tiny, settings), tpu).cfg.execution.splash == splash


def test_a_plan_that_does_not_fit_shows_advice(tiny):
    """The output names the missing memory and the advice."""
    c = configs.load(
        tiny,
        [
            "model.path=Qwen/Qwen2.5-3B",
            "mesh={data: 2, fsdp: 4}",
            "sample.questions=16",
            "learn.minibatch=16",
        ],
    )
    worst = aot.Figures("learn_policy", 1.0, 9 * GIB, 0.0, 2 * GIB, 12 * GIB, 15.75 * GIB, 1.0)
    machine = machines.parse("v5e:2x4")
    made = plan.Plan(c, machine, {"data": 2, "fsdp": 4, "tensor": 1}, [worst], ["mesh.fsdp=8: less"], 2)
    text = plan.table(made)
    assert (
        not made.fits
        and "learn_policy needs 23.00 GiB of 15.75: 7.25 too much" in text
        and "would help: mesh.fsdp=8" in text
    )
    # advice is about a program that does not fit, even if another has less memory left
    refused = aot.Figures("assess", 1.0, 1 * GIB, 0.0, 2 * GIB, 1 * GIB, 15.75 * GIB, 1.0, refused=True)
    fits = refused._replace(name="generate", arguments=12 * GIB, refused=False)
    assert made._replace(programs=[fits, refused]).tightest == refused


@needs_libtpu
def test_advice_counts_the_memory_of_each_setting():
    """Full PPO of 3B on 4 chips has 20.1 GiB of states on each. Adapters save most; optimiser states in host
    memory save 8.6 GiB.
    """
    c = configs.load("configs/medqa_ppo_qwen2.5_3b.yaml", ["mesh={data: 1, fsdp: 4}"])
    machine = machines.parse("v5e:2x2")
    held = plan.state_bytes(c, machine)["learn_policy"]
    assert held == pytest.approx(20.1 * GIB, rel=0.01)
    adapters, waiting = plan.advise(
        c, machine, aot.Figures("learn_policy", 1.0, held, 0.0, 9 * GIB, 0.0, 15.75 * GIB, 1.0)
    )
    assert adapters.startswith("model.param_dtype=bfloat16 model.lora={rank: 16} (")
    assert adapters.endswith("less in learn_policy, enough there")
    assert waiting.startswith("learn.offload=true (") and waiting.endswith(
        "about 8.6 GiB less in learn_policy"
    )


def test_the_table_of_a_sweep(tiny):
    """The fastest plan that fits comes first, with its settings."""
    machine, plans = machines.parse("v5e:2x2"), []
    for fsdp, needs, seconds in ((4, 2.0, 1.5), (2, 20.0, 1.0)):
        c = configs.load(tiny, [f"mesh={{data: -1, fsdp: {fsdp}}}", "learn.microbatch=4"])
        mesh = {"slice": 1, "data": 4 // fsdp, "fsdp": fsdp, "tensor": 1}
        figures = aot.Figures(
            "learn_policy", 1.0, needs * GIB, 0.0, 0.0, 0.0, 15.75 * GIB, 1.0, times={"compute": seconds}
        )
        plans.append(plan.Plan(c, machine, mesh, [figures], [], 2))
    head, _, first, second, _, best = plan.sweep_table(plans).splitlines()
    assert head.split()[:5] == ["slice", "data", "fsdp", "tensor", "microbatch"]
    assert first.split() == ["1", "1", "4", "1", "4", "full", "yes", "2.00", "learn_policy", "1.5", "171"]
    assert second.split()[:7] == ["1", "2", "2", "1", "4", "full", "NO"]
    assert (
        best == "fastest that fits: mesh={data: -1, fsdp: 4, tensor: 1} learn.microbatch=4 model.remat=full"
    )


@needs_libtpu
def test_a_short_sweep_covers_several_values_of_each_setting(tiny, monkeypatch, capsys):
    """Eight plans cover several meshes, micro-batches and remat policies. (They once had only one mesh.) Without
    shards the sampler needs no copy.
    """
    seen = {}

    def compile_program(program, parts, machine, cache, quick):
        seen.setdefault(str(parts.config), (parts.config, []))[1].append(program.name)
        sizes = dict.fromkeys(("arguments", "outputs", "temporaries", "others"), 0.0)
        return aot.Figures(program.name, 1.0, **sizes, usable=1.0, flops=1.0, times={"compute": 1.0})

    monkeypatch.setattr(plan, "compile_program", compile_program)
    command = ["plan", str(tiny), "--topology", "v5e:2x2", "--sweep", "8", "--quick", "learn.microbatch=4"]
    assert cli.main(command) == 0
    first, *_ = configs = [config for config, _ in seen.values()]
    assert (first.mesh.tensor, first.learn.microbatch, first.model.remat) == (
        1,
        first.learn.minibatch,
        "dots",
    )
    assert len(configs) == 8 and len({(c.mesh.fsdp, c.mesh.tensor) for c in configs}) >= 3
    assert len({c.learn.microbatch for c in configs}) >= 2 and {c.model.remat for c in configs} == {
        "dots",
        "full",
    }
    unsplit = [names for config, names in seen.values() if config.mesh.fsdp == config.mesh.tensor == 1]
    assert unsplit and all("sync_weights" not in names and len(names) == 5 for names in unsplit)
    said = capsys.readouterr()
    assert said.err.count("compiling ") == sum(len(names) for _, names in seen.values())
    assert "fastest that fits: mesh={data: -1, fsdp: 1, tensor: 1} learn.microbatch=8" in said.out
    assert said.out.endswith("traffic and times are too high\n")


@needs_libtpu
def test_quick_is_another_compilation_of_the_same_program(tiny, compiled):
    """Arguments and FLOPs are equal. Traffic is higher, because all arrays are in HBM."""
    config, machine, only = configs.load(tiny), machines.parse("v5e:2x2"), ("learn_policy",)
    made = [plan.plan(config, machine, only, 2, compiled), plan.plan(config, machine, only, 2, quick=True)]
    [whole], [least] = (p.programs for p in made)
    assert [p.quick for p in made] == [False, True]
    assert (least.arguments, least.flops) == (
        whole.arguments,
        whole.flops,
    ) and least.traffic > 1.5 * whole.traffic


@needs_libtpu
def test_3b_ppo_on_v5e_4x4():
    """The paper's job fits 16 GB chips: learning, and the arguments of sampling.

    The compiler's lowest effort takes a fifth of the time. Temporaries are then 2.99 GiB, with full effort
    3.38.
    """
    c, machine = configs.load("configs/medqa_ppo_qwen2.5_3b.yaml"), machines.parse("v5e:4x4")
    made = plan.plan(c, machine, only=("learn_policy",), quick=True)
    [learn] = made.programs
    assert made.fits
    assert learn.temporaries <= 3.1 * GIB
    [generate] = (
        p for p in aot.training_programs(aot.make_parts(c, machine), plan.STEPS) if p.name == "generate"
    )
    sampled = aot.bytes_per_device((generate.args, generate.kwargs))
    assert sampled == pytest.approx(3.086e9 * 2, rel=0.02)  # the bfloat16 copy, whole on each chip
    assert learn.arguments == pytest.approx(3.086e9 * 12 / 16, rel=0.02)
    # critic with its moments, and the reference
    assert np.isclose(learn.others, 3.086e9 * 16 / 16, rtol=0.02)

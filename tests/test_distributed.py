"""Several real processes: they compute what one does, keep to their own rows, and end together, whatever ends
one of them.
"""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from invariance import compare, launch, measure
from test_learn import plain
from test_train import NO_EVAL, folder, lines, main  # noqa: F401  (a fixture)

from medrlvr_jax import build, sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import MeshConfig
from medrlvr_jax.host import processes
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.runs import checkpoint, seal

SILENCE = 10  # seconds, in place of processes.HEARTBEAT
MAIN = f"""
import sys
from medrlvr_jax import cli
from medrlvr_jax.host import processes
processes.HEARTBEAT = {SILENCE}
sys.exit(cli.main(sys.argv[1:]))
"""
GRPO = {
    "learn": {"minibatch": 8, "policy": {"lr": 1e-3, "warmup": 0.0}},
    "advantage": {"estimator": "group"},
    "kl": {"coef": 0.0},
    "loss": {"entropy_coef": 0.5},  # so that there is something to learn where no reward is earned
    "eval": {"batch": 8},
    "log": {"samples_every": 1, "samples": 8, "stop_constant": 0},
}


@pytest.mark.parametrize(("n", "meshes"), [(2, ["data=2,fsdp=2", "tensor=4"]), (4, ["slices=2,fsdp=4"])])
def test_processes_change_nothing(n, meshes):
    tokens, rewards, params = plain("gae")
    want = {"tokens": tokens, "rewards": rewards} | {
        f"p{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))
    }
    for got in measure(n, 2, meshes):
        different_tokens, different_rewards, furthest = compare(got, want)
        assert (different_tokens, different_rewards) == (0, 0) and furthest < 1e-5


def train(n, *settings):
    return launch(
        n,
        2,
        ["-c", MAIN, "train", "--distributed", *map(str, settings)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def ends(started, timeout=600):
    """Exit status and stderr of each."""
    told = [p.communicate(timeout=timeout)[1] for p in started]
    return [p.returncode for p in started], told


def until(path, steps, started):
    """Wait until so many steps stand in the metrics."""
    while not path.exists() or path.read_text().count("\n") < steps:
        assert all(p.poll() is None for p in started), ends(started)
        time.sleep(0.1)


def test_a_killed_process_is_named_and_a_relaunch_goes_on(folder):  # noqa: F811
    """Kill one of two; go on with both on another mesh; stop by a signal to one of them. All as one process
    computes it, with steps of one or two batches.
    """
    tree = yaml.safe_load((folder / "config.yaml").read_text()) | GRPO
    tree |= {"reward": {"random": 0.5}, "advantage": {"estimator": "group", "drop_equal_groups": True}}
    tree["sample"] |= {"max_batches": 2}
    (folder / "several.yaml").write_text(
        yaml.safe_dump(
            tree | {"name": "several", "mesh": {"data": 2, "fsdp": 2}, "checkpoint": {"keep": 99, "every": 1}}
        )
    )
    run = folder / "runs" / "several"
    first = train(2, folder / "several.yaml", "steps=100000")
    until(run / "metrics.jsonl", 2, first)
    first[1].kill()
    began = time.monotonic()
    (status, _), (told, _) = ends(first)
    assert status not in (0, None) and time.monotonic() - began < 2 * SILENCE + 10
    assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\s*1\s", told), told
    kept = checkpoint.saved_steps(run / "checkpoints")
    assert kept and seal.find_damage(run / "checkpoints" / str(kept[-1])) is None
    recorded = lines(run / "metrics.jsonl")

    # all rows on both, counted once
    second = train(2, folder / "several.yaml", "steps=100000", "mesh={data: 1, tensor: 4}")
    until(run / "metrics.jsonl", len(recorded) + 1, second)
    second[1].send_signal(signal.SIGTERM)
    statuses, told = ends(second)
    assert statuses == [128 + signal.SIGTERM] * 2, told
    metrics, samples = lines(run / "metrics.jsonl"), lines(run / "samples.jsonl")
    done = checkpoint.saved_steps(run / "checkpoints")[-1]
    assert [m["step"] for m in metrics] == list(range(1, done + 1)) and done > kept[-1]

    # What two processes wrote is read by two and by one: the same bytes.
    two = launch(
        2,
        2,
        ["-c", MAIN, "export", "--distributed", str(run), str(folder / "by_two")],
        stderr=subprocess.PIPE,
    )
    statuses, told = ends(two)
    assert statuses == [0, 0], told
    assert main("export", run, folder / "by_one") == 0
    assert (folder / "by_two/model.safetensors").read_bytes() == (
        folder / "by_one/model.safetensors"
    ).read_bytes()

    (folder / "one.yaml").write_text(
        yaml.safe_dump(tree | {"name": "one", "steps": done, "checkpoint": {"every": 0}})
    )
    assert main("train", folder / "one.yaml") == 0
    for got, want in zip(metrics, lines(folder / "runs/one/metrics.jsonl"), strict=True):
        exact = ("batches", "next_batch", "completions", "reward", "accuracy", "tokens", "truncated")
        assert {k: got[k] for k in exact} == {k: want[k] for k in exact}
    assert samples == lines(folder / "runs/one/samples.jsonl")
    parts = build.build(configs.load(folder / "one.yaml"))
    several, one = (
        checkpoint.restore_params(
            folder / "runs" / n / "checkpoints", build.abstract_params(parts, parts.cfg), done
        )[0]
        for n in ("several", "one")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        sharding.to_host(several),
        sharding.to_host(one),
    )


REPLICAS = """
import json, sys
import numpy as np
from medrlvr_jax import cli
from medrlvr_jax.rl import train

def step(*args):
    state, stats, scored, rows = original(*args)
    copies = {"advantages": rows.advantages, "norm": state.policy.params["layers"]["attn_norm"]}
    copies = {name: np.asarray(x.addressable_shards[0].data).tolist() for name, x in copies.items()}
    print("STEP", json.dumps(copies | {"places": scored.places.tolist(), "rewards": scored.verdicts.reward.tolist()}), flush=True)
    return state, stats, scored, rows

original, train.train_step = train.train_step, step
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_row_on_two_processes_is_scored_by_one_of_them(folder):  # noqa: F811
    """A reward that is random: each process learns from the same rewards, and its copies of what all hold
    stay the same.
    """
    (folder / "dice.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | GRPO | {"name": "dice"})
    )
    settings = [
        "mesh={data: 1, tensor: 4}",
        "reward.fn=rewards_of_users:dice",
        *NO_EVAL,
        "steps=1",
        "checkpoint.every=0",
    ]
    # divided by the spread, all pairs would be ±0.7071: some alike by chance
    settings += ["advantage.estimator=group_mean"]
    words = ["-c", REPLICAS, "train", "--distributed", str(folder / "dice.yaml"), *settings]
    started = launch(2, 2, words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    told = [p.communicate(timeout=600) for p in started]
    assert [p.returncode for p in started] == [0, 0], told
    zero, one = (
        json.loads(line[5:]) for out, _ in told for line in out.splitlines() if line.startswith("STEP ")
    )
    assert len(zero["places"]) == len(one["places"]) == 8 and sorted(zero["places"] + one["places"]) == list(
        range(16)
    )
    assert (
        zero["advantages"] == one["advantages"] and np.unique(np.array(zero["advantages"])[..., 0]).size == 16
    )
    assert zero["norm"] == one["norm"] and np.unique(zero["norm"]).size > 1  # they began as ones
    [metrics] = lines(folder / "runs/dice/metrics.jsonl")
    assert metrics["reward"] == pytest.approx(np.mean(zero["rewards"] + one["rewards"]))


VIEWS = """
import json, sys
from pathlib import Path
import jax
from medrlvr_jax.host import processes
from medrlvr_jax.runs import checkpoint, seal

processes.initialize()
from test_checkpoint import META, CheckpointConfig, Checkpoints, abstract, flip, make_state, mesh_of

def digests(path, names):
    digested.extend(name for name in names)
    return original(path, names)

folder, digested = Path(sys.argv[1]), []
original, seal.compute_digests = seal.compute_digests, digests
checkpoints = Checkpoints(folder, CheckpointConfig(keep=9), META)
for step in (1, 2):
    digested.clear()
    checkpoints.save(step, make_state(mesh_of(2, 2, 2), seed=step))
checkpoints.wait()
out = {"written": list(digested)}
processes.gather(0)
if jax.process_index() == 1:
    checkpoint.saved_steps = lambda folder: [1]  # as a network file system that is late
state, out["newest"] = checkpoints.restore(make_state(mesh_of(2, 2, 2)))
checkpoints.save(2, state)  # is there already
digested.clear()
params = abstract(state).policy.params
out["chosen"] = checkpoint.restore_params(folder, params)[1]
out["checked"] = list(digested)
if jax.process_index() == 0:
    flip(max((folder / "2").glob("state/ocdbt.process_1/d/*"), key=lambda p: p.stat().st_size))
processes.gather(0)
out["whole"] = checkpoint.restore_params(folder, params)[1]
out["after"] = Checkpoints(folder, CheckpointConfig(keep=9), META, lambda text: None).restore(state)[1]
print("VIEW", json.dumps(out), flush=True)
jax.distributed.shutdown()
"""


def test_process_0_finds_the_checkpoints_for_all_and_each_digests_its_own(tmp_path):
    """Where process 1 does not yet see checkpoint 2, both go on from it, and neither writes it again."""
    started = launch(2, 4, ["-c", VIEWS, str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    told = [p.communicate(timeout=300) for p in started]
    assert [p.returncode for p in started] == [0, 0], told
    zero, one = (
        json.loads(line[5:]) for out, _ in told for line in out.splitlines() if line.startswith("VIEW ")
    )
    assert [(view["newest"], view["chosen"], view["whole"], view["after"]) for view in (zero, one)] == [
        (2, 2, 1, 1)
    ] * 2
    data = {
        process: {n for n in view["written"] if "/d/" in n or n.startswith("ocdbt")}
        for process, view in enumerate((zero, one))
    }
    assert all(name.startswith("ocdbt.process_1/") for name in data[1]) and len(data[1]) > 1
    assert not any("ocdbt.process_1" in name for name in zero["written"])
    sealed = json.loads((tmp_path / "2.damaged" / "digests.json").read_text())
    assert sorted(zero["checked"] + one["checked"]) == sorted(sealed)
    shares = [sum(sealed[name][0] for name in view["checked"]) for view in (zero, one)]
    # Files are dealt out in turns, the largest first: the first share is the larger, by one file at most.
    assert 0 <= shares[0] - shares[1] <= max(sealed[name][0] for name in sealed)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["1", "2.damaged"]


def test_a_refusal_of_one_process_ends_all(folder):  # noqa: F811
    question = {"question": "?", "options": ["a", "b"], "answer": "B"}
    (folder / "q0.jsonl").write_text(
        "".join(json.dumps(question | {"id": str(i), "question": f"{i}?"}) + "\n" for i in range(8))
    )
    began = time.monotonic()
    started = train(
        2, folder / "config.yaml", "name=refused", f"data.path={folder}/q{{i}}.jsonl", "mesh.data=4", *NO_EVAL
    )
    statuses, told = ends(started)
    assert statuses == [2, 2] and time.monotonic() - began < 300
    assert "q1.jsonl" in told[1] and "q1.jsonl" in told[0] and "process 1 on" in told[0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed={i}", r"seed: 1 in process 1 on .*, 0 in process 0 on"),
        (
            "data.path=TREE/own{i}.jsonl",
            r"questions: {'n': 8, 'sha256': '\w+'} in process 1 on .*, {'n': 8, ",
        ),
    ],
)
def test_what_processes_read_must_be_the_same(folder, setting, said):  # noqa: F811
    """Each reads settings and questions for itself; two copies of a file may differ, as those of two machines
    do.
    """
    for i in range(2):
        questions = [
            {"id": str(n), "question": f"{n}?", "options": ["a", "b"], "answer": "AB"[n == 7 and i]}
            for n in range(8)
        ]
        (folder / f"own{i}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    started = train(
        2,
        folder / "config.yaml",
        "name=differ",
        setting.replace("TREE", str(folder)),
        "mesh.data=4",
        *NO_EVAL,
    )
    statuses, told = ends(started)
    assert statuses == [2, 2] and all(re.search(said, text) for text in told), told


def test_without_a_cluster_it_is_refused(folder):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "train", "--distributed", folder / "config.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        "medrlvr train: --distributed: JAX detects no cluster" in done.stderr
        and "JAX_PROCESS_ID" in done.stderr
    )


class Device:
    """What make_mesh looks at."""

    platform, device_kind = "tpu", "fake"

    def __init__(self, id, process, slice):
        self.id, self.process_index, self.slice_index = id, process, slice


def test_slices_follow_the_hardware():
    """Parts of the outer axis are whole slices, or whole nodes, in their order; weights are never split over
    it.
    """
    devices = [Device(i, i // 2, i // 4) for i in range(8)]
    parts = sharding._slices(devices[::-1], 2)
    assert [[d.id for d in part] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [[d.id for d in part] for part in sharding._slices(devices, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ConfigError, match=r"mesh\.slices: 1, and there are 2 TPU slices; set it to 2"):
        sharding._slices(devices, 1)
    with pytest.raises(ConfigError, match=r"mesh\.slices: 3 does not divide the 4 .* nearest that do: 2, 4"):
        sharding._slices([Device(i, i // 2, 0) for i in range(8)], 3)
    mesh = sharding.make_mesh(MeshConfig(slices=2, fsdp=2, tensor=2))
    assert mesh.shape == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert not any("slice" in str(table) for table in (sharding.TRAIN, sharding.DECODE))


def test_rows_make_the_round_trip():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    own, counted = sharding.local_rows(8, mesh)
    assert own.tolist() == list(range(8)) and counted.all()
    x = np.arange(24).reshape(8, 3)
    placed = sharding.place_rows({"x": x}, 8, mesh)
    assert placed["x"].sharding == sharding.rows(mesh)
    np.testing.assert_array_equal(sharding.fetch_rows(placed, mesh)["x"], x)
    with pytest.raises(ValueError, match="sharded by `rows`"):
        sharding.fetch_rows(jax.device_put(x, sharding.replicated(mesh)), mesh)


def test_what_the_mesh_cannot_split_is_refused(folder, capsys):  # noqa: F811
    """The model: 4 heads, 2 key/value heads, embedding 32, MLP 64, vocabulary 1,024."""
    refusals = {
        "mesh={data: 1, tensor: 8}": "mesh.tensor: 8 does not divide the model's attention heads = 4",
        "mesh={data: 2, fsdp: 4} sample.questions=12 learn.minibatch=12": "12 must divide by mesh slice × data × fsdp = 8;",
        "mesh={data: 3}": "mesh.data=3 × mesh.fsdp=1 × mesh.tensor=1 does not make the 8 devices",
        "mesh={slices: 3}": "mesh.slices=3",
    }
    for settings, words in refusals.items():
        assert main("train", folder / "config.yaml", *re.split(r" (?=\w+\.)", settings)) == 2
        assert words in capsys.readouterr().err


def test_few_key_value_heads_are_replicated(folder):  # noqa: F811
    parts = build.build(configs.load(folder / "config.yaml", ["mesh={data: 1, fsdp: 2, tensor: 4}"]))
    placed = build.shardings_of(build.abstract_params(parts, parts.cfg))
    assert parts.cfg.kv_heads == 2 and parts.cfg.heads == 4
    assert "tensor" in str(placed["layers"]["q"].spec) and "tensor" not in str(placed["layers"]["k"].spec)


def test_gather_is_of_one_here():
    assert processes.gather({"a": [1, "é"]}) == [{"a": [1, "é"]}]

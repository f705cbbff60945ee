"""The commands end to end, on the embedded tokenizer and questions with a model of random weights."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain

import jax
import numpy as np
import pytest
import yaml
from same_run import differences

from medrlvr_jax import build, cli, sharding
from medrlvr_jax.config import load as configs
from medrlvr_jax.config import schema
from medrlvr_jax.config.schema import RewardConfig, SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data.batches import batch_at
from medrlvr_jax.data.question import LETTERS, fingerprint, question_hash
from medrlvr_jax.evaluation import difficulty
from medrlvr_jax.host import tables
from medrlvr_jax.model import decoder, families, lora
from medrlvr_jax.rewards.verdicts import random_rewards
from medrlvr_jax.rl import loop, programs, train
from medrlvr_jax.rl.sft import encode_pairs
from medrlvr_jax.runs import checkpoint, profile
from medrlvr_jax.runs.metrics import find
from medrlvr_jax.tools import export
from medrlvr_jax.types import Prompts

TREE = {
    "name": "run",
    "steps": 2,
    "model": {"path": "", "remat": "none"},
    "data": {"path": "embedded:train", "limit": 32},
    "prompt": {"template": "none", "max_tokens": 96},
    "sample": {"questions": 8, "samples": 2, "max_new_tokens": 8},
    "learn": {"minibatch": 8, "policy": {"lr": 1e-3}, "critic": {"lr": 1e-3}},
    "eval": {"batch": 8, "sets": {"in_distribution": {"path": "embedded:in_distribution", "limit": 12}}},
    "checkpoint": {"every": 1, "best": "eval.in_distribution.response_length"},
    "log": {"samples_every": 1, "samples": 2},
    "mesh": {"data": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Hugging Face model of random weights and a config that trains it."""
    root = tmp_path_factory.mktemp("train")
    source = families.resolve("embedded")
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    small = json.loads((source / "config.json").read_text()) | shape
    (root / "tiny").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (root / "tiny" / name).write_bytes((source / name).read_bytes())
    (root / "tiny" / "config.json").write_text(json.dumps(small))
    tree = TREE | {
        "runs": str(root / "runs"),
        "model": TREE["model"] | {"path": str(root / "tiny"), "init": "random"},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root


NO_EVAL = ("eval.sets={}", "checkpoint.best=null")


def main(*args):
    return cli.main([str(a) for a in args])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(folder):
    assert main("train", folder / "config.yaml") == 0
    return folder / "runs" / "run"


def test_what_a_run_leaves(run):
    metrics, samples = lines(run / "metrics.jsonl"), lines(run / "samples.jsonl")
    assert [name for name in metrics[-1] if not find(name)] == []  # each is in the documentation's list
    assert [m["step"] for m in metrics] == [0, 1, 2]
    for m in metrics[1:]:
        assert {
            "reward",
            "accuracy",
            "format_ok",
            "response_length",
            "kl",
            "policy/loss",
            "critic/loss",
            "tokens_per_second",
        } <= m.keys()
        assert m["sampler_gap"] < 1e-5
        assert sum(v for k, v in m.items() if k.startswith("stage/")) == pytest.approx(1)
    assert len(samples) == 4 and samples[0]["prompt"].startswith("Question: ")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["seconds"] > 0 and summary["versions"]["jax"] == jax.__version__
    for when in ("before", "after"):
        assert summary["eval"]["in_distribution"][when]["n"] == 12
        assert {"correct", "format_ok"} <= summary["eval"]["in_distribution"][when].keys()


def test_it_resumes_to_the_same_run(run, folder):
    """Two steps and then two more are four steps at once, bit for bit."""
    halves, whole = {"name": "halves"}, {"name": "whole"}
    tree = yaml.safe_load((folder / "config.yaml").read_text()) | {"eval": {"batch": 8}}
    # The schedule knows the run's length, so both are of four steps; one of them then loses its last two
    # checkpoints and goes on.
    for changes in (halves, whole):
        (folder / "c.yaml").write_text(
            yaml.safe_dump(tree | changes | {"steps": 4, "checkpoint": {"every": 1, "keep": 9}})
        )
        assert main("train", folder / "c.yaml") == 0
        if changes is halves:
            for step in (3, 4):
                shutil.rmtree(folder / "runs" / "halves" / "checkpoints" / str(step))
            assert main("train", folder / "c.yaml") == 0
    one, two = (lines(folder / "runs" / name / "metrics.jsonl") for name in ("halves", "whole"))
    timing = {"seconds", "tokens_per_second"}
    assert [{k: v for k, v in m.items() if k not in timing} for m in one] == [
        {k: v for k, v in m.items() if k not in timing} for m in two
    ]
    for name in ("samples.jsonl", "questions.jsonl"):
        assert lines(folder / "runs/halves" / name) == lines(folder / "runs/whole" / name)
    parts = build.build(configs.load(folder / "c.yaml"))
    abstract = build.abstract_params(parts, parts.cfg)
    a, b = (
        checkpoint.restore_params(folder / "runs" / n / "checkpoints", abstract, 4)[0]
        for n in ("halves", "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(a), sharding.to_host(b))


DYNAMIC = [
    *("sample.max_batches=3", "advantage={estimator: group, drop_equal_groups: true}", "reward.random=0.5"),
    *("learn.critic=null", "kl.coef=0"),
]


def test_a_step_draws_further_batches_in_place_of_groups_that_are_equal(folder, capsys):
    """Of a coin's rewards, half of all pairs are equal: a step needs about two batches. It resumes in the
    middle of the data, and each row of each batch is drawn again exactly.
    """
    settings = (*NO_EVAL, *DYNAMIC, "steps=3", "log.samples=64", "checkpoint.keep=9")
    for name in ("dynamic", "again"):
        assert main("train", folder / "config.yaml", f"name={name}", *settings) == 0
    run, again = folder / "runs/dynamic", folder / "runs/again"
    for step in (2, 3):
        shutil.rmtree(again / f"checkpoints/{step}")
    assert main("train", folder / "config.yaml", "name=again", *settings) == 0
    assert differences(run, again, 3) == []
    metrics, taken = lines(run / "metrics.jsonl"), lines(run / "questions.jsonl")
    assert [name for name in metrics[-1] if not find(name)] == []
    ids, begin = [q.id for q in data.load(SetConfig(**TREE["data"]))], 0
    for m, row in zip(metrics, taken, strict=True):
        end = begin + int(m["batches"])
        assert m["next_batch"] == end and m["completions"] == 16 * m["batches"]
        index = np.concatenate([batch_at(32, number, 8, 0) for number in range(begin, end)])
        assert list(row["right"]) == list(dict.fromkeys(ids[i] for i in index))
        rewards = {s["row"]: s["reward"] for s in lines(run / "samples.jsonl") if s["step"] == m["step"]}
        assert sorted(rewards) == list(range(0, 16 * (end - begin), 2))
        assert m["equal_groups"] == m["dropped_groups"] or m["dropped_groups"] == 0
        begin = end
    assert max(m["batches"] for m in metrics) > 1 and any(m["dropped_groups"] == 0 for m in metrics)
    step = next(m["step"] for m in metrics if m["batches"] > 1)
    assert main("replay", run, "--step", step, "--row", 18) == 0
    assert "equal to the log" in capsys.readouterr().out
    assert main("replay", run, "--step", step, "--row", 48) == 2


def test_where_all_groups_differ_one_batch_is_enough_and_nothing_else_changes(folder):
    def pays(completions):
        return [float(i % 2) for i in range(len(completions))]

    config = configs.load(folder / "config.yaml", [*NO_EVAL, *DYNAMIC, "reward={}"])
    for name, most in (("one_batch", 1), ("up_to_three", 3)):
        sample = dataclasses.replace(config.sample, max_batches=most)
        train.train(dataclasses.replace(config, name=name, sample=sample), rewards=pays)
    assert all(m["batches"] == 1 for m in lines(folder / "runs/up_to_three/metrics.jsonl"))
    found = differences(folder / "runs/one_batch", folder / "runs/up_to_three", 2)
    assert {line.split(": ")[1] for line in found} == {"batches", "next_batch"}


def test_what_checkpoint_best_may_name_is_recorded(run):
    _, last = lines(run / "metrics.jsonl")[-2:]
    wanted = [f"eval.in_distribution.{share}" for share in schema.EVAL_METRICS] + list(schema.STEP_METRICS)
    assert [name for name in wanted if name not in last] == []


def test_replay(run, folder, capsys):
    """From checkpoint s − 1, from the start, and through steps that are trained again; what was logged
    otherwise is told.
    """
    logged = {(s["step"], s["row"]): s for s in lines(run / "samples.jsonl")}
    (_, row), sample = next((at, s) for at, s in logged.items() if at[0] == 2)
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    assert main("replay", run, "--step", 2, "--row", row) == 0
    said = capsys.readouterr()
    assert (
        tables.visible(sample["completion"]) in said.out
        and "---- equal to the log" in said.out
        and "trained again" not in said.err
    )
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before
    copy = folder / "runs" / "replayed"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "1")
    other = sample | {"completion": "another", "reward": 0.5}
    (copy / "samples.jsonl").write_text(
        "".join(json.dumps(other if s is sample else s) + "\n" for s in logged.values())
    )
    assert main("replay", copy, "--step", 2, "--row", row) == 1
    said = capsys.readouterr()
    assert (
        "training steps 1 to 1 again" in said.err
        and 'NOT equal to the log, which has:\n    completion: "another"\n        reward: 0.5' in said.out
    )
    assert (
        main("replay", copy, "--step", 1, "--row", 1) == 0 and "nothing to compare" in capsys.readouterr().out
    )
    for wrong, named in (
        (["--step", 3, "--row", 0], "steps 1 to 2"),
        (["--step", 1, "--row", 16], "rows 0 to 15"),
    ):
        assert main("replay", copy, *wrong) == 2 and named in capsys.readouterr().err


def test_eval_and_export(run, folder, capsys, monkeypatch):
    other = "eval.sets.other={path: 'embedded:in_distribution', limit: 8}"
    assert main("eval", run, "--out", folder / "answers", "--step", "best", other) == 0
    captured = capsys.readouterr()
    said = captured.out
    assert "in_distribution: 12 of 12 answers (100.0 %) cut off before their end" in said
    assert "eval.sets.other: questions: 8, of " in captured.err
    assert all(
        f"warning: {name}: checkpoint 2 was chosen as the best on these" in said
        for name in ("in_distribution", "other")
    )
    written = json.loads((folder / "answers" / "eval.json").read_text())
    counts, found = written["eval"]["in_distribution"], written["statistics"]["in_distribution"]
    assert (
        found["accuracy"]["value"] == counts["accuracy"]
        and len(found["subjects"]) > 1
        and len(written["warnings"]) == 2
    )
    record = lines(run / "metrics.jsonl")[1]  # random weights: greedy and sampled answers know as little
    assert found["token_entropy"] == pytest.approx(record["entropy"], rel=0.01)
    assert (
        counts["n"] == counts["questions"] == len(lines(folder / "answers" / "in_distribution.jsonl")) == 12
    )
    assert (counts["accuracy_low"], counts["accuracy_high"]) == (
        found["accuracy"]["low"],
        found["accuracy"]["high"],
    )
    spec = SetConfig(path="embedded:in_distribution", limit=12)
    assert written["sets"]["in_distribution"]["data"] == fingerprint(data.load(spec)) and set(
        written["sets"]
    ) == set(written["eval"])
    assert written["config"]["eval"]["sets"]["other"]["limit"] == 8 and written["template"].startswith(
        "Question: {question}\nA. {option A}"
    )
    assert (
        counts["correct"]
        == json.loads((run / "summary.json").read_text())["eval"]["in_distribution"]["after"]["correct"]
    )
    assert main("eval", run, "--out", folder / "answers") == 2  # nothing is overwritten
    orders = ["eval.sets.in_distribution.shuffle_options=true", "eval.samples=2"]
    assert main("eval", run, "--out", folder / "orders", *orders) == 0
    assert "same option in all" in capsys.readouterr().out
    rows = lines(folder / "orders" / "in_distribution.jsonl")
    assert len(rows) == 24 and rows[0]["id"] == rows[1]["id"] and rows[0]["order"] != rows[1]["order"]
    asked = {q.id: q for q in data.load(SetConfig(path="embedded:in_distribution"))}
    assert all(r["order"][LETTERS.index(r["key"])] == asked[r["id"]].reference for r in rows)
    assert all(r["question_hash"] == question_hash(asked[r["id"]]) for r in rows)
    # no thought is asked for: it has no stage
    assert main("eval", run, "--out", folder / "direct", "reward.mode=direct") == 0
    assert (
        {r["stage"] for r in lines(folder / "direct" / "in_distribution.jsonl")}
        == {None}
        != {rows[0]["stage"]}
    )
    assert main("probe", run, "--out", folder / "probed") == 0
    assert "answer as at 100 %" in capsys.readouterr().out
    rows, probed = (
        lines(folder / "probed" / "in_distribution.jsonl"),
        json.loads((folder / "probed" / "probe.json").read_text())["probe"],
    )
    greedy = {
        r["id"]: (r["completion"], r["answer"]) for r in lines(folder / "answers" / "in_distribution.jsonl")
    }
    assert {r["id"]: (r["completion"], r["generated"]) for r in rows} == greedy  # the same sampler
    assert probed["in_distribution"]["n"] == 12 and set(rows[0]["answers"]) >= {
        "at once",
        "0 %",
        "100 %",
        "another's",
    }
    saved = []
    monkeypatch.setattr(export, "save_params", lambda *args: saved.append(args) or args[3].mkdir())
    # where this run's responses stopped
    assert main("export", run, folder / "stops") == 0 and saved[0][-1] == (1,)
    monkeypatch.undo()
    two = jax.devices()[:2]  # not the training's eight
    monkeypatch.setattr(jax, "devices", lambda: two)
    assert main("export", run, folder / "exported") == 0
    monkeypatch.undo()
    # the same weights as another model
    assert main("probe", run, "--out", folder / "judged", "--scorer", folder / "exported") == 0
    assert f"scored by {folder / 'exported'};" in capsys.readouterr().out
    judged = lines(folder / "judged" / "in_distribution.jsonl")
    for one, other in zip(rows, judged, strict=True):
        np.testing.assert_allclose(one.pop("key_logprob"), other.pop("key_logprob"), atol=1e-4)
        assert one == other
    exported = [f"model.path={folder / 'exported'}", "model.init=pretrained"]
    assert main("eval", folder / "config.yaml", "--out", folder / "again", *exported) == 0
    assert json.loads((folder / "again" / "eval.json").read_text())["warnings"] == []
    assert (
        main("eval", folder / "config.yaml", "--step", "1") == 2
        and "is no run's folder" in capsys.readouterr().err
    )
    assert lines(folder / "again" / "in_distribution.jsonl") == lines(
        folder / "answers" / "in_distribution.jsonl"
    )
    capsys.readouterr()
    # the model's path and the folder may differ
    assert main("compare", folder / "answers", folder / "again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["in_distribution"]["n"] == 12
    assert main("compare", folder / "answers", folder / "orders") == 2
    assert (
        "\n  eval.samples: 1 in A, 2 in B\n  shuffle_options: False in A, True in B"
        in capsys.readouterr().err
    )
    assert main("compare", run, run) == 0  # it is evaluated where that was not done
    assert (run / "eval-2").is_dir() and "in_distribution" in capsys.readouterr().out


def test_difficulty(folder, capsys):
    args = ["difficulty", folder / "config.yaml", "--samples", "2", "--out", folder / "counts.jsonl"]
    assert main(*args) == 0
    out = capsys.readouterr().out
    assert "0 of 2" in out and "fine-tune first" in out
    rows = lines(folder / "counts.jsonl")
    questions = data.load(SetConfig(path="embedded:train", limit=32))
    assert [r["id"] for r in rows] == [q.id for q in questions] and all(
        0 <= r["right"] <= r["format_ok"] <= r["samples"] == 2 for r in rows
    )
    text = (folder / "counts.jsonl").read_text()
    (folder / "counts.jsonl").write_text(text[: len(text) // 2])  # cut off in the middle of a line
    assert main(*args) == 0 and (folder / "counts.jsonl").read_text() == text
    assert (
        main(*args[:3], "3", *args[4:]) == 2
        and "counts of other questions, of another number of samples or of another model"
        in capsys.readouterr().err
    )
    chosen = SetConfig(
        path="embedded:train", limit=32, pass_count={"file": str(folder / "counts.jsonl"), "keep": [0, 2]}
    )
    assert data.load(chosen) == questions


def test_a_profile_of_chosen_steps(folder):
    args = ["name=traced", "steps=3", "log.profile=[2, 2]", *NO_EVAL, "checkpoint.every=0"]
    assert main("train", folder / "config.yaml", *args) == 0
    [file] = (folder / "runs/traced/profile").rglob("*.xplane.pb")
    names = [
        e.name
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for e in line.events
    ]
    assert names.count("step") == names.count("score") == 1 and "log" in names


def test_scores_of_a_history_by_hand():
    steps = [
        {"step": 1, "samples": 4, "right": {"a": 0, "b": 4}},
        {"step": 2, "samples": 4, "right": {"c": 2}},
    ]
    steps += [{"step": 3, "samples": 4, "right": {"b": 4, "a": 2}}]
    a, b, c = difficulty.scores(steps)
    assert (a["id"], a["right"], a["passes"], a["accuracy"], a["variance"]) == ("a", 2, 2, 0.25, 0.0625)
    assert (b["passes"], b["variance"], c["passes"]) == (2, 0.0, 1)  # the means of the passes are 1/2 and 3/4
    assert (
        a["impact"] == pytest.approx(1 - (1 / 4 + 1 / 16) / (1 / 4 + 1 / 16))
        and b["impact"] == pytest.approx(0)
        and c["impact"] == 1
    )


def test_a_history_ranks_the_questions(run, folder, capsys):
    steps, metrics = lines(run / "questions.jsonl"), lines(run / "metrics.jsonl")[1:]
    for step, m in zip(steps, metrics, strict=True):
        assert len(step["right"]) == 8 and sum(step["right"].values()) == pytest.approx(
            m["accuracy"] * 8 * step["samples"]
        )
    twice = folder / "runs" / "twice"
    shutil.copytree(run, twice)
    (twice / "questions.jsonl").write_text(
        "".join(json.dumps(step | {"step": i}) + "\n" for i, step in enumerate([*steps, steps[0]], 1))
    )
    assert (
        main("difficulty", twice, "--history") == 0
        and "16 that the run did not use" in capsys.readouterr().out
    )
    chosen = SetConfig(
        path="embedded:train",
        limit=32,
        pass_count={"file": str(twice / "history.jsonl"), "order": "impact", "top": 3},
    )
    assert len(data.load(chosen)) == 3
    assert (
        main("difficulty", run, "--history") == 2
        and "no question was used twice in its 2 steps" in capsys.readouterr().err
    )
    assert (
        main("difficulty", folder / "config.yaml", "--history") == 2
        and "no questions.jsonl in it" in capsys.readouterr().err
    )


def test_grpo_and_sft_run(folder, capsys, caplog):
    grpo = [
        "name=grpo",
        "learn.critic=null",
        "advantage.estimator=group",
        "kl={coef: 0.01, into: loss, estimator: k3}",
        *NO_EVAL,
    ]
    grpo += ["data.shuffle_options=true"]
    assert main("train", folder / "config.yaml", *grpo) == 0
    assert "critic/loss" not in lines(folder / "runs/grpo/metrics.jsonl")[-1]
    row = lines(folder / "runs/grpo/samples.jsonl")[0]
    assert sorted(row["order"]) == list(LETTERS[: row["options"]])
    sft = [
        "name=sft",
        "steps=12",
        "sft.target=rationale",
        *NO_EVAL,
        "checkpoint.every=0",
        "learn.policy.lr=1e-2",
    ]
    sft += ["learn.critic=null"]  # and so no estimator would do: fine-tuning has no advantages
    assert main("sft", folder / "config.yaml", *sft) == 0
    losses = [m["loss"] for m in lines(folder / "runs/sft/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    assert "in mid-run" not in capsys.readouterr().err and "MISS" not in caplog.text


def test_a_random_reward_and_a_given_beginning(folder):
    args = [
        "name=coin",
        "reward={mode: direct, random: 0.5, correct: 2.0}",
        "prompt.prefill=<answer>",
        *NO_EVAL,
        "seed=3",
    ]
    assert main("train", folder / "config.yaml", *args, "log={samples_every: 1, samples: 8}") == 0
    rows = lines(folder / "runs/coin/samples.jsonl")
    assert len(rows) == 16 and all(
        r["completion"].startswith("<answer>") and r["prompt"].endswith("\n<answer>") for r in rows
    )
    # paid for nothing
    assert not any(r["format_ok"] for r in rows) and {r["reward"] for r in rows} == {0.0, 2.0}
    for r in rows:
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(3), r["step"] - 1))
        [[paid, _]] = random_rewards(
            key, [int(r["id"].split("-")[1])], 2, RewardConfig(random=0.5, correct=2.0)
        )
        assert r["reward"] == paid
    sft = [*NO_EVAL, "prompt.prefill=<answer>", "reward.mode=direct"]
    assert main("sft", folder / "config.yaml", "name=answers", *sft) == 0
    # the letter, the closing tag and the end
    assert lines(folder / "runs/answers/metrics.jsonl")[-1]["tokens"] == 8 * 3


def test_targets_begin_as_responses_do(folder, capsys):
    assert main("sft", folder / "config.yaml", "name=refused", "checkpoint.best=reward") == 2
    assert "there are eval.in_distribution.accuracy" in capsys.readouterr().err
    assert (
        main("sft", folder / "config.yaml", "name=refused", "prompt.prefill=<answer>", "sft.target=rationale")
        == 2
    )
    assert "prompt.prefill: '<answer>' is not how the target begins: '<think>" in capsys.readouterr().err


def test_a_chat_template_that_opens_the_thought_is_as_a_prefill(folder, capsys):
    """Training, its evaluations, samples and fine-tuning: all as with the same tokens by `prompt.prefill`."""
    thinking = folder / "thinking"
    shutil.copytree(folder / "tiny", thinking)
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    (thinking / "chat_template.jinja").write_text(template)
    ways = {
        "templated": [f"model.path={thinking}", "prompt.chat=true"],
        "prefilled": ["prompt.prefill=<think>"],
    }
    for name, settings in ways.items():
        assert (
            main("train", folder / "config.yaml", f"name={name}", *settings, "steps=1", "checkpoint.every=0")
            == 0
        )
    records, samples = (
        [lines(folder / "runs" / name / log) for name in ways] for log in ("metrics.jsonl", "samples.jsonl")
    )
    for record in chain(*records):
        record.pop("seconds", None), record.pop("tokens_per_second", None)
    assert (
        records[0] == records[1]
        and samples[0] == samples[1]
        and samples[0][0]["completion"].startswith("<think>")
    )
    pairs = []
    for settings in ways.values():
        parts = build.build(configs.load(folder / "config.yaml", [*settings, "sft.target=rationale"]))
        rows = encode_pairs(parts).rows
        pairs.append(rows)
        prompt, target = (parts.tokenizer.show(ids) for ids in rows[0])
        assert prompt.endswith("\n<think>") and "<think>" not in target and target.endswith("</answer><eos>")
    assert pairs[0] == pairs[1]
    direct = ["name=asked", *ways["templated"], "prompt.template=direct", "prompt.max_tokens=256"]
    direct.append("reward.mode=direct")
    assert main("doctor", folder / "config.yaml", *direct) == 0
    told = capsys.readouterr().out
    assert "the template itself opens the thought" in told
    assert "warning  every response begins with '<think>', and reward.mode direct" in told


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("prompt.system=Be brief.", "prompt.system: needs the chat template; set prompt.chat=true"),
        ("sample.questions=6", "learn.minibatch: 8 does not divide sample.questions = 6"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("model.path=./nowhere", "./nowhere"),
        ("sample.temprature=1", "did you mean temperature?"),
        ("mesh.data=3", "mesh.data=3"),
        ("learn.critic=null", "advantage.estimator: gae needs learn.critic"),
        ("advantage.estimator=rloo", "learn.critic: rloo does not use a critic"),
        ("learn.critic_warmup=2", "learn.critic_warmup: 2 of 2 steps leave none in which the policy learns"),
        ("log.profile=[3, 2]", "log.profile: [3, 2]: the first step is after the last"),
        (
            "data.pass_count={file: x, keep: [1, 7], top: 4}",
            "data.pass_count.top: 4 needs an order; set order",
        ),
        (
            "reward={fn: 'a:b', random: 0.5}",
            "reward.fn: defines the whole reward; remove reward.random",
        ),
        ("data.pass_count={file: x}", "data.pass_count: has no effect without keep"),
        (
            "data.pass_count={file: x, keep: [7, 1]}",
            "data.pass_count.keep: [7, 1]: the minimum is above the maximum",
        ),
        (
            "eval.samples=2",
            "greedy samples are all equal; set eval.temperature above 0, or shuffle_options of in_distribution",
        ),
        (
            "checkpoint.best=eval.in_distributoin.accuracy",
            "this run has no such metric; did you mean eval.in_distribution.accuracy? there are",
        ),
        (
            "checkpoint.best=acuracy",
            "checkpoint.best: acuracy: this run has no such metric; did you mean accuracy?",
        ),
        (
            "eval.sets={}",
            "checkpoint.best: eval.in_distribution.response_length: this run has no such metric",
        ),
        ("prompt.max_tokens=3", "prompt.max_tokens = 3"),
        (
            "prompt.template=direct",
            "reward.mode: strict rewards reasoning and an answer, but prompt.template direct does not ask for that",
        ),
        ("sample.questions=64", "sample.questions: 64 is more than the 32 questions"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(folder, capsys, change, named):
    assert main("train", folder / "config.yaml", "name=refused", change) == 2
    assert named in capsys.readouterr().err
    assert not (folder / "runs" / "refused").exists()


@pytest.mark.parametrize(
    ("command", "settings", "named"),
    [
        (
            "train",
            [],
            "sample.max_new_tokens: 8: after a prompt of 45 tokens that is beyond max_position_embeddings = 50",
        ),
        ("eval", ["eval.max_new_tokens=20"], "eval.max_new_tokens: 20: after a prompt of 44 tokens"),
        ("sft", ["sft.target=rationale"], "sft.max_new_tokens: 40: after a prompt of 45 tokens"),
        ("difficulty", [], "lower it to 5 or less, or lower prompt.max_tokens, which drops longer prompts"),
    ],
)
def test_rows_beyond_the_models_positions_are_refused(folder, tmp_path, capsys, command, settings, named):
    """In float arithmetic nothing fails there, the answers only decay: the rotary angles were never trained."""
    shutil.copytree(folder / "tiny", tmp_path / "short")
    shape = json.loads((tmp_path / "short" / "config.json").read_text()) | {"max_position_embeddings": 50}
    (tmp_path / "short" / "config.json").write_text(json.dumps(shape))
    args = [
        command,
        folder / "config.yaml",
        f"model.path={tmp_path / 'short'}",
        f"runs={tmp_path}",
        *settings,
    ]
    assert main(*args) == 2
    assert named in capsys.readouterr().err
    parts = build.build(configs.load(folder / "config.yaml", [f"model.path={tmp_path / 'short'}"]))
    build.check_positions(parts, 45, 5, "sample.max_new_tokens")


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "medrlvr_jax", "--help"], capture_output=True, text=True, check=True
    )
    assert "train" in done.stdout and "doctor" in done.stdout


def test_a_run_with_adapters(folder):
    """Trained, resumed bit for bit, evaluated and exported; sharded three ways, idle moments in host memory."""
    args = [
        "name=lora",
        "model.lora={rank: 4}",
        "learn.offload=true",
        "learn.policy.lr=3e-2",
        "mesh={data: 2, fsdp: 2, tensor: 2}",
    ]
    # no answer of this model earns anything, and adapters that stay at zero would show nothing
    args += ["loss.entropy_coef=1.0"]
    assert main("train", folder / "config.yaml", *args) == 0
    run = folder / "runs" / "lora"
    parts = build.build(configs.load(run / "config.yaml"))
    abstract = lora.trained(build.abstract_params(parts, parts.cfg), parts.cfg)
    first = (
        lines(run / "metrics.jsonl"),
        sharding.to_host(checkpoint.restore_params(run / "checkpoints", abstract, 2)[0]),
    )
    shutil.rmtree(run / "checkpoints" / "2")
    assert main("train", folder / "config.yaml", *args) == 0
    again = (
        lines(run / "metrics.jsonl"),
        sharding.to_host(checkpoint.restore_params(run / "checkpoints", abstract, 2)[0]),
    )
    same = [{k: v for k, v in m.items() if k not in ("seconds", "tokens_per_second")} for m in first[0]]
    assert same == [
        {k: v for k, v in m.items() if k not in ("seconds", "tokens_per_second")} for m in again[0]
    ]
    jax.tree.map(np.testing.assert_array_equal, first[1], again[1])
    assert abs(again[0][1]["kl"]) < 1e-6 < abs(again[0][2]["kl"])
    assert main("eval", run, "--out", folder / "lora_answers") == 0
    assert main("export", run, folder / "merged") == 0
    # their base is random, so that no directory holds it
    assert main("export", run, folder / "alone", "--adapter") == 2
    exported = [f"model.path={folder / 'merged'}", "model.init=pretrained"]
    assert main("eval", folder / "config.yaml", "--out", folder / "merged_answers", *exported) == 0
    merged, beside = (
        lines(folder / name / "in_distribution.jsonl") for name in ("merged_answers", "lora_answers")
    )
    entropies = [[row.pop("entropy") for row in rows] for rows in (merged, beside)]
    assert merged == beside
    np.testing.assert_allclose(*entropies, rtol=1e-5)
    # The merged directory, by transformers, is the base with its adapters, by us.
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokens = np.arange(3, 15)[None]
    with jax.set_mesh(parts.mesh):
        prompts = Prompts(tokens, tokens > 0, np.zeros(1, np.uint32))
        state, _ = decoder.forward(lora.join(build.load_base(parts), again[1]), parts.cfg, prompts)
        ours = decoder.logits(build.load_base(parts), parts.cfg, state)
    theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")(torch.tensor(tokens))
        .logits.detach()
        .numpy()
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_adapters_are_fine_tuned(folder):
    sft = [
        "name=lora_sft",
        "steps=12",
        "sft.target=rationale",
        *NO_EVAL,
        "checkpoint.every=0",
        "learn.policy.lr=3e-2",
    ]
    assert main("sft", folder / "config.yaml", *sft, "model.lora={rank: 4}", "learn.offload=true") == 0
    losses = [m["loss"] for m in lines(folder / "runs/lora_sft/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.2


def test_weights_in_bfloat16_resume_bit_for_bit_and_move(folder):
    """A step, and then another, are two steps at once, whose checkpoints hold bfloat16. A weight of 1 moves
    by 1/128 or not at all.
    """
    args = [
        "sft",
        folder / "config.yaml",
        "name=half",
        "eval.sets={}",
        "checkpoint={every: 1, keep: 9}",
        "model.param_dtype=bfloat16",
    ]
    args += ["learn={minibatch: 8, microbatch: 8, epochs: 2, policy: {lr: 1e-4}}", "learn.offload=true"]
    ends = []
    for _ in range(2):
        assert main(*args) == 0
        parts = build.build(configs.load(folder / "runs/half/config.yaml"))
        abstract = build.abstract_params(parts, parts.cfg)
        assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {np.dtype("bfloat16")}
        read = [
            checkpoint.restore_params(folder / "runs/half/checkpoints", abstract, step)[0] for step in (1, 2)
        ]
        ends.append(sharding.to_host(read))
        shutil.rmtree(folder / "runs/half/checkpoints/2")
    jax.tree.map(np.testing.assert_array_equal, *ends)
    norms = [params["layers"]["mlp_norm"].astype(np.float32) for params in ends[0]]
    share = (norms[0] != norms[1]).mean()
    assert 0 < share < 0.2 and np.abs(norms[0] - norms[1]).max() <= 1 / 128


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(folder, capsys, monkeypatch):
    """Advantages of NaN in steps 2 and on: nothing moves, each batch is kept, and the third in a row ends the
    run with a checkpoint.
    """
    honest, factors = programs.make_experience, iter([1.0, np.nan, np.nan, np.nan])

    class Spoiled:
        trace, lower = honest.trace, honest.lower

        def __call__(self, *args, **kwargs):
            experience, stats = honest(*args, **kwargs)
            return dataclasses.replace(experience, advantages=experience.advantages * next(factors)), stats

    monkeypatch.setattr(programs, "make_experience", Spoiled())
    assert (
        main(
            "train",
            folder / "config.yaml",
            "name=spoiled",
            "steps=4",
            *NO_EVAL,
            "checkpoint={every: 1, keep: 9}",
        )
        == 1
    )
    said = capsys.readouterr().err
    assert "3 steps in a row had updates that were not finite" in said and "Step 4 is saved" in said
    path = folder / "runs" / "spoiled"
    assert [m["policy/skipped"] for m in lines(path / "metrics.jsonl")] == [0, 1, 1, 1]
    assert np.isnan(np.load(path / "skipped" / "3.npz")["advantages"]).all()
    parts = build.build(configs.load(folder / "config.yaml"))
    abstract = build.abstract_params(parts, parts.cfg)
    first, last = (checkpoint.restore_params(path / "checkpoints", abstract, step)[0] for step in (1, 4))
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(first), sharding.to_host(last))


# two samplers, of rollouts and of the evaluation
ONCE = {"sync_weights": 1, "generate": 2, "assess": 1, "make_experience": 1, "learn": 2}
MESHED = ["mesh={data: 2, fsdp: 2, tensor: 2}"]
ADAPTED = ["model.lora={rank: 4}", "learn.offload=true"]
SMALLER = [
    "sample.weights=int8",
    "loss.sampler_cap=2",
    "learn={row_sizes: [0.5], microbatch: 8, minibatch: 8, policy: {lr: 1e-3}}",
]
SMALLER += ["advantage.estimator=group", "kl.coef=0", "sample.top_k=5"]


@pytest.mark.parametrize(
    ("command", "settings", "wanted"),
    [
        ("train", [], ONCE | {"sync_weights": 0}),  # the sampler's weights are the policy's own
        ("train", MESHED, ONCE),
        ("train", [*MESHED, *ADAPTED], ONCE),
        ("train", SMALLER, ONCE | {"learn": 1}),
        ("train", DYNAMIC, ONCE | {"sync_weights": 0, "learn": 1, "select": 2}),
        ("sft", ["mesh={data: 1, fsdp: 8}"], {"sync_weights": 1, "generate": 1, "learn": 1}),
    ],
    ids=["plain", "meshed", "adapted", "int8", "dynamic", "sft"],
)
def test_every_program_is_compiled_once_and_before_the_first_step(
    folder, monkeypatch, command, settings, wanted
):
    """However many steps. What is found wanting then is of one number or so; and Orbax cuts each array that
    several devices copy.
    """
    seconds = lambda made: sum(s for _, s in made)
    honest, before = loop.compile_ahead, []

    def ahead(*args):
        heard.drain()
        said = honest(*args)
        before.extend(heard.drain())
        return said

    monkeypatch.setattr(loop, "compile_ahead", ahead)
    jax.clear_caches()
    with profile.Compiles() as heard:
        assert main(command, folder / "config.yaml", f"name=counted{len(settings)}{command}", *settings) == 0
        after = Counter(name.removeprefix("jit(").removesuffix(")") for name, _ in heard.drain())
    made = Counter(name.removeprefix("jit(").removesuffix(")") for name, _ in before)
    assert made == Counter({name: n for name, n in wanted.items() if n}) and seconds(before) > 0
    assert not after.keys() & wanted.keys() and after.total() - after["slice"] <= 40


def test_a_signal_while_programs_are_compiled_stops_before_the_first_step(folder, monkeypatch, capsys):
    def ahead(*_):
        signal.raise_signal(signal.SIGTERM)
        return "compiled"

    monkeypatch.setattr(loop, "compile_ahead", ahead)
    assert main("train", folder / "config.yaml", "name=early") == 128 + signal.SIGTERM
    assert not (folder / "runs/early/metrics.jsonl").exists()
    assert (
        "early has stopped: no step was finished. The same command resumes the run."
        in capsys.readouterr().err
    )


def test_what_is_compiled_late_is_named_and_explained(folder, capsys, caplog, monkeypatch):
    honest, sizes = train.train_step, iter([3, 4])

    @jax.jit
    def triple(x):
        return 3 * x

    def grown(*args):
        triple(np.ones(next(sizes)))
        return honest(*args)

    monkeypatch.setattr(train, "train_step", grown)
    assert main("train", folder / "config.yaml", "name=grown", *NO_EVAL) == 0
    said = capsys.readouterr().err
    assert "step 2: compiled jit(triple) in mid-run" in said and "step 1: compiled" not in said
    assert "at x, now f32[4] and before f32[3]" in caplog.text
    triple(np.ones(4))
    with profile.Compiles() as heard:
        triple(np.ones(4))
        assert heard.drain() == []

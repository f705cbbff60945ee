"""The Python API: `import medrlvr_jax as mr` is enough, and runs have the same folders as on the command line."""

import ast
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from test_train import NO_EVAL, folder, lines, main  # noqa: F401  (folder is a fixture)

import medrlvr_jax as mr
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data import load
from medrlvr_jax.data.question import fingerprint

ROWS = [
    {
        "id": f"q{i}",
        "question": f"What helps sign {i}?",
        "options": ["aspirin", "heparin"],
        "answer": "AB"[i % 2],
    }
    for i in range(16)
]
QUESTIONS = [
    mr.Question(row["id"], row["question"], tuple(row["options"]), i % 2) for i, row in enumerate(ROWS)
]
SMALL = {
    "steps": 2,
    "learn.critic": None,
    "advantage.estimator": "group",
    "kl.coef": 0.0,
    "eval.sets": {},
    "checkpoint.best": None,
    "log.samples": 16,
}


def settings(folder, name, **changes):  # noqa: F811
    return mr.load_config(folder / "config.yaml", SMALL | {"name": name} | changes)


def length(completions):
    return [len(c) / 4 for c in completions]


def test_importing_it_brings_no_jax_and_every_name_is_there():
    code = "import medrlvr_jax, sys; dir(medrlvr_jax); print([m for m in ('jax', 'numpy', 'pydantic', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
    assert {
        "train",
        "sft",
        "evaluate",
        "generate",
        "load_model",
        "load_config",
        "score",
        "Question",
        "Config",
    } <= set(mr.__all__)
    for name in mr.__all__:
        assert getattr(mr, name) is getattr(mr, name) and name in dir(mr)
    assert mr.score(["<think>x</think><answer>B</answer>"], ["B"], [["a", "b"]]).reward.tolist() == [1.0]
    advantages, _ = mr.advantages.gae(
        np.float32([0, 1]), np.float32([0.5, 0.25]), np.array([True, True]), 1.0, 1.0
    )
    assert advantages.tolist() == [0.5, 0.75]
    source = ast.parse(pathlib.Path(mr.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in source.body if isinstance(node, ast.If)]
    imports = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {
        name: "medrlvr_jax." + (path.partition(":")[0] if ":" in path else path.rpartition(".")[0])
        for name, path in mr._NAMES.items()
    }
    assert imports == table and set(table) == set(mr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mr.trian  # noqa: B018


def test_settings_in_python(folder, tmp_path):  # noqa: F811
    c = mr.load_config(
        folder / "config.yaml",
        {"sample": {"temperature": 0.5, "top_k": 3}, "sample.samples": 4, "runs": tmp_path, "steps": 7},
    )
    assert (c.sample.temperature, c.sample.top_k, c.sample.samples, c.sample.questions) == (
        0.5,
        3,
        4,
        8,
    ) and c.steps == 7
    assert c.runs == str(tmp_path) and c.eval.sets["in_distribution"].limit == 12
    d = mr.load_config(
        folder / "config.yaml",
        {"learn": {"policy": {"lr": 1.0}, "critic": None}, "eval.sets": {"a": {"path": "x.csv"}}}
        | {"advantage.estimator": "group"},
    )
    assert (
        d.learn.critic is None
        and d.learn.policy.lr == 1
        and d.learn.minibatch == 8
        and list(d.eval.sets) == ["a"]
    )
    assert (
        mr.load_config(
            {
                "name": "a",
                "steps": 1,
                "model": {"path": "m"},
                "data": {"path": "d"},
                "learn": {"policy": {"lr": 1}},
            }
        ).steps
        == 1
    )
    with pytest.raises(mr.ConfigError, match=r"sample.temprature: no such setting; did you mean temperature"):
        mr.load_config(folder / "config.yaml", {"sample": {"temprature": 1.0}})
    with pytest.raises(mr.ConfigError, match=r"override 'steps.x': steps is a value without fields"):
        mr.load_config(folder / "config.yaml", {"steps.x": 1})


def test_presets_are_in_the_package_and_found_by_name(tmp_path, monkeypatch):
    """An installed package has no folder `configs`."""
    presets = pathlib.Path(mr.__file__).parent / "configs"
    assert sorted(p.name for p in presets.iterdir()) == sorted(
        p.name for p in (presets.parents[1] / "configs").iterdir()
    )
    monkeypatch.chdir(tmp_path)
    assert mr.load_config("quickstart_grpo").name == "quickstart_grpo"
    mine = (presets / "quickstart.yaml").read_text().replace("name: quickstart", "name: mine")
    (tmp_path / "quickstart_grpo").write_text(mine)  # a file that is there comes first
    assert mr.load_config("quickstart_grpo").name == "mine"
    with pytest.raises(mr.ConfigError, match=r"the presets of the package are .*quickstart,"):
        mr.load_config("quickstrat")


def test_closures_reward_callbacks_stop_and_the_same_call_resumes(folder, capsys):  # noqa: F811
    """The folder of a run from Python equals that of the command line, and `inputs.json` has the rewards."""
    bonus, seen = 0.25, []

    def keyed(keys, options, questions, **_):
        assert all(len(o) == 2 and isinstance(o, list) for o in options) and all(
            q.startswith("What helps") for q in questions
        )
        return [bonus * (key == "B") for key in keys]

    def watch(step, metrics):
        seen.append((step, metrics["reward"]))
        return step == 1

    handlers, threads = (
        [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        {t.name for t in threading.enumerate()},
    )
    c = settings(folder, "closures")
    assert mr.train(c, rewards=[(length, 2.0), keyed], data=ROWS, callbacks=watch) == {
        "name": "closures",
        "steps": 2,
        "done": 1,
        "exit_status": 0,
    }
    run = folder / "runs" / "closures"
    samples = lines(run / "samples.jsonl")
    assert len(samples) == 8 and all(
        s["reward"] == len(s["completion"]) / 2 + bonus * (s["key"] == "B") for s in samples
    )
    [metrics] = lines(run / "metrics.jsonl")
    assert seen == [(1, metrics["reward"])]
    assert (
        2 * metrics["reward/length"] + metrics["reward/keyed"] == pytest.approx(metrics["reward"])
        and metrics["reward/keyed"] > 0
    )
    told = json.loads((run / "inputs.json").read_text())
    assert [(r["name"].split(".")[-1], r["weight"], len(r["sha256"])) for r in told["rewards"]] == [
        ("length", 2.0, 64),
        ("keyed", 1.0, 64),
    ]
    with pytest.raises(mr.ConfigError, match=r"rewards: length × 2, .*keyed × 1 before, length × 1 now"):
        mr.train(c, rewards=length, data=ROWS)
    with pytest.raises(mr.ConfigError, match=r"rewards: .* before, no callables now"):
        mr.train(c, data=ROWS)
    with pytest.raises(
        mr.ConfigError,
        match=r"data.path: python:data: 16 rows before, 15 now; the first that differs is number 1",
    ):
        mr.train(c, rewards=[(length, 2.0), keyed], data=ROWS[1:])
    assert main("train", run / "config.yaml") == 2
    assert "these records came from Python, and no file has them; pass them again" in capsys.readouterr().err
    # the same questions, as objects
    summary = mr.train(c, rewards=[(length, 2.0), keyed], data=QUESTIONS, callbacks=[watch])
    assert (
        summary["steps"] == 2
        and json.loads((run / "summary.json").read_text())["last"]["step"] == 2
        and [s for s, _ in seen] == [1, 2]
    )
    assert [
        signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)
    ] == handlers and not multiprocessing.active_children()
    assert not {
        n
        for n in {t.name for t in threading.enumerate()} - threads
        if "checkpoint" in n.lower() or "save" in n.lower()
    }


def test_an_interrupt_saves_and_returns_and_another_thread_may_train(folder):  # noqa: F811
    def interrupt(step, _):
        os.kill(os.getpid(), signal.SIGINT)

    c = settings(folder, "interrupted", **{"checkpoint.every": 0})
    assert mr.train(c, rewards=length, data=ROWS, callbacks=interrupt) == {
        "name": "interrupted",
        "steps": 2,
        "done": 1,
        "exit_status": 130,
    }
    assert (folder / "runs/interrupted/checkpoints/1").is_dir()
    results = []
    thread = threading.Thread(target=lambda: results.append(mr.train(c, rewards=length, data=ROWS)))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 2


def test_failing_rewards_exclude_rows_or_end_the_run_without_a_lock(folder):  # noqa: F811
    def odd(completions):
        if any(len(c) % 2 for c in completions):
            raise ValueError("odd")
        return [1.0] * len(completions)

    def down(completions):
        raise OSError("the service is down")

    c = settings(folder, "fails", steps=1)
    with pytest.raises(
        mr.RewardError,
        match=r"rewards: .*down failed on all 16 completions of a batch: OSError: the service is down",
    ):
        mr.train(c, rewards=down, data=ROWS)
    mr.train(c, rewards=[length, odd], data=ROWS)
    [metrics], samples = (
        lines(folder / "runs/fails/metrics.jsonl"),
        lines(folder / "runs/fails/samples.jsonl"),
    )
    failed = [s for s in samples if s["reward"] is None]
    assert 0 < len(failed) == round(metrics["reward_failed"] * 16) and all(
        "odd: ValueError: odd (test_api" in s["reward_error"] for s in failed
    )


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            lambda texts: [],
            "needs an argument 'texts', which it never gets; there are completions, keys, options, questions",
        ),
        ([], r"rewards: \[\]: there is no reward"),
        (["length"], "rewards: 'length': give a callable, or a pair of a callable and its weight"),
        ([(length, "much")], r"rewards: \(<function .*, 'much'\): give a callable"),
        ((length, 0.5), "rewards: 0.5: give a callable"),
    ],
)
def test_rewards_that_cannot_be_called_are_refused(folder, rewards, message):  # noqa: F811
    with pytest.raises(mr.ConfigError, match=message):
        mr.train(settings(folder, "refused"), rewards=rewards, data=ROWS)
    with pytest.raises(
        mr.ConfigError, match=r"reward.random: 0.5: rewards=.* replaces the reward of the config"
    ):
        mr.train(settings(folder, "refused", **{"reward.random": 0.5}), rewards=length, data=ROWS)
    assert not (folder / "runs/refused").exists()


def test_rows_given_in_python_are_read_as_those_of_a_file(folder, tmp_path):  # noqa: F811
    """They have the same checks and the same fingerprint, also in fine-tuning."""
    import datasets

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = []
    for rows in (ROWS, QUESTIONS, datasets.Dataset.from_list(ROWS), file, str(file)):
        spec, records = load.resolve_data(SetConfig(path="other.csv"), rows)
        asked.append(fingerprint(load.read(spec, records)[0]))
    assert asked == asked[:1] * 5
    mr.sft(settings(folder, "sft", steps=1), data=QUESTIONS)
    assert json.loads((folder / "runs/sft/inputs.json").read_text())["sets"]["data"]["n"] == 16
    mr.sft(
        settings(folder, "text", steps=1, **{"sft.target": "text"}),
        data=[{"prompt": "a", "response": f"b{i}"} for i in range(8)],
    )
    c = settings(folder, "refused")
    for data, message in (
        ([ROWS[0], ROWS[0]], "python:data, row 2: id 'q0' is already that of row 1"),
        ([3], "python:data, row 1: 3: the row is neither a Question nor a dict"),
        (
            [mr.Question("a", "b", ("c", "d"), 2)],
            "row 1: field answer: 2 is not the index of one of its 2 options",
        ),
        ([], "python:data: it has no record"),
        (
            [*QUESTIONS[:1], mr.Example("a", "b")],
            r"row 2: Example.*: the rows before it are of the type Question",
        ),
        ([mr.Example("a", "b")], "row 1: format text, where plain or .* is needed"),
    ):
        with pytest.raises(mr.DataError, match=message):
            mr.train(c, data=data)


@pytest.fixture(scope="module")
def trained(folder):  # noqa: F811
    mr.train(settings(folder, "trained", steps=1, **{"model.lora": {"rank": 2}}), rewards=length, data=ROWS)
    return folder / "runs" / "trained"


def test_completions_have_the_models_log_probs_for_any_batch(trained, folder):  # noqa: F811
    model = mr.load_model(trained)
    assert (model.step, model.source, model.architecture.layers, model.mesh.size) == (1, str(trained), 2, 8)
    prompts = ["Question: a?\n", "Question: of several more words?\n", "b"]
    drawn = mr.generate(model, prompts, samples=2, max_new_tokens=6, seed=3)
    assert [c.prompt for c in drawn] == [p for p in prompts for _ in range(2)]
    again = mr.generate(model, prompts[:2], samples=2, max_new_tokens=6, seed=3, batch=1)
    for a, b in zip(drawn[:4], again, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.text == b.text
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    greedy, top = (
        mr.generate(model, prompts, max_new_tokens=6, **how) for how in ({"temperature": 0.0}, {"top_k": 1})
    )
    for a, b in zip(greedy, top, strict=True):
        assert (
            a.tokens.tolist() == b.tokens.tolist()
            and (a.logprobs < 0).all()
            and a.logprobs.tolist() == b.logprobs.tolist()
        )
        assert len(a.tokens) == len(a.logprobs) <= 6 and a.stopped == (
            a.tokens[-1] in model.tokenizer.stop_ids
        )
    asked = mr.generate(model, [QUESTIONS[0], QUESTIONS[0]], max_new_tokens=2, temperature=0.0)
    assert asked[0].prompt.startswith("Question: What helps sign 0?") and asked[0].text == asked[1].text
    assert (
        mr.generate(model, ROWS[0], max_new_tokens=2, temperature=0.0)[0].tokens.tolist()
        == asked[0].tokens.tolist()
    )
    assert mr.generate(model, []) == []
    plain = mr.load_model(folder / "tiny", settings={"model.init": "random", "prompt.template": "none"})
    assert plain.step == 0 and len(mr.generate(plain, "x", max_new_tokens=1)) == 1
    for call, message in (
        (lambda: mr.generate(model, [QUESTIONS[0], "x"]), "prompts: texts and questions are mixed"),
        (lambda: mr.generate(model, ["x", ""]), "prompts: number 2 has no tokens"),
        (lambda: mr.generate(model, "x", max_new_tokens=0), "max_new_tokens: 0: "),
        (lambda: mr.load_model(folder / "tiny", step=3), "step: 3: .*tiny is no run's folder"),
        (lambda: mr.load_model(folder / "none"), "none"),
    ):
        with pytest.raises(mr.ConfigError, match=message):
            call()
    with pytest.raises(mr.CheckpointError, match="checkpoint 9 cannot be used"):
        mr.load_model(trained, step=9)


def test_evaluate_equals_the_command_line(trained, tmp_path):
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    assert main("eval", trained, f"eval.sets.dev.path={file}", "--out", tmp_path / "out") == 0
    evaluation = mr.evaluate(str(trained), ROWS[:12], batch=3)
    assert evaluation.counts == json.loads((tmp_path / "out" / "eval.json").read_text())["eval"]["dev"]
    assert evaluation.accuracy == evaluation.counts["accuracy"] and evaluation.interval[1] > 0
    assert [(a["id"], a["completion"]) for a in evaluation.answers] == [
        (a["id"], a["completion"]) for a in lines(tmp_path / "out" / "dev.jsonl")
    ]
    sampled = mr.evaluate(mr.load_model(trained), pathlib.Path(file), samples=2, temperature=1.0)
    assert sampled.counts["n"] == 24 and sampled.counts["questions"] == 12
    assert jax.process_count() == 1

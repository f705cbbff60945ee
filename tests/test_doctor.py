"""The doctor prints ok, note, warning or problem, and writes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_checkpoint import META, flip, make_state, mesh_of
from test_log import config

from medrlvr_jax.config.load import load
from medrlvr_jax.config.schema import CheckpointConfig
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model.families import resolve
from medrlvr_jax.runs import checkpoint, log
from medrlvr_jax.tools import doctor, show_data

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def test_the_machine_is_checked():
    lines, ok = doctor.report(None)
    assert ok
    text = "\n".join(lines)
    assert "8 × cpu" in text and "host memory" in text and "orbax-checkpoint" in text and "GiB free" in text


def test_a_package_that_is_too_old_or_missing_is_a_problem(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "requires",
        lambda _: ["jax>=99", "no-such-package", "wandb; extra == 'wandb'"],
    )
    problems = [str(f) for f in doctor._check_packages() if f.mark == "problem"]
    assert (
        "pip install 'jax>=99'" in problems[0]
        and "no-such-package is not installed" in problems[1]
        and len(problems) == 2
    )


def test_a_run_in_use_other_settings_and_damaged_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_check_model", lambda parts, run: iter(()))
    monkeypatch.setattr(doctor, "_check_data", lambda parts: iter(()))
    c = config(tmp_path)
    with log.Run(c, 3) as run:
        checkpoints = checkpoint.Checkpoints(run.path / "checkpoints", CheckpointConfig(), META)
        for step in (1, 2):
            checkpoints.save(step, make_state(mesh_of(2, 2, 2)))
        checkpoints.close()
        lines, ok = doctor.report(c)
        assert not ok and any(line.startswith("problem") and "in use by process" in line for line in lines)
    flip(run.path / "checkpoints" / "2" / "meta" / "metadata")
    before = sorted(tmp_path.rglob("*"))
    lines, ok = doctor.report(c)
    assert ok and "ok       checkpoint 1 is complete" in lines
    assert any(
        line.startswith("warning") and "checkpoint 2 is damaged: meta/metadata has changed" in line
        for line in lines
    )
    lines, ok = doctor.report(config(tmp_path, seed=5))
    assert not ok and any("seed: 0 before, 5 now" in line for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_are_checked(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(resolve("embedded"), model)
    c = load(QUICKSTART, [f"model.path={model}", f"runs={tmp_path}"])
    (model / "model-00001-of-00002.safetensors").write_text("older")
    lines, ok = doctor.report(c)
    assert ok and any(
        line.startswith("warning") and "model-00001-of-00002.safetensors will not be read" in line
        for line in lines
    )
    (model / "model.safetensors").unlink()
    lines, ok = doctor.report(c)
    assert not ok and any(line.startswith("problem") and "no model.safetensors" in line for line in lines)
    lines, ok = doctor.report(
        load(QUICKSTART, [f"model.path={model}", f"runs={tmp_path}", "model.init=random"])
    )
    assert ok


def test_a_missing_model_is_reported_once(tmp_path):
    c = load(QUICKSTART, ["model.path=./nowhere", f"runs={tmp_path}"])
    problems = [line for line in doctor.report(c)[0] if line.startswith("problem")]
    assert len(problems) == 1 and "./nowhere: no such directory" in problems[0]


def test_what_training_refuses_is_a_problem(tmp_path, monkeypatch):
    def refuse(parts, run):
        yield doctor.Finding("ok", "mesh")
        raise ConfigError("sample.questions: 3 must divide by 8")

    monkeypatch.setattr(doctor, "_check_model", refuse)
    lines, ok = doctor.report(config(tmp_path))
    assert not ok and "problem  sample.questions: 3 must divide by 8" in lines


def test_data_reward_and_trackers_are_checked(tmp_path):
    changes = ["data.path=no.jsonl", "reward.fn=no_module:f", "log.wandb=p", f"runs={tmp_path}"]
    for change, message in zip(changes, ["no such file", "no_module", "log.wandb: p needs "], strict=False):
        lines, ok = doctor.report(load(QUICKSTART, [change, changes[-1]]))
        [problem] = [line for line in lines if line.startswith("problem")]
        assert not ok and message in problem
    lines, ok = doctor.report(load(QUICKSTART, ["prompt.max_tokens=45", changes[-1]]))
    assert ok and any(
        re.match(r"warning  data: \d+ prompts are too long and dropped; raise prompt.max", line)
        for line in lines
    )
    assert any(line.startswith("warning  eval.sets.out_of_distribution: ") for line in lines)


def test_data_shows_the_prompts(tmp_path):
    question = {"question": "Which drug?", "options": ["a", "b"], "answer": "B"}
    rows = [question, question | {"question": "Which dose?"}, question | {"question": "drug " * 60}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        f"data.path={tmp_path / 'mine.jsonl'}",
        f"eval.sets={{dev: {{path: {tmp_path / 'mine.jsonl'}}}}}",
    ]
    text = show_data.show_data(load(QUICKSTART, [*settings, "prompt.max_tokens=50"], "data"), 1)
    train, dev = text.split("\n\neval.sets.dev: ")
    assert (
        "questions: 3, of 2 options" in train
        and "dropped: 1, longer than prompt.max_tokens = 50; raise it" in train
    )
    assert "| Question: Which drug?\n  | A. a\n  | B. b" in train and "Which dose" not in train
    assert "also in data: 3 of 3 question texts" in dev


@pytest.mark.parametrize(("size", "enough"), [(20_001, False), (20_000, True)])
def test_space_for_the_checkpoints(tmp_path, monkeypatch, size, enough):
    # two are kept, one is written
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("usage", (), {"free": 3 * 20_000}))
    finding = doctor._check_space(config(tmp_path), size)
    assert (finding.mark == "ok") == enough

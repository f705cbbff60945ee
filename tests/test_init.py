"""The config that `medrlvr init` writes is valid for all answers, and no file is overwritten."""

import json

import pytest

from medrlvr_jax import cli
from medrlvr_jax.config.load import load
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.tools import init


@pytest.mark.parametrize(
    ("algorithm", "lora", "devices", "n", "sizes"),
    [
        ("grpo", False, 0, 40, (8, 32, 8)),
        ("ppo", True, 0, 5, (1, 4, 1)),  # fewer questions than a minibatch has
        ("ppo", False, 6, 400, (12, 96, 6)),  # a multiple of the devices
        ("grpo", True, 8, 400, (8, 32, 8)),
    ],
)
def test_the_config_can_be_trained(tmp_path, algorithm, lora, devices, n, sizes):
    rows = [{"question": f"Drug {i}?", "options": ["a", "b"], "answer": "AB"[i % 2]} for i in range(n)]
    questions = tmp_path / "my: data.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    file, answers = (
        tmp_path / "my run.yaml",
        ("embedded", str(questions), str(questions), algorithm, lora, devices),
    )
    init.write_config(file, init.Answers(*answers))
    c = load(file, command="train")
    assert (c.learn.minibatch, c.sample.questions, c.learn.microbatch) == sizes
    assert c.name == "my_run" and c.data.path == str(questions) and c.eval.sets["test"].path == str(questions)
    assert (c.learn.critic is None) == (algorithm == "grpo") and (c.model.lora is None) == (not lora)
    assert c.prompt.max_tokens == 32 and c.mesh.fsdp == (1 if lora else max(1, devices))
    assert c.model.dtype == ("bfloat16" if devices else "float32")
    with pytest.raises(ConfigError, match="exists already"):
        init.write_config(file, init.Answers(*answers))


def test_the_config_passes_the_doctor(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.yaml"
    monkeypatch.setattr("jax.device_count", lambda: 1)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", str(file), "--data", "embedded:train"]) == 0
    assert "problem" not in capsys.readouterr().out
    assert cli.main(["init", str(tmp_path / "b.yaml")]) == 2
    assert "--data: required" in capsys.readouterr().err


def test_missing_options_are_asked_on_a_terminal(monkeypatch):
    replies = iter(["", "train.jsonl", "", "ppo", "yes", "x"])
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda text: next(replies))
    given = dict.fromkeys(("model", "data", "test", "algorithm", "lora", "devices"))
    with pytest.raises(ConfigError, match="--devices: x: must be an integer"):
        init.get_answers(**given)
    replies = iter(["", "train.jsonl", "", "ppo", "yes"])
    a = init.get_answers(**given | {"devices": 4})
    assert a == init.Answers("embedded", "train.jsonl", None, "ppo", True, 4)

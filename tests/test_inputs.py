"""A resumed run has the same inputs and the same command as its start."""

import dataclasses
import json
import shutil

import pytest
from test_train import NO_EVAL, folder, lines, main  # noqa: F401  (folder is a fixture)

from medrlvr_jax import build
from medrlvr_jax.config import load as configs
from medrlvr_jax.data import load as data
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model import families, weights
from medrlvr_jax.rewards import user
from medrlvr_jax.rollout.rollout import encode
from medrlvr_jax.runs import inputs, log

QUESTION = {"options": ["aspirin", "heparin", "insulin"], "answer": "A"}


def questions(n, **changed):
    return [
        QUESTION | {"id": f"q{i}", "question": f"What helps sign {i}?"} | (changed if i == 5 else {})
        for i in range(n)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_changed_training_file_is_refused_unless_accepted(folder, capsys):  # noqa: F811
    """`train` refuses a changed file, and `sft` cannot resume a run of `train`."""
    file = folder / "changing.jsonl"
    write(file, questions(16))
    begun = ["train", folder / "config.yaml", "name=changing", f"data.path={file}", *NO_EVAL, "steps=1"]
    assert main(*begun) == 0
    write(file, questions(16, answer="B"))
    assert main(*begun) == 2
    told = capsys.readouterr().err
    assert f"data.path: {file}: 16 rows before, 16 now; the first that differs is number 6" in told
    assert "another name=" in told and "checkpoint.accept_changed_inputs=true" in told
    assert (
        main("replay", folder / "runs/changing", "--step", 1, "--row", 0) == 2
        and "number 6" in capsys.readouterr().err
    )
    assert [m["step"] for m in lines(folder / "runs/changing/metrics.jsonl")] == [1]
    assert main("sft", *begun[1:], "checkpoint.accept_changed_inputs=true") == 2
    assert (
        "changing was started by `medrlvr train` and cannot be resumed by `medrlvr sft`"
        in capsys.readouterr().err
    )
    assert main(*begun, "checkpoint.accept_changed_inputs=true") == 0
    assert "accepted a changed input: data.path" in capsys.readouterr().err
    assert main(*begun) == 0  # what was accepted is what later starts are held to


@pytest.mark.parametrize(("command", "record"), [("train", {"reward": 0.0}), ("sft", {"loss": 1.0})])
def test_the_command_of_an_old_run_is_recognised_by_its_metrics(tmp_path, command, record):
    c = configs.from_tree(TREE | {"runs": str(tmp_path)})
    with log.Run(c, 3, command=command) as run:
        run.resume(0)
        (run.path / "config.yaml").write_text(configs.dump(c))
        assert log.started_by(run.path) is None
        run.record(1, record)
        assert log.started_by(run.path) == command
    with log.Run(c, 3, command=command):
        assert (run.path / "config.yaml").read_text().startswith(f"# medrlvr {command}\n")
    with pytest.raises(ConfigError, match=f"started by `medrlvr {command}`"):
        log.Run(c, 3, command="eval")


TREE = {
    "name": "run",
    "steps": 3,
    "model": {"path": "embedded"},
    "data": {"path": ""},
    "prompt": {"template": "none"},
    "sample": {"questions": 8},
    "learn": {"minibatch": 8, "policy": {"lr": 1e-4}},
    "advantage": {"estimator": "group"},
    "eval": {"batch": 8},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a copy of the embedded model, a training and an evaluation file, and a reward."""
    shutil.copytree(families.resolve("embedded"), tmp_path / "model")
    write(tmp_path / "train.jsonl", questions(16))
    write(tmp_path / "dev.jsonl", questions(8))
    (tmp_path / "pay").mkdir()
    (tmp_path / "pay" / "mine.py").write_text("raise SystemExit('it is looked at, not run')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(place, going_on=True, **changes):
    """Compare the inputs as a training does before it restores a checkpoint."""
    tree = {
        "runs": str(place),
        "model": {"path": str(place / "model"), "lora": {"rank": 4}},
        "data": {"path": str(place / "train.jsonl")},
        "eval": {"batch": 8, "sets": {"dev": {"path": str(place / "dev.jsonl")}}},
        "reward": {"fn": "pay.mine:pay"},
    }
    c = configs.from_tree(TREE | tree | changes)
    parts = build.build(c)
    sets = {}
    for name, spec in {
        "data": c.data,
        **{f"eval.sets.{name}": spec for name, spec in c.eval.sets.items()},
    }.items():
        encoded = encode(parts.tokenizer, data.load(spec), c)
        sets[name] = spec, encoded.questions, encoded.tokens
    return parts, inputs.check(place, parts, sets, going_on)


def other_weights(place):
    file = place / "model" / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-2] ^= 1  # in the last element of the last tensor
    file.write_bytes(whole)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda p: write(p / "train.jsonl", questions(16)[::-1]),
            "train.jsonl: 16 rows before, 16 now; the first that differs is number 1",
        ),
        (
            lambda p: write(p / "train.jsonl", questions(17)),
            "train.jsonl: 16 rows before, 17 now; the first that differs is number 17",
        ),
        (
            lambda p: write(p / "dev.jsonl", questions(8, answer="C")),
            "eval.sets.dev.path: .*dev.jsonl: 8 rows .* is number 6",
        ),
        (
            lambda p: edit(p / "model/config.json", rope_theta=5e4),
            r"model/config.json: rope_theta: 10000.0 before, 50000.0 now",
        ),
        (
            lambda p: edit(p / "model/generation_config.json", eos_token_id=[1, 5]),
            r"tokens that end a response: \[1\] before, \[1, 5\] now",
        ),
        (other_weights, r"1 of \d+ tensors have changed, such as model"),
        (
            lambda p: (p / "pay/mine.py").write_text("pay = 1\n"),
            r"reward.fn: the content of .*mine.py has changed",
        ),
    ],
)
def test_a_changed_input_is_reported(place, change, named):
    check(place, going_on=False)
    assert check(place)[1] == []
    before = (place / inputs.NAME).read_text()
    change(place)
    with pytest.raises(ConfigError, match=named):
        check(place)
    assert (place / inputs.NAME).read_text() == before
    assert len(check(place, checkpoint={"accept_changed_inputs": True})[1]) == 1
    assert check(place)[1] == []
    assert (place / inputs.NAME).read_text() != before


def test_a_changed_chat_template_is_noticed_by_its_tokens(place):
    template = place / "model" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    chat = {"prompt": {"template": "none", "chat": True}}
    check(place, going_on=False, **chat)
    template.write_text(
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(
        ConfigError,
        match=r"train.jsonl: the same questions now have other tokens: the model's tokenizer or chat",
    ):
        check(place, **chat)


def test_other_evaluation_sets_and_old_folders_are_accepted(place):
    check(place, going_on=False)
    other = {"sets": {"dev": {"path": str(place / "train.jsonl")}}, "batch": 8}
    assert check(place, eval=other)[1] == []
    (place / inputs.NAME).unlink()
    write(place / "train.jsonl", questions(16, answer="C"))
    assert check(place)[1] == [] and (place / inputs.NAME).exists()


def test_evaluating_a_run_with_adapters_refuses_changed_base_weights(place):
    parts, _ = check(place, going_on=False)
    inputs.check_model(place, parts)
    other_weights(place)
    with pytest.raises(ConfigError, match="tensors have changed"):
        inputs.check_model(place, parts)
    whole = dataclasses.replace(parts, cfg=parts.cfg.run_with(lora=None))
    inputs.check_model(place, whole)  # a checkpoint has all of its weights
    shutil.copytree(place / "model", place / "asked_for")
    c = dataclasses.replace(
        parts.config, model=dataclasses.replace(parts.config.model, path=str(place / "asked_for"))
    )
    inputs.check_model(place, dataclasses.replace(parts, config=c))


def test_a_changed_verifier_is_refused(place):
    shutil.copytree(place / "model", place / "verifier")
    reward = {"components": [{"kind": "rule"}, {"kind": "verifier", "model": str(place / "verifier")}]}
    check(place, going_on=False, reward=reward)
    assert check(place, reward=reward)[1] == []
    other_weights(place)
    shutil.copy(place / "model/model.safetensors", place / "verifier")
    shutil.copytree(families.resolve("embedded"), place / "model", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"the verifier .*: 1 of \d+ tensors have changed"):
        check(place, reward=reward)


def test_only_some_values_of_a_large_tensor_are_read(place, monkeypatch):
    whole = weights.weight_digests(place / "model")
    monkeypatch.setattr(weights, "SAMPLED", 8)
    assert len(whole) == len(weights.weight_digests(place / "model")) and whole != weights.weight_digests(
        place / "model"
    )
    sizes = [file.stat().st_size for file in (place / "model").iterdir()]
    assert sum(sizes) > 1e6  # so that most of it was not read


def test_the_file_of_a_reward_function_is_found_without_running_it(place):
    assert user.module_digest("pay.mine:pay")["file"] == str(place / "pay" / "mine.py")
    assert user.module_digest("pay.nothing:pay") is None and user.module_digest("sys:exit") is None

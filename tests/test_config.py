"""The settings that each command requires, and the messages about combinations that cannot work."""

import pytest

from medrlvr_jax import cli
from medrlvr_jax.config import check, describe
from medrlvr_jax.config.load import dump, load
from medrlvr_jax.host.errors import ConfigError

MODEL = {"name": "mine", "model": {"path": "embedded"}}
SETS = {"eval": {"sets": {"dev": {"path": "dev.jsonl"}}}}
SFT = MODEL | {"steps": 2, "data": {"path": "train.jsonl"}, "learn": {"policy": {"lr": 1e-4}}}


TREE_OF_PASSES = SFT | {"steps": None, "passes": 3, "advantage": {"estimator": "group"}}


@pytest.mark.parametrize("given", [["steps=8"], {"steps": 8}, ["passes=null", "steps=8"]])
def test_steps_given_on_the_command_line_replace_the_passes_of_the_file(given):
    config = load(TREE_OF_PASSES, given)
    assert (config.steps, config.passes) == (8, None) and load(TREE_OF_PASSES, ["seed=1"]).passes == 3


def test_an_evaluation_requires_only_a_model_and_sets():
    for command in ("eval", "probe"):
        assert load(MODEL | SETS, ["eval.samples=2", "eval.temperature=1"], command).eval.samples == 2
    with pytest.raises(ConfigError, match=r"data: required, but not given\n.*learn: required, but not given"):
        load(MODEL | SETS)
    with pytest.raises(ConfigError, match=r"data: required, but not given"):
        load(MODEL | SETS, command="difficulty")


def test_fine_tuning_does_not_check_settings_of_rollouts():
    odd = SFT | {"sample": {"temperature": 0, "weights": "int8"}, "kl": {"into": "loss"}}
    assert load(odd, command="sft").sft.target == "answer"
    with pytest.raises(ConfigError) as e:
        load(odd, command="train")
    assert [line.split(": ")[1] for line in str(e.value).splitlines()] == [
        "sample.weights",
        "sample.temperature",
        "kl.estimator",
    ]


@pytest.mark.parametrize(
    ("command", "item", "read"),
    [
        ("train", "sft.target=text", False),
        ("train", "seed=1", True),
        ("sft", "kl.coef=0", False),
        ("sft", "learn={policy: {lr: 1}, critic: {lr: 1}}", True),  # in part
        ("eval", "learn.policy.lr=1", False),
        ("eval", "eval.sets.dev.limit=3", True),
    ],
)
def test_a_setting_that_the_command_does_not_read_is_reported(command, item, read, capsys):
    assert cli.main([command, "no.yaml", item]) == 2
    assert (
        f"medrlvr {command}: {item}: this command does not read this setting" in capsys.readouterr().err
    ) != read


def test_one_file_serves_several_commands():
    whole = SFT | SETS | {"kl": {"coef": 0.0}, "sft": {"target": "rationale"}}
    assert len({dump(load(whole, command=command)) for command in (None, *check.READS)}) == 1


def test_the_settings_that_a_command_reads_exist():
    names = {setting.name for section in describe.sections() for setting in section.settings}
    assert [name for known in check.READS.values() for name in known if name not in names] == []


BAD = [
    ({"passes": 1}, "steps: 2 and passes: 1.0: give exactly one of the two"),
    ({"prompt": {"template": "thnik"}}, "prompt.template: 'thnik': use think, direct, none, or your own"),
    ({"reward": {"mode": "direct"}}, "reward.mode: direct rewards an answer .* set prompt.template=direct"),
    ({"prompt": {"system": "Be brief."}}, "prompt.system: needs the chat template; set prompt.chat="),
    (
        {"reward": {"random": 0.5, "leak_penalty": 1}},
        "reward.random: defines the whole reward; remove reward.leak_penalty",
    ),
    ({"model": {"path": "x", "lora": {"targets": []}}}, r"model.lora.targets: \[\] would train nothing"),
    (
        {"sample": {"questions": 20}},
        "learn.minibatch: 16 does not divide .* = 20; the nearest divisors are 10, 20",
    ),
    ({"sample": {"min_new_tokens": 512}}, "sample.min_new_tokens: 512 must be below .* = 512"),
    (
        {"sample": {"max_batches": 3}},
        "sample.max_batches: 3: further batches only replace .* set that to true",
    ),
    ({"kl": {"target": 0.1, "into": "loss", "estimator": "k3"}}, "kl.target: 0.1: the adaptive coeff"),
    ({"loss": {"surrogate": "cispo", "dual_clip": 3}}, "loss.surrogate: cispo does not use .* set them to"),
    ({"log": {"profile": [5, 4]}}, r"log.profile: \[5, 4\]: the first step is after the last"),
    ({"data": {"path": "x", "pass_count": {"file": "f"}}}, "data.pass_count: has no effect without keep"),
    ({"eval": {"samples": 4}}, "eval.samples: 4 greedy samples are all equal; set eval.temperature"),
    ({"sample": {"temprature": 1}}, "sample.temprature: no such setting; did you mean temperature"),
    ({"kl": 3}, "kl: 3 must be a section with coef, into, "),
    ({"seed": -1}, "seed: -1 must be greater than or equal to 0"),
    ({"log": {"profile": 3}}, "log.profile: 3 must be a list"),
    ({"data": {"path": "x", "format": "csv"}}, "data.format: 'csv' must be 'auto', 'plain', "),
    ({"reward": {"fn": "mine"}}, "reward.fn: 'mine' must be package.module:function, such as"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_work_is_refused_by_name_value_and_remedy(change, message):
    with pytest.raises(ConfigError, match=f"config: {message}"):
        load(SFT | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"advantage.estimator: gae needs learn.critic, such as"),
        ({"advantage": {"estimator": "group"}, "sample": {"samples": 1}}, "sample.samples: 1: group"),
        (
            {"learn": {"policy": {"lr": 1}, "critic_warmup": 2}},
            "learn.critic_warmup: 2 steps would train nothing",
        ),
    ],
)
def test_critic_and_samples_must_fit_the_estimator(change, message):
    with pytest.raises(ConfigError, match=message):
        check.check_rl(load(SFT | change, command="train"))


def test_checkpoint_best_must_name_a_metric_of_the_run():
    check.check_best(load(SFT | SETS, ["checkpoint.best=eval.dev.accuracy"]))
    with pytest.raises(
        ConfigError, match=r"acuracy: this run has no such metric; did you mean eval.dev.accuracy\?"
    ):
        check.check_best(load(SFT | SETS, ["checkpoint.best=eval.dev.acuracy"]))
    with pytest.raises(
        ConfigError, match=r"best: reward: this run has no such metric; name a set of eval.sets, or"
    ):
        check.check_best(load(SFT, ["checkpoint.best=reward"]), step_metrics=())

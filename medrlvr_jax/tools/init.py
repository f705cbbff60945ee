"""`medrlvr init`: write a commented config for a user's model, data and machine.

In a terminal it asks for each option that is not given; elsewhere such options have their defaults. Sizes
depend on the data (number of questions, length of the longest prompt) and on the number of devices. Learning
rates are those of the presets.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import PromptConfig, SetConfig
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.tokenizer import load_tokenizer
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError

EMBEDDED = "embedded"
WIDTH = 32  # prompt.max_tokens is rounded up to a multiple of this
TEMPLATE = """\
# Train: medrlvr train {file}. Check: medrlvr doctor {file}. Show prompts: medrlvr data {file}.
# List all settings: medrlvr train --help
name: {name}  # the run's folder is runs/{name}
passes: {passes}  # number of passes over the training questions; or give a number of steps
model:
  path: {model}  # a Hugging Face directory or a hub name
  dtype: {dtype}  # dtype of activations
{memory}data: {{path: {data}}}  # {questions:,} questions
prompt:
  template: {template}  # think: ask for <think>…</think><answer>…</answer>; none: add no instruction
  chat: {chat}  # whether to apply the tokenizer's chat template
  max_tokens: {prompt_tokens}  # longer prompts are dropped; the longest prompt here has {longest} tokens
sample:
  questions: {batch}  # questions per step
  samples: 8  # responses to each question
  max_new_tokens: {new_tokens}  # longer responses are cut off
reward: {{mode: strict}}  # -1 for a wrong format, 0 for a wrong answer, 1 for the right answer
{objective}learn:
  minibatch: {minibatch}  # questions per optimiser step
  microbatch: {microbatch}  # questions per forward and backward pass; smaller needs less memory
  policy: {{lr: {lr}, warmup: 0.03}}
{critic}eval:
  batch: {minibatch}
  every: {every}  # steps between evaluations
{sets}checkpoint: {{every: {every}, keep: 2}}
mesh: {{data: -1, fsdp: {fsdp}}}  # fsdp: number of devices that share one copy of the weights
"""
OBJECTIVES = {
    "grpo": """\
advantage: {estimator: group}  # GRPO: compare each response with the others to the same question
kl: {coef: 0.001, into: loss, estimator: k3}  # penalise distance from the initial model
loss: {aggregate: sequence_mean, sampler_cap: 2.0}
""",
    "ppo": """\
advantage: {estimator: gae}  # PPO: a critic estimates the value of each token's state
kl: {coef: 0.01, into: reward, estimator: k1}  # penalise distance from the initial model
loss: {value_clip: 0.5, sampler_cap: 2.0}
""",
}


@dataclass(frozen=True)
class Answers:
    """The user's answers, from which the config is made."""

    model: str
    data: str
    test: str | None
    algorithm: str  # grpo or ppo
    lora: bool
    devices: int  # accelerators; 0: the CPU

    def for_this_machine(self) -> bool:
        """Return whether this machine has the devices of the config, so that it can check the config."""
        return not self.devices or (jax.default_backend() != "cpu" and jax.device_count() == self.devices)


def ask(question: str, given: Any, default: Any) -> Any:
    """Return `given`, else the user's answer if this is a terminal, else the default."""
    if given is not None or not sys.stdin.isatty():
        return default if given is None else given
    hint = "" if default is None else f" [{default}]"
    return input(f"{question}{hint}: ").strip() or default


def get_answers(**given: Any) -> Answers:
    """Return the answers, asking for each option that is None. Raise `ConfigError` for invalid ones."""
    answers = {
        "model": ask("Model: a directory or hub name", given["model"], EMBEDDED),
        "data": ask("Training questions: a file or hub name", given["data"], None),
        "test": ask("Test questions (none: Enter)", given["test"], None),
        "algorithm": ask("Algorithm, grpo or ppo", given["algorithm"], "grpo"),
    }
    lora = str(ask("Train LoRA adapters instead of all weights, yes or no", given["lora"], "no")).lower()
    devices = str(ask("Number of GPUs or TPU chips (0: the CPU)", given["devices"], "0"))
    problems = {
        "data": answers["data"] is None and "required: the training questions, such as --data train.jsonl",
        "algorithm": answers["algorithm"] not in OBJECTIVES and f"{answers['algorithm']}: use grpo or ppo",
        "lora": lora not in ("yes", "no", "true", "false") and f"{lora}: use yes or no",
        "devices": not devices.isdecimal() and f"{devices}: must be an integer",
    }
    if lines := [f"--{name}: {problem}" for name, problem in problems.items() if problem]:
        raise ConfigError("\n".join(lines))
    return Answers(**answers, lora=lora in ("yes", "true"), devices=int(devices))


def write_config(file: Path, a: Answers) -> None:
    """Read tokenizer and data, and write the config. Raise `ConfigError` if `file` cannot be created."""
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: the folder does not exist; create {file.parent} first")
    if file.exists():
        raise ConfigError(f"{file}: the file exists already; give another name")
    files.write_text(file, config_text(file, a))
    configs.load(file, command="train")


def config_text(file: Path, a: Answers) -> str:
    """Return the config as YAML with comments."""
    tokenizer, questions = load_tokenizer(a.model), data.read(SetConfig(path=a.data))[0]
    tiny, on_cpu, devices = a.model == EMBEDDED, a.devices == 0, max(1, a.devices)
    chat = bool(getattr(tokenizer.hf, "chat_template", None))
    prompt = PromptConfig(template="none" if tiny else "think", chat=chat)
    longest = max(map(len, text.encode_questions(tokenizer, questions, prompt)))
    smallest = devices * -(-8 // devices)  # a multiple of the devices
    minibatch = max(m for m in (devices, smallest) if m <= len(questions) or m == devices)
    times = max(1, min(4 if a.lora or on_cpu else 8, len(questions) // minibatch))
    rate, critic = ("3.0e-4", "1.0e-3") if tiny else ("1.0e-4", "3.0e-4") if a.lora else ("1.0e-6", "9.0e-6")
    memory = ""
    if a.lora:
        memory = "  lora: {rank: 16, alpha: 32.0}  # train adapters only\n"
        memory += "" if on_cpu else "  param_dtype: bfloat16  # dtype of the frozen weights\n"
    test = (
        f"  sets:\n    test: {{path: {_quoted(a.test)}}}\n"
        if a.test
        else "  sets: {}  # name: {path: FILE}\n"
    )
    return TEMPLATE.format(
        file=file,
        name=re.sub(r"[^A-Za-z0-9._-]", "_", file.stem).lstrip("._-") or "run",
        passes=3,
        model=_quoted(a.model),
        dtype="float32" if on_cpu else "bfloat16",
        memory=memory,
        data=_quoted(a.data),
        questions=len(questions),
        template=prompt.template,
        chat=str(prompt.chat).lower(),
        prompt_tokens=-(-longest // WIDTH) * WIDTH,
        longest=longest,
        batch=times * minibatch,
        new_tokens=48 if tiny else 512,
        objective=OBJECTIVES[a.algorithm],
        minibatch=minibatch,
        microbatch=minibatch if on_cpu else devices,
        lr=rate,
        critic=f"  critic: {{lr: {critic}, warmup: 0.03}}\n" if a.algorithm == "ppo" else "",
        every=max(1, len(questions) // (times * minibatch)),
        sets=test,
        fsdp=1 if a.lora else devices,
    )


def _quoted(value: str) -> str:
    """Return a string as YAML, in quotes if YAML would read something else without them."""
    return value if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) else "'" + value.replace("'", "''") + "'"

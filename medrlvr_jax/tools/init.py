"""`medrlvr init`: a commented config for a user's model, data and machine, which `medrlvr doctor` passes.

What is not given is asked on a terminal, and has its default elsewhere. Sizes follow from the data (number
of questions, tokens of the longest prompt) and the number of devices; rates are those of the presets.
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
WIDTH = 32  # prompt.max_tokens is a multiple of this
TEMPLATE = """\
# medrlvr train {file}
# Check it: medrlvr doctor {file}. Its prompts: medrlvr data {file}. All settings: medrlvr train --help
name: {name}  # the run's folder is runs/{name}
passes: {passes}  # over the training questions; or give steps
model:
  path: {model}  # a Hugging Face directory or a hub name
  dtype: {dtype}  # of activations
{memory}data: {{path: {data}}}  # {questions:,} questions
prompt:
  template: {template}  # think: asks for <think>…</think><answer>…</answer>; none: the question alone
  chat: {chat}  # whether to wrap it in the tokenizer's chat template
  max_tokens: {prompt_tokens}  # longer prompts are dropped; the longest here has {longest}
sample:
  questions: {batch}  # a step draws `samples` responses to each of so many questions
  samples: 8
  max_new_tokens: {new_tokens}  # of a response; a cut response has no answer
reward: {{mode: strict}}  # -1 for another format, 0 for a wrong answer, 1 for the right one
{objective}learn:
  minibatch: {minibatch}  # questions to an optimiser step
  microbatch: {microbatch}  # questions at a time; less needs less memory
  policy: {{lr: {lr}, warmup: 0.03}}
{critic}eval:
  batch: {minibatch}
  every: {every}  # steps
{sets}checkpoint: {{every: {every}, keep: 2}}
mesh: {{data: -1, fsdp: {fsdp}}}  # fsdp: how many devices share one copy of the weights
"""
OBJECTIVES = {
    "grpo": """\
advantage: {estimator: group}  # GRPO: a response is compared with the others to its question
kl: {coef: 0.001, into: loss, estimator: k3}  # holds the policy near the model that it starts from
loss: {aggregate: sequence_mean, sampler_cap: 2.0}
""",
    "ppo": """\
advantage: {estimator: gae}  # PPO: a critic says how good each token's state is
kl: {coef: 0.01, into: reward, estimator: k1}  # holds the policy near the model that it starts from
loss: {value_clip: 0.5, sampler_cap: 2.0}
""",
}


@dataclass(frozen=True)
class Answers:
    """What a config depends on."""

    model: str
    data: str
    test: str | None
    algorithm: str  # grpo or ppo
    lora: bool
    devices: int  # accelerators; 0: the CPU

    def is_here(self) -> bool:
        """Whether the config is for this machine, which can then check it."""
        return not self.devices or (jax.default_backend() != "cpu" and jax.device_count() == self.devices)


def ask(question: str, given: Any, default: Any) -> Any:
    """`given`, or the user's answer on a terminal, or the default; None where there is none."""
    if given is not None or not sys.stdin.isatty():
        return default if given is None else given
    shown = "" if default is None else f" [{default}]"
    return input(f"{question}{shown}: ").strip() or default


def answers(**given: Any) -> Answers:
    """The answers given as options, the others asked for. Raises `ConfigError` for those that cannot be."""
    model = ask("Model: a directory or hub name", given["model"], EMBEDDED)
    asked = {
        "model": model,
        "data": ask("Training questions: a file or hub name", given["data"], None),
        "test": ask("Test questions (none: Enter)", given["test"], None),
        "algorithm": ask("Algorithm, grpo or ppo", given["algorithm"], "grpo"),
    }
    lora = str(ask("Train adapters (LoRA) in place of all weights, yes or no", given["lora"], "no")).lower()
    devices = str(ask("Number of GPUs or TPU chips (0: the CPU)", given["devices"], "0"))
    problems = {
        "data": asked["data"] is None and "needed: the training questions, such as --data train.jsonl",
        "algorithm": asked["algorithm"] not in OBJECTIVES and f"{asked['algorithm']}: take grpo or ppo",
        "lora": lora not in ("yes", "no", "true", "false") and f"{lora}: take yes or no",
        "devices": not devices.isdecimal() and f"{devices}: a whole number is needed",
    }
    if lines := [f"--{name}: {problem}" for name, problem in problems.items() if problem]:
        raise ConfigError("\n".join(lines))
    return Answers(**asked, lora=lora in ("yes", "true"), devices=int(devices))


def write_config(file: Path, a: Answers) -> None:
    """Read model and data as far as sizes depend on them, and write the config; refuses an existing file."""
    if file.exists():
        raise ConfigError(f"{file}: it exists already; give another name")
    files.write_text(file, config_text(file, a))
    configs.load(file, command="train")


def config_text(file: Path, a: Answers) -> str:
    """The config as YAML with comments."""
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
        memory = "  lora: {rank: 16, alpha: 32.0}  # train adapters beside frozen weights\n"
        memory += "" if on_cpu else "  param_dtype: bfloat16  # of the frozen weights\n"
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
    """A text as YAML, in quotes where YAML would read something else."""
    return value if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) else "'" + value.replace("'", "''") + "'"

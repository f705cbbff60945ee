"""Write the model card of an export: model, training data, reward, evaluation, licence and limits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import medrlvr_jax
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.question import Question
from medrlvr_jax.evaluation import contamination
from medrlvr_jax.evaluation.answers import interval, percent
from medrlvr_jax.host import files
from medrlvr_jax.runs.console import evaluations_by_set
from medrlvr_jax.runs.log import started_by

RUN = """\
```python
from transformers import pipeline

ask = pipeline("text-generation", model="{place}")
prompt = {prompt}
print(ask(prompt, max_new_tokens={new_tokens}, return_full_text=False)[0]["generated_text"])
```
"""
LIMITS = """\
- **Not for clinical use.** This is a research artefact. Its answers and its reasoning can be wrong even if
  they sound confident, and no clinician has reviewed them.
- It was trained on questions with known answers. Its performance on clinical notes, in dialogue, in other
  languages or on patients was not measured.
- The reward depends on the format and on the final answer. The reasoning is not rewarded for being true.
- Biases of the base model and of the questions remain. Accuracy by patient group was not measured.
"""


def card(run: Path, config: Config, step: int, base: Path, place: str, adapter: bool) -> str:
    """Return README.md for an export of the run's checkpoint `step`.

    `base`: the directory of the base model. `place`: the directory or hub name of the export.
    """
    records = files.read_jsonl(run / "metrics.jsonl")
    on_hub = config.model.path.count("/") == 1 and not Path(config.model.path).exists()
    head: dict[str, Any] = {
        **({"base_model": config.model.path} if on_hub else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["medical", "reinforcement-learning", "medrlvr-jax"],
    }
    if licence := licence_of(base):
        head["license"] = licence
    blank = Question("", "{question}", ("{option A}", "{option B}"), 0)
    sections = {
        "What it is": describe_training(run, config, step),
        "How to run it": how_to_run(config, text.render(blank, config.prompt.template), place, adapter),
        "Training data": describe_data(run, config),
        "Reward": f"```yaml\n{yaml.safe_dump(configs.to_tree(config.reward), sort_keys=False)}```",
        "Evaluation": "\n".join(evaluation_table(run / f"eval-{step}", records)),
        "Contamination": describe_contamination(run),
        "Licence": licence_text(config, licence),
        "Limits": LIMITS.strip(),
        "All settings": f"```yaml\n{configs.dump(config)}```",
    }
    body = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {config.name}\n\n{body}\n"


def describe_training(run: Path, config: Config, step: int) -> str:
    method = "fine-tuning" if started_by(run) == "sft" else "reinforcement learning from verifiable rewards"
    if started_by(run) != "sft":
        method += f" (advantage estimator `{config.advantage.estimator}`)"
    trained = "adapters (LoRA)" if config.model.lora else "all weights"
    version = f"by medrlvr_jax {medrlvr_jax.__version__}"
    return f"`{config.model.path}` after {step} steps of {method}, {trained}, {version}."


def how_to_run(config: Config, wording: str, place: str, adapter: bool) -> str:
    if adapter:
        return f"Load it with PEFT onto `{config.model.path}`. The prompt:\n\n```\n{wording}\n```"
    prompt: Any = f"{wording}\n{config.prompt.prefill}"
    if config.prompt.chat:
        system = [{"role": "system", "content": config.prompt.system}] if config.prompt.system else []
        started = [{"role": "assistant", "content": config.prompt.prefill}] if config.prompt.prefill else []
        prompt = [*system, {"role": "user", "content": wording}, *started]
    lines = RUN.format(place=place, prompt=repr(prompt), new_tokens=config.sample.max_new_tokens)
    stops = "generation_config.json holds the stop tokens of the training"
    return f"This is the prompt of the training; {stops}.\n\n{lines.rstrip()}"


def describe_data(run: Path, config: Config) -> str:
    summary = run / "summary.json"
    known = json.loads(summary.read_text(encoding="utf-8")).get("data", {}) if summary.exists() else {}
    rows = f", {known['train']['n']:,} rows, sha256 `{known['train']['sha256']}`" if "train" in known else ""
    return f"`{config.data.path}`{rows}."


def evaluation_table(folder: Path, records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of all sets before and after training, and of the sets of `medrlvr eval` in `folder`."""
    yield "Right answers with 95 % intervals over questions.\n"
    yield "| set | questions | before training | after training |"
    yield "|---|---|---|---|"
    sets = evaluations_by_set(records)
    for name, when in sets.items():
        shares = [percent(interval(c)) if (c := when.get(k)) else "–" for k in ("before", "after")]
        last = when.get("after") or when["before"]
        yield f"| {name} | {last.get('questions', last['n']):,} | {shares[0]} | {shares[1]} |"
    file = folder / "eval.json"
    later = json.loads(file.read_text(encoding="utf-8"))["eval"] if file.exists() else {}
    for name, c in later.items():
        yield f"| {name}, by `medrlvr eval` | {c['questions']:,} | – | {percent(interval(c))} |"
    if not sets and not later:
        yield "| no set was evaluated | – | – | – |"


def describe_contamination(run: Path) -> str:
    """Return the result of `medrlvr contamination … --out RUN/contamination.json`, if it is there."""
    file = run / "contamination.json"
    if not file.exists():
        return "Not checked. The training data may contain questions of the test sets."
    return f"```\n{contamination.show(files.read_json(file, 'write it again'))}\n```"


def licence_of(base: Path) -> str | None:
    """Return the licence in the base model's own card, or None."""
    file = base / "README.md"
    parts = file.read_text(encoding="utf-8").split("---\n") if file.exists() else []
    if len(parts) < 3 or parts[0]:
        return None
    head = configs.parse_yaml(parts[1], str(file), "repair its front matter, or remove the file")
    return head.get("license") if isinstance(head, dict) else None


def licence_text(config: Config, licence: str | None) -> str:
    name = f"`{licence}`" if licence else "not named in its directory: look it up before you publish"
    terms = "applies to these weights. The licence of the training data may add terms"
    return f"The licence of `{config.model.path}` ({name}) {terms}."

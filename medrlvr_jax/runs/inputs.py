"""Record digests of a run's inputs (questions, prompts, weights, reward functions) in `inputs.json`.

Settings name files and folders, whose contents may change between two starts of a run. Without a check the
run would silently continue on other data. So a run that resumes compares its inputs with the record. It
refuses to start if anything differs, unless `checkpoint.accept_changed_inputs` is set. With several
processes, process 0 compares and decides for all. A run of an older version without the file gets one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medrlvr_jax.build import Parts
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.reward import FunctionConfig, VerifierConfig
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.question import Question, fingerprint
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import from_leader
from medrlvr_jax.model import families, weights
from medrlvr_jax.rewards import user
from medrlvr_jax.rewards.components import list_components

NAME = "inputs.json"
MARK = 4  # hex digits of each row's digest that are stored, to find the first row that differs

Sets = dict[str, tuple[SetConfig, list[Any], list[Any]]]  # by name: settings, rows, tokens of the rows


def check(
    folder: Path,
    parts: Parts,
    sets: Sets,
    resumed: bool = True,
    rewards: Sequence[dict[str, Any]] = (),
    write: bool = True,
) -> list[str]:
    """Compare the inputs with the folder's record if the run resumes, then write the new record.

    `sets`: the training set as `data` and the evaluation sets as `eval.sets.<name>`. `rewards`: the result of
    `training.describe_callables`. `write`: False to compare only. Returns the accepted differences. Raises
    `ConfigError` in every process if there are differences that are not accepted.
    """
    accept = parts.config.checkpoint.accept_changed_inputs

    def compare() -> list[str]:
        old, new = _read(folder) if resumed else {}, describe(parts, sets, rewards)
        changed = differences(old, new)
        if write and (accept or not changed):
            files.write_json(folder / NAME, new | {"sets": old.get("sets", {}) | new["sets"]})
        return changed

    return _refuse(folder, from_leader(compare), accept)


def check_model(folder: Path, parts: Parts) -> None:
    """Raise `ConfigError` if the model differs from the one that the run was trained from.

    Weights are compared only if checkpoints lack some of them: below adapters, or of a frozen vision tower.
    """
    execution = parts.cfg.execution
    frozen = execution.lora or (parts.cfg.vision and execution.tower != "train")

    def compare() -> list[str]:
        old, new = _read(folder), {"model": _model(parts)}
        if old.get("model", {}).get("path") != new["model"]["path"]:
            return []  # the user has chosen another model
        return differences(old, new | ({"weights": _weights(parts)} if frozen else {}))

    _refuse(folder, from_leader(compare), parts.config.checkpoint.accept_changed_inputs)


def describe(parts: Parts, sets: Sets, rewards: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the record of the current inputs."""
    sections = [component.settings for component in list_components(parts.config.reward)]
    functions = [section.fn for section in sections if isinstance(section, FunctionConfig)]
    verifiers = {s.model for s in sections if isinstance(s, VerifierConfig) and s.url is None}
    return {
        "sets": {name: describe_set(*rows) for name, rows in sets.items()},
        "stop_ids": list(parts.tokenizer.stop_ids),
        "model": _model(parts),
        "weights": _weights(parts),
        "functions": {fn: user.module_digest(fn) for fn in functions},
        "rewards": list(rewards),
        "verifiers": {path: weights.weight_digests(path) for path in sorted(verifiers)},
    }


def _model(parts: Parts) -> dict[str, Any]:
    path = parts.config.model.path
    settings = dataclasses.asdict(families.read_config(path))
    return {"path": path, "settings": {k: str(v) for k, v in settings.items() if k != "execution"}}


def _weights(parts: Parts) -> dict[str, str]:
    model = parts.config.model
    return weights.weight_digests(model.path) if model.init == "pretrained" else {}


def describe_set(spec: SetConfig, rows: list[Any], tokens: list[Any]) -> dict[str, Any]:
    """Return digests of a set's rows, in order, and of their tokens, which also depend on the tokenizer."""
    key = lambda q: q.answer if q.value is None else q.value
    fields = lambda q: [q.id, q.question, *filter(None, [q.options]), key(q)]
    plain_rows = [fields(row) if isinstance(row, Question) else row for row in rows]
    marks = "".join(fingerprint([row])["sha256"][:MARK] for row in plain_rows)
    digest = fingerprint(plain_rows) | {"marks": marks, "tokens": fingerprint(tokens)["sha256"]}
    return {"from": configs.to_tree(spec)} | digest


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each input that is in both records and differs."""
    out = [line for name in new.get("sets", {}) for line in _set_differences(name, old, new)]
    if "stop_ids" in new and (before := old.get("stop_ids", new["stop_ids"])) != (now := new["stop_ids"]):
        out.append(f"model.path: the tokens that end a response: {before} before, {now} now")
    path, now = new["model"]["path"], new["model"]["settings"]
    before = old.get("model", {}).get("settings", {})
    for k in before.keys() & now.keys():
        if before[k] != now[k]:
            out.append(f"model.path: {path}/config.json: {k}: {before[k]} before, {now[k]} now")
    if (before := old.get("weights")) is not None and (now := new.get("weights")) is not None:
        out += _weight_differences(f"model.path: {path}", before, now)
    for name, now in new.get("verifiers", {}).items():
        if before := old.get("verifiers", {}).get(name):
            out += _weight_differences(f"reward.components: the verifier {name}", before, now)
    for name, now in new.get("functions", {}).items():
        before = old.get("functions", {}).get(name) or old.get("reward.fn")  # before components: one function
        if before and now and before["sha256"] != now["sha256"]:
            out.append(f"reward.fn: the content of {now['file']} has changed")
    if old and "rewards" in new:
        out += _reward_differences(old.get("rewards", []), new["rewards"])
    return out


def _weight_differences(place: str, old: dict[str, str], new: dict[str, str]) -> list[str]:
    changed = sorted(k for k in old | new if old.get(k) != new.get(k))
    count = f"{len(changed)} of {len(new)} tensors"
    return [f"{place}: {count} have changed, such as {changed[0]}"] if changed else []


def _set_differences(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, now = old.get("sets", {}).get(name), new["sets"][name]
    if before is None or (name != "data" and before["from"] != now["from"]):
        return []  # a resumed run may evaluate other sets
    place = f"{name}.path: {now['from']['path']}"
    if before["sha256"] != now["sha256"]:
        marks = ([d["marks"][i : i + MARK] for i in range(0, len(d["marks"]), MARK)] for d in (before, now))
        pairs = enumerate(zip(*marks, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(before["n"], now["n"]))
        rows = f"{before['n']:,} rows before, {now['n']:,} now"
        return [f"{place}: {rows}; the first that differs is number {first + 1:,}"]
    if before["tokens"] != now["tokens"]:
        cause = "the model's tokenizer or chat template has changed"
        return [f"{place}: the same questions now have other tokens: {cause}"]
    return []


def _reward_differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    if (before := _list_rewards(old)) != (now := _list_rewards(new)):
        return [f"rewards: {before} before, {now} now"]
    changed = [b["name"] for a, b in zip(old, new, strict=True) if a["sha256"] != b["sha256"]]
    return [f"rewards: the source code of {name} has changed" for name in changed]


def _list_rewards(rewards: list[dict[str, Any]]) -> str:
    return ", ".join(f"{reward['name']} × {reward['weight']:g}" for reward in rewards) or "no callables"


def _read(folder: Path) -> dict[str, Any]:
    file, remedy = folder / NAME, "remove it, and the run will accept the current inputs"
    return files.read_json(file, remedy) if file.exists() else {}


def _refuse(folder: Path, changed: list[str], accept: bool) -> list[str]:
    if changed and not accept:
        remedy = "restore them, give this run another name=, or set checkpoint.accept_changed_inputs=true"
        head = f"{folder}: inputs of this run have changed; {remedy}:"
        raise ConfigError("\n".join([head, *(f"  {line}" for line in changed)]))
    return changed

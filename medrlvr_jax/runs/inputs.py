"""What a run's settings point to, in `runs/<name>/inputs.json`: questions, prompts, weights, a user's reward. Settings name files and
folders; what is in those may change between two starts of one run, and a curve of two would come of it without a word.

A run that goes on from a checkpoint compares all of it with what is there now, and is refused, by name, where anything differs, unless
`checkpoint.accept_changed_inputs` says that it is meant. Several processes: the first one looks, and decides for all. A folder without the
file, begun by an earlier version, goes on and gets one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medrlvr_jax.build import Parts
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import SetConfig
from medrlvr_jax.data.question import Question, fingerprint
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.host.processes import from_leader
from medrlvr_jax.model import weights
from medrlvr_jax.rewards import user

NAME = "inputs.json"
MARK = 4  # hex digits of each row's digest: they name the first row that differs; whether any does, the whole digest tells

Sets = dict[str, tuple[SetConfig, list[Any], list[Any]]]  # by name: where its rows are from, the rows, their tokens


def check(folder: Path, parts: Parts, sets: Sets, going_on: bool, rewards: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Compare with the folder's record if the run goes on from a checkpoint, then write the record.

    `sets` has what is trained on by the name `data`, evaluation sets by `eval.sets.<name>`; `rewards` are the callables that
    pay, as `user.Rewards.record` has them. Returns the differences that were accepted; raises `ConfigError`, in every
    process, for those that were not.
    """
    accept = parts.config.checkpoint.accept_changed_inputs

    def look() -> list[str]:
        there, here = _read(folder) if going_on else {}, take(parts, sets, rewards)
        changed = differences(there, here)
        if accept or not changed:
            files.write_json(folder / NAME, here | {"sets": there.get("sets", {}) | here["sets"]})
        return changed

    return _refuse(folder, from_leader(look), accept)


def check_model(folder: Path, parts: Parts) -> None:
    """Whether the model under a run's checkpoints is the one it was trained on: its settings and, beneath adapters, its weights."""

    def look() -> list[str]:
        there, here = _read(folder), {"model": _model(parts)} | ({"weights": _weights(parts)} if parts.cfg.lora else {})
        same = there.get("model", {}).get("path") == here["model"]["path"]  # else another model was asked for
        return differences(there, here) if same else []

    _refuse(folder, from_leader(look), parts.config.checkpoint.accept_changed_inputs)


def check_replay(folder: Path, parts: Parts, sets: Sets) -> None:
    """As `check` where a run goes on, but nothing is written."""
    _refuse(folder, differences(_read(folder), take(parts, sets)), parts.config.checkpoint.accept_changed_inputs)


def take(parts: Parts, sets: Sets, rewards: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The record of what is there now."""
    return {
        "sets": {name: of_rows(*of) for name, of in sets.items()},
        "stop_ids": list(parts.tokenizer.stop_ids),
        "model": _model(parts),
        "weights": _weights(parts),
        "reward.fn": user.source_digest(parts.config.reward.fn) if parts.config.reward.fn else None,
        "rewards": list(rewards),
    }


def _model(parts: Parts) -> dict[str, Any]:
    path = parts.config.model.path
    return {"path": path, "settings": {k: str(v) for k, v in dataclasses.asdict(weights.read_config(path)).items()}}


def _weights(parts: Parts) -> dict[str, str]:
    model = parts.config.model
    return weights.weight_digests(model.path) if model.init == "pretrained" else {}


def of_rows(spec: SetConfig, rows: list[Any], tokens: list[Any]) -> dict[str, Any]:
    """Digests of a set's rows in their order, and of the tokens that tokenizer, chat template and wording make of them."""
    asked = [[q.id, q.question, q.options, q.answer] if isinstance(q, Question) else q for q in rows]
    marks = "".join(fingerprint([row])["sha256"][:MARK] for row in asked)
    return {"from": configs.to_tree(spec)} | fingerprint(asked) | {"marks": marks, "tokens": fingerprint(tokens)["sha256"]}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A line for each thing that both records have and that is another now."""
    out = []
    for name, new in here.get("sets", {}).items():
        old = there.get("sets", {}).get(name)
        if old is None or (name != "data" and old["from"] != new["from"]):  # a resumed run may have other evaluation sets
            continue
        where = f"{name}.path: {new['from']['path']}"
        if old["sha256"] != new["sha256"]:
            pairs = zip(*([d["marks"][i : i + MARK] for i in range(0, len(d["marks"]), MARK)] for d in (old, new)), strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(old["n"], new["n"]))
            out.append(f"{where}: {old['n']:,} rows there, {new['n']:,} now; the first that differs is number {first + 1:,}")
        elif old["tokens"] != new["tokens"]:
            out.append(f"{where}: the same questions are other tokens now: tokenizer or chat template of the model have changed")
    if "stop_ids" in here and there.get("stop_ids", here["stop_ids"]) != here["stop_ids"]:
        out.append(f"model.path: the tokens that end a response: {there['stop_ids']} there, {here['stop_ids']} now")
    path, old, new = here["model"]["path"], there.get("model", {}).get("settings", {}), here["model"]["settings"]
    out += [f"model.path: {path}/config.json: {k}: {old[k]} there, {new[k]} now" for k in old.keys() & new.keys() if old[k] != new[k]]
    old, new = there.get("weights"), here.get("weights")
    if old is not None and new is not None and (others := sorted(k for k in old | new if old.get(k) != new.get(k))):
        out.append(f"model.path: {path}: {len(others)} of {len(new)} tensors have other values now, such as {others[0]}")
    old, new = there.get("reward.fn"), here.get("reward.fn")
    if old and new and old["sha256"] != new["sha256"]:
        out.append(f"reward.fn: {new['file']} has other contents now")
    if there and "rewards" in here:
        old, new = there.get("rewards", []), here["rewards"]
        if (before := _listed(old)) != (now := _listed(new)):
            out.append(f"rewards: {before} there, {now} now")
        else:
            edited = [b["name"] for a, b in zip(old, new, strict=True) if a["sha256"] != b["sha256"]]
            out += [f"rewards: {name} has another source text now" for name in edited]
    return out


def _listed(rewards: list[dict[str, Any]]) -> str:
    return ", ".join(f"{reward['name']} × {reward['weight']:g}" for reward in rewards) or "no callable"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / NAME
    return files.read_json(file, "remove it, and the run goes on with what is there now") if file.exists() else {}


def _refuse(folder: Path, changed: list[str], accept: bool) -> list[str]:
    if changed and not accept:
        remedy = "put back what it was begun with, give this run another name=, or set checkpoint.accept_changed_inputs=true if it is meant"
        raise ConfigError("\n".join([f"{folder}: what its settings point to has changed; {remedy}:", *(f"  {line}" for line in changed)]))
    return changed

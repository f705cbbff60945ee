"""The file of `medrlvr reproduce`: arms that differ in settings. An arm has a cell for each seed.

`common` holds the settings of a config, and each arm changes some of them. The field `by` of an arm names its
command: train, sft, eval (a model without training) or difficulty (which counts the right samples of each
training question, and has no row in the table). `like` names an arm above, from which it takes its settings.
`after` names an arm above, from which it starts, seed by seed: from that arm's policy, or, of an arm by
difficulty, with its counts as `data.pass_count.file`. A cell writes into runs/<name>/:

    <arm>-<seed>.yaml     its settings; if they have changed since, the cell is refused
    <arm>-<seed>.log      the output of its commands
    <arm>-<seed>/         the run with its evaluation in eval/, and hf/ if another arm starts from it; of an
                          arm by difficulty only counts.jsonl
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from medrlvr_jax.config import check
from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config
from medrlvr_jax.config.section import Name, section, validate
from medrlvr_jax.host.errors import ConfigError

Seeds = Annotated[tuple[int, ...], Field(min_length=1)]


@section
class Arm:
    """One row of the table. Fields that are null come from the arm `like`, if it is given."""

    by: Literal["train", "sft", "eval", "difficulty"] | None = None
    like: str | None = None
    after: str | None = None  # an arm by train, sft or difficulty
    seeds: Seeds | None = None  # null: those of the file. A greedy evaluation of one model needs only one
    settings: dict[str, Any] = Field(default_factory=dict)


@section
class Claims:
    """The arms on which the paper's claims are tested (claims.py)."""

    sft: str  # fine-tuning on answers alone; all other arms are compared with it
    rl: Annotated[tuple[str, ...], Field(min_length=1)]
    base: str | None = None  # the model before training
    no_think: str | None = None  # RL without a thought
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05  # arms match if their accuracies differ by less


@section
class Experiment:
    """The file. The first of `common.eval.sets` is in distribution, the others are out of distribution."""

    name: Name
    runs: str = "runs"
    seeds: Seeds = (0, 1, 2)
    common: dict[str, Any]
    arms: dict[Name, Arm]
    claims: Claims

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


@dataclass
class Cell:
    """One arm with one seed."""

    arm: str
    by: str
    config: Config
    parent: "Cell | None"
    exported: bool = False  # whether another cell starts from its policy

    @property
    def path(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def record(self) -> str:
        """Return the content of its .yaml: the command and the settings."""
        return f"{self.origin()}\n{configs.dump(self.config)}"

    def origin(self) -> str:
        """Return its command, with a digest of the run that it starts from.

        The digest leaves out settings that have their default, so that a new setting does not change it.
        """
        if self.parent is None:
            return f"# medrlvr {self.by}"
        settings = configs.flat(configs.to_tree(self.parent.config))
        defaults = configs.default_settings()
        changed = sorted((k, v) for k, v in settings.items() if v != defaults.get(k))
        digest = hashlib.sha256(f"{self.parent.origin()} {changed}".encode()).hexdigest()[:16]
        return f"# medrlvr {self.by}, from {self.parent.path.name} {digest}"

    def commands(self) -> list[list[str]]:
        """Return the commands that remain. A command is done when the last file that it writes exists."""
        run, file = str(self.path), str(self.beside(".yaml"))
        if self.by == "difficulty":
            return [] if self.counts.exists() else [["difficulty", file, "--out", str(self.counts)]]
        evaluated = ["eval", file if self.by == "eval" else run, "--out", f"{run}/eval"]
        steps = [(evaluated, self.path / "eval" / "eval.json")]
        if self.by != "eval":
            steps.insert(0, ([self.by, file], self.path / "summary.json"))
        if self.exported:
            as_trained = ["--dtype", self.config.model.param_dtype]
            steps.append((["export", run, f"{run}/hf", *as_trained], self.path / "hf" / "config.json"))
        return [command for command, last_file in steps if not last_file.exists()]

    @property
    def counts(self) -> Path:
        return self.path / "counts.jsonl"

    @property
    def finished(self) -> bool:
        return not self.commands()


def read(path: str | Path, settings: list[str]) -> tuple[Experiment, list[Cell]]:
    """Read and check the file. Returns it and its cells.

    `settings` are overrides `a.b=value` of a field of the file, or else of a setting of all cells.
    """
    tree = configs.read_yaml(path, "see configs/reproduce_tiny.yaml for an example")
    if not isinstance(tree, dict):
        example = "configs/reproduce_tiny.yaml shows how"
        raise ConfigError(f"{path}: name, common, arms and claims are needed; {example}")
    of_cells = [s for s in settings if s.split("=")[0].split(".")[0] not in Experiment.__dataclass_fields__]
    for item in settings:
        if item not in of_cells:
            configs.override(tree, item)
    experiment = validate(Experiment, tree, f"{path}: ")
    c = experiment.claims
    for field, names in {"sft": [c.sft], "rl": c.rl, "base": [c.base], "no_think": [c.no_think]}.items():
        if lost := [name for name in names if name is not None and name not in experiment.arms]:
            have = ", ".join(experiment.arms)
            raise ConfigError(f"{path}: claims.{field}: {lost[0]}: no such arm; there are {have}")
    return experiment, _cells(experiment, of_cells, str(path))


def _cells(experiment: Experiment, of_cells: list[str], source: str) -> list[Cell]:
    """Return the cells of all arms in the file's order. Raises `ConfigError` if one of them cannot run."""
    merged: dict[str, Arm] = {}  # arms by name, with the fields that they take from `like`
    cells: dict[tuple[str, int], Cell] = {}
    for name, arm in experiment.arms.items():
        where = f"{source}: arms.{name}"
        for field, other in (("like", arm.like), ("after", arm.after)):
            if other is not None and other not in merged:
                above = ", ".join(merged) or "none"
                raise ConfigError(f"{where}.{field}: {other}: no arm above this one; above are {above}")
        like = merged[arm.like] if arm.like else Arm(settings=experiment.common)
        merged[name] = arm = Arm(
            by=arm.by or like.by,
            after=arm.after or like.after,
            seeds=arm.seeds or like.seeds,
            settings=merge(like.settings, arm.settings),
        )
        if arm.by is None:
            raise ConfigError(f"{where}.by: missing; set it to train, sft, eval or difficulty")
        for seed in arm.seeds or experiment.seeds:
            place = {"name": f"{name}-{seed}", "runs": str(experiment.folder), "seed": seed}
            tree = merge(arm.settings, place)
            for item in of_cells:
                configs.override(tree, item)
            parent = cells.get((arm.after or "", seed))
            if arm.after and (parent is None or parent.by == "eval"):
                why = f"has no seed {seed}" if parent is None else "is by eval, which trains nothing"
                raise ConfigError(f"{where}.after: {arm.after} {why}")
            if parent and parent.by == "difficulty":
                tree = merge(tree, {"data": {"pass_count": {"file": str(parent.counts)}}})
            elif parent:
                parent.exported = True
                tree = merge(tree, {"model": {"path": str(parent.path / "hf"), "init": "pretrained"}})
            config = configs.from_tree(tree, where)
            if arm.by == "train":
                check.check_rl(config)
            if not config.eval.sets:
                raise ConfigError(f"{where}: eval.sets: none; the first is in distribution, others out of it")
            cells[name, seed] = Cell(name, arm.by, config, parent)
    return list(cells.values())


def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return a new tree in which the settings of b replace those of a."""
    out = copy.deepcopy(a)
    for key, value in b.items():
        if isinstance(value, dict):
            value = merge(out[key] if isinstance(out.get(key), dict) else {}, value)
        out[key] = value
    return out


def check_same(cells: list[Cell]) -> None:
    """Raise `ConfigError` for cells that were started with other settings, naming all of them.

    A setting that is missing in a cell's file had its default.
    """
    complaints = []
    for cell in cells:
        file = cell.beside(".yaml")
        if cell.path.exists() and not file.exists():
            complaints.append(f"  {cell.path.name}: there is no {file.name} beside it with its settings")
        elif file.exists():
            text = file.read_text(encoding="utf-8")
            tree = configs.parse_yaml(text, str(file), "repair or remove it")
            then, now = map(configs.settings_of, (tree, configs.to_tree(cell.config)))
            changes = configs.differences(then, now)
            if text.splitlines()[0] != cell.origin():
                changes.append("its command, or the run it starts from, has changed")
            if changes:
                complaints.append(f"  {cell.path.name}: {'; '.join(changes)}")
    if complaints:
        remedy = "give another name= or the same settings, or delete each's folder and .yaml to run it anew"
        head = f"{cells[0].path.parent}: cells were started with other settings; {remedy}:"
        raise ConfigError("\n".join([head, *complaints]))

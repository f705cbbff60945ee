"""The file of `medrlvr reproduce`: arms that differ in settings, and their cells, one for each seed.

`common` holds the settings of any config; an arm changes some of them. It is `by` train, sft or eval (of a model as it is), may be
`like` an arm above it, and may start `after` one: from its policy, seed by seed. What a cell leaves in runs/<name>/:

    <arm>-<seed>.yaml     its settings; a cell whose settings have changed since is refused, never taken for the same
    <arm>-<seed>.log      what its commands said
    <arm>-<seed>/         the run, with eval/ (every answer to every set) and, where another arm starts from it, hf/
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from medrlvr_jax.config import load as configs
from medrlvr_jax.config.schema import Config, section
from medrlvr_jax.host.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Seeds = Annotated[tuple[int, ...], Field(min_length=1)]
NEEDED: dict[str, Any] = {"name": "x", "model": {"path": ""}, "data": {"path": ""}, "learn": {"policy": {"lr": 0}}}  # have no default
DEFAULTS = configs.flat(configs.to_tree(pydantic.TypeAdapter(Config).validate_python(NEEDED)))


@section
class Arm:
    """One row of the table. What is null is as in `like`, if that is given."""

    by: Literal["train", "sft", "eval"] | None = None
    like: str | None = None
    after: str | None = None  # an arm by train or sft
    seeds: Seeds | None = None  # null: the file's. A greedy evaluation of one model needs but one
    settings: dict[str, Any] = Field(default_factory=dict)


@section
class Claims:
    """Which arms the paper's claims are read from (claims.py)."""

    sft: str  # answer-only fine-tuning; every other arm is tested against it
    rl: Annotated[tuple[str, ...], Field(min_length=1)]
    base: str | None = None  # the model before any training
    no_think: str | None = None  # RL whose responses are the answer alone
    margin: Annotated[float, Field(gt=0, lt=1)] = (
        0.05  # two arms match if they are shown to differ by less than this share of the questions
    )


@section
class Experiment:
    """A whole file. The first of `common.eval.sets` is in distribution, the others are out of it."""

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
    exported: bool = False  # another cell starts from it

    @property
    def path(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def record(self) -> str:
        """What its .yaml is to hold: its command, then its settings."""
        return f"{self.origin()}\n{configs.dump(self.config)}"

    def origin(self) -> str:
        """Its command, and all settings of the run it starts from that are not the defaults: one that is added later changes nothing."""
        if self.parent is None:
            return f"# medrlvr {self.by}"
        own = {k: v for k, v in configs.flat(configs.to_tree(self.parent.config)).items() if v != DEFAULTS.get(k)}
        digest = hashlib.sha256(f"{self.parent.origin()} {sorted(own.items())}".encode()).hexdigest()[:16]
        return f"# medrlvr {self.by}, from {self.parent.path.name} {digest}"

    def commands(self) -> list[list[str]]:
        """Those still to run: each is done once its last file is there."""
        run, file = str(self.path), str(self.beside(".yaml"))
        steps = [(["eval", file if self.by == "eval" else run, "--out", f"{run}/eval"], self.path / "eval" / "eval.json")]
        if self.by != "eval":
            steps.insert(0, ([self.by, file], self.path / "summary.json"))
        if self.exported:
            steps.append((["export", run, f"{run}/hf"], self.path / "hf" / "config.json"))
        return [command for command, made in steps if not made.exists()]

    @property
    def finished(self) -> bool:
        return not self.commands()


def read(path: str | Path, settings: list[str]) -> tuple[Experiment, list[Cell]]:
    """The file and its cells. `a.b=value` replaces a field of the file or, of any other name, that setting in every cell."""
    tree = configs.read_yaml(path, "configs/reproduce_tiny.yaml is one that can be")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: name, common, arms and claims are needed; configs/reproduce_tiny.yaml shows how")
    everywhere = [item for item in settings if item.split("=")[0].split(".")[0] not in Experiment.__dataclass_fields__]
    for item in settings:
        if item not in everywhere:
            configs.override(tree, item)
    try:
        experiment = pydantic.TypeAdapter(Experiment).validate_python(tree)
    except pydantic.ValidationError as e:
        said = [f"{path}: {'.'.join(map(str, error['loc']))}: {error['input']!r:.80}: {error['msg']}" for error in e.errors()]
        raise ConfigError("\n".join(said)) from None
    claims = experiment.claims
    for field, names in {"sft": [claims.sft], "rl": claims.rl, "base": [claims.base], "no_think": [claims.no_think]}.items():
        if lost := [name for name in names if name is not None and name not in experiment.arms]:
            raise ConfigError(f"{path}: claims.{field}: {lost[0]}: no such arm; there are {', '.join(experiment.arms)}")
    return experiment, _cells(experiment, everywhere, str(path))


def _cells(experiment: Experiment, everywhere: list[str], source: str) -> list[Cell]:
    """Every arm with each of its seeds, in the file's order, which has an arm after what it starts from; each config checked."""
    whole: dict[str, Arm] = {}  # with what they have of others
    made: dict[tuple[str, int], Cell] = {}
    for name, arm in experiment.arms.items():
        where = f"{source}: arms.{name}"
        for field, other in (("like", arm.like), ("after", arm.after)):
            if other is not None and other not in whole:
                raise ConfigError(f"{where}.{field}: {other}: no arm above this one; above are {', '.join(whole) or 'none'}")
        like = whole[arm.like] if arm.like else Arm(settings=experiment.common)
        whole[name] = arm = Arm(
            by=arm.by or like.by,
            after=arm.after or like.after,
            seeds=arm.seeds or like.seeds,
            settings=merge(like.settings, arm.settings),
        )
        if arm.by is None:
            raise ConfigError(f"{where}.by: needed, and not given: train, sft or eval")
        for seed in arm.seeds or experiment.seeds:
            tree = merge(arm.settings, {"name": f"{name}-{seed}", "runs": str(experiment.folder), "seed": seed})
            for item in everywhere:
                configs.override(tree, item)
            parent = made.get((arm.after or "", seed))
            if arm.after and (parent is None or parent.by == "eval"):
                why = f"has no seed {seed}" if parent is None else "is by eval, which trains nothing"
                raise ConfigError(f"{where}.after: {arm.after} {why}")
            if parent:
                parent.exported = True
                tree = merge(tree, {"model": {"path": str(parent.path / "hf"), "init": "pretrained"}})
            config = configs.from_tree(tree, where)
            if arm.by == "train":
                configs.check_rl(config)
            if not config.eval.sets:
                raise ConfigError(f"{where}: eval.sets: none; the first is to be in distribution, the others out of it")
            made[name, seed] = Cell(name, arm.by, config, parent)
    return list(made.values())


def merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """b over a, section by section; a new tree."""
    both = {k: merge(a[k] if isinstance(a.get(k), dict) else {}, v) if isinstance(v, dict) else v for k, v in b.items()}
    return {k: merge(v, {}) if isinstance(v, dict) else v for k, v in a.items()} | both


def check_same(cells: list[Cell]) -> None:
    """Refuse, by name, all cells that were begun with other settings; one that was not yet there then had its default."""
    complaints = []
    for cell in cells:
        file = cell.beside(".yaml")
        if cell.path.exists() and not file.exists():
            complaints.append(f"  {cell.path.name}: there is no {file.name} beside it to tell them")
        elif file.exists():
            text = file.read_text(encoding="utf-8")
            there, here = (configs.flat(configs.parse_yaml(t, str(file), "repair or remove it")) for t in (text, cell.record()))
            pairs = {k: (there.get(k, DEFAULTS.get(k)), here.get(k)) for k in here | there}
            found = [f"{k}: {old!r} there, {new!r} now" for k, (old, new) in pairs.items() if old != new]
            if text.splitlines()[0] != cell.origin():
                found.append("its command, or the run it starts from, is another")
            if found:
                complaints.append(f"  {cell.path.name}: {'; '.join(found)}")
    if complaints:
        remedy = "give another name=, the settings they were begun with, or delete each one's folder and .yaml to run it anew"
        raise ConfigError("\n".join([f"{cells[0].path.parent}: cells were begun with other settings; {remedy}:", *complaints]))

"""Read and write settings: YAML and overrides `a.b=value` become a checked `Config`, or a `ConfigError`."""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Any, get_args, get_origin, get_type_hints

import pydantic
import yaml
from pydantic_core import to_jsonable_python

from medrlvr_jax.config import check
from medrlvr_jax.config.reward import PRESETS as REWARDS
from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.config.schema import Config
from medrlvr_jax.config.section import validate
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError, nearest

PRESETS = Path(__file__).parents[1] / "configs"
LENGTHS = ("steps", "passes")  # the two settings for the length of a run
# Values of required settings, for commands that do not read them.
UNREAD: dict[str, Any] = {"data.path": "", "learn.policy.lr": 0.0}


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    command: str | None = None,
) -> Config:
    """Read settings, apply overrides, and check everything that can be checked without a device.

    `source`: a YAML file, a run's folder, the name of a preset, or a mapping with the same content.
    `overrides`: Python values by nested or dotted names: {"sample": {"temperature": 0.7}} or
    {"sample.temperature": 0.7}. A section replaces only the fields that it names; None removes an optional
    section. Or a list as on the command line, with YAML values: ["sample.temperature=0.7"].
    `command`: the command that will use the settings, such as "sft" (`check.READS`). Settings that it does
    not read are neither required nor checked. None: all settings are required and checked.

    Raises `ConfigError` with one line for each problem.
    """
    tree, name = copy.deepcopy(source), "config"
    if isinstance(source, str | Path):
        presets = ", ".join(sorted(path.name.removesuffix(".yaml") for path in PRESETS.glob("*.yaml")))
        tree, name = read_yaml(source, f"the presets of the package are {presets}") or {}, str(source)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{name}: must be a mapping of settings, not {type(tree).__name__}")
    tree = dict(tree)
    expand_reward(tree)
    if isinstance(overrides, Mapping):
        merge(tree, overrides)
    else:
        for item in overrides:
            override(tree, item)
    lengths = {str(item).partition("=")[0] for item in overrides}.intersection(LENGTHS)
    if any(
        tree[name] is not None for name in lengths
    ):  # steps also replaces the file's passes, and vice versa
        tree = {name: value for name, value in tree.items() if name not in LENGTHS or name in lengths}
    return from_tree(tree, name, command)


def find_config(path: str | Path) -> Path:
    """Return the config file at `path`, which may also be a run's folder or the name of a preset.

    Raises `ConfigError` for a folder without config.yaml. A file that does not exist is returned unchanged.
    """
    if Path(path).is_dir():
        if (file := Path(path) / "config.yaml").is_file():
            return file
        remedy = "give a run's folder, such as runs/quickstart, or a config file"
        raise ConfigError(f"{path}: contains no config.yaml; {remedy}")
    preset = PRESETS / (path if str(path).endswith(".yaml") else f"{path}.yaml")
    is_name = Path(path).name == str(path) and not Path(path).exists()
    return preset if is_name and preset.exists() else Path(path)


def read_yaml(path: str | Path, remedy: str) -> Any:
    """Return the content of a YAML file or a preset. `remedy` ends the error message."""
    path = find_config(path)
    with files.reading(path, remedy):
        text = Path(path).read_text(encoding="utf-8")
    return parse_yaml(text, str(path), remedy)


def parse_yaml(text: str, source: str, remedy: str) -> Any:
    """Parse YAML. Raise `ConfigError` if it is invalid or repeats a key."""
    with files.reading(source, remedy):
        loader = _UniqueKeyLoader(text)
        loader.name = source
        return loader.get_single_data()


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses repeated keys. PyYAML would silently keep only the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines = defaultdict(list)
        for key, _ in node.value:
            lines[key.tag, str(key.value)].append(str(key.start_mark.line + 1))
        for (_, name), numbers in lines.items():
            if len(numbers) > 1:
                where = f"on lines {', '.join(numbers[:-1])} and {numbers[-1]}"
                raise ConfigError(f"{self.name}: {name}: given {len(numbers)} times, {where}; keep only one")
        return super().construct_mapping(node, deep)


def from_tree(tree: dict[str, Any], source: str = "config", command: str | None = None) -> Config:
    """Build and check a `Config` from nested dicts. `command` is as in `load`."""
    tree = copy.deepcopy(tree)
    expand_reward(tree)
    for name, value in UNREAD.items():
        section = tree.get(name.partition(".")[0]) or {}
        if not check.reads(command, name) and isinstance(section, dict) and name not in flat(tree):
            _set(tree, tuple(name.split(".")), value, name)
    try:
        config = pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {_describe_error(error)}" for error in e.errors())) from None
    problems = [(name, text) for name, text in check.find_problems(config) if check.reads(command, name)]
    if problems:
        raise ConfigError("\n".join(f"{source}: {name}: {text}" for name, text in problems))
    return config


def expand_reward(tree: dict[str, Any]) -> None:
    """Replace a short form of `reward`, a list of components or the name of a preset, by a section."""
    reward = tree.get("reward")
    if isinstance(reward, list):
        tree["reward"] = {"components": reward}
    elif isinstance(reward, str):
        if reward not in REWARDS:
            hint = nearest(reward, REWARDS) or f"there are {', '.join(REWARDS)}"
            raise ConfigError(f"reward: {reward!r}: no such preset; {hint}")
        tree["reward"] = copy.deepcopy(REWARDS[reward])


def to_tree(config: Any) -> dict[str, Any]:
    """Return settings as nested dicts and lists of YAML's types."""
    return to_jsonable_python(config)


def dump(config: Config) -> str:
    """Return all settings as YAML. `load` reads this text back as an equal `Config`."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested settings by dotted name."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


@cache
def default_settings() -> dict[str, Any]:
    """Return the defaults of all settings by dotted name. Settings without a default have a placeholder."""
    path = {"path": ""}
    required = {"name": "x", "model": path, "data": path, "learn": {"policy": {"lr": 0}}}
    return flat(to_tree(validate(Config, required)))


def settings_of(tree: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a record by dotted name. One that the record lacks, because the record is older
    than the setting, has its default.
    """
    return default_settings() | flat(tree)


def differences(a: dict[str, Any], b: dict[str, Any], where: Sequence[str] = ("before", "now")) -> list[str]:
    """Return a line for each dotted name whose values differ between a and b. A missing value is None."""
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return [f"{name}: {a.get(name)!r} {where[0]}, {b.get(name)!r} {where[1]}" for name in names]


def override(tree: dict[str, Any], item: str) -> None:
    """Set one `a.b=value` in nested settings."""
    name, sep, text = item.partition("=")
    if not sep or not name:
        raise ConfigError(f"override {item!r}: write it as a.b=value, such as sample.temperature=0.8")
    remedy = "the value must be YAML; put quotes around a string with : or { or ["
    value, path = parse_yaml(text, f"override {item!r}", remedy), tuple(name.split("."))
    kind = get_type_hints(_section_at(path[:-1])).get(path[-1], object)
    kinds = set(get_args(kind) or (kind,))
    if kinds <= {str, type(None)} and not isinstance(value, str | list | dict | None):
        value = text.strip()  # YAML reads a number in name=2024, but a name is a string
    _set(tree, path, value, item)


def merge(tree: dict[str, Any], overrides: Mapping[str, Any], above: tuple[str, ...] = ()) -> None:
    """Set Python values, by nested or dotted names, in nested settings."""
    for name, value in overrides.items():
        path = (*above, *str(name).split("."))
        kind = get_type_hints(_section_at(path[:-1])).get(path[-1])
        if isinstance(value, Mapping) and section_class(kind) and get_origin(kind) is not dict:
            merge(tree, value, path)
        else:
            _set(tree, path, str(value) if isinstance(value, PurePath) else value, ".".join(path))


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any, item: str) -> None:
    *parents, leaf = path
    node = tree
    for i, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            raise ConfigError(f"override {item!r}: {'.'.join(parents[: i + 1])} is a value without fields")
        node = node[key]
    node[leaf] = value
    expand_reward(tree)


def section_class(kind: Any) -> type | None:
    """Return the section class in a field's type: `Section`, `Section | None` or `dict[str, Section]`."""
    kinds = (kind, *get_args(kind))
    return next((k for k in kinds if dataclasses.is_dataclass(k) and isinstance(k, type)), None)


def section_kinds(kind: Any) -> dict[str, type]:
    """Return the section classes by `kind` if the type is a list of sections of several kinds, else {}."""
    item = next(iter(get_args(kind)), None)
    if get_origin(kind) is not tuple or not (classes := get_args(next(iter(get_args(item)), None))):
        return {}
    return {get_args(get_type_hints(cls)["kind"])[0]: cls for cls in classes if isinstance(cls, type)}


def _section_at(path: Sequence[Any]) -> Any:
    """Return the section class at a path of names, or the innermost one on the way to it."""
    cls: Any = Config
    kinds: dict[str, type] = {}
    for key in path:
        kind = get_type_hints(cls, include_extras=True).get(key)
        cls = kinds.get(key) or section_class(kind) or cls
        kinds = section_kinds(kind) or kinds
    return cls


def _describe_error(error: Any) -> str:
    """Return one of pydantic's errors as a message with field, value and remedy."""
    path = tuple(error["loc"])
    name, value, kind = ".".join(map(str, path)), error.get("input"), error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in dataclasses.fields(_section_at(path[:-1]))]
        hint = nearest(str(path[-1]), known) or f"there are {', '.join(known)}"
        return f"{name}: no such setting; {hint}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = section_kinds(get_type_hints(RewardConfig, include_extras=True)[path[1]])
        wrong = (
            f"{error['ctx']['tag']!r}: no such kind" if "tag" in error["ctx"] else "required, but not given"
        )
        return f"{name}.kind: {wrong}; there are {', '.join(kinds)}"
    if kind == "model_attributes_type":
        return f"{name}: {value!r} must be a section with a kind, such as {{kind: rule}}"
    if kind in ("missing", "missing_argument"):
        return f"{name}: required, but not given"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        known = ", ".join(field.name for field in dataclasses.fields(_section_at(path)))
        return f"{name}: {value!r} must be a section with {known}"
    if kind == "string_type":
        as_read = f"{value!r} (YAML reads {type(value).__name__})"
        return f"{name}: {as_read} must be a string; put it in quotes"
    letters = "may have only letters, digits, '.', '_' and '-', because it names a"
    if name == "name":
        return f"name: {value!r} {letters} folder inside runs"
    if path[-1] == "[key]":
        return f"{'.'.join(map(str, path[:-2]))}: {value!r} {letters} file"
    if path[-1] == "fn" and kind == "string_pattern_mismatch":
        return f"{name}: {value!r} must be package.module:function, such as my_rewards:score"
    text = error["msg"].replace("Input should be", "must be")
    text = text.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    return f"{name}: {value!r} {text}" if text.startswith("must") else f"{name}: {value!r}: {text}"

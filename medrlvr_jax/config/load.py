"""Settings in and out: YAML and `a.b=value` become a checked `Config`, or complaints with their remedies."""

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, get_args, get_origin, get_type_hints

import pydantic
import yaml
from pydantic_core import to_jsonable_python

from medrlvr_jax.config import check
from medrlvr_jax.config.reward import PRESETS as REWARDS
from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.config.schema import Config
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError, nearest

PRESETS = Path(__file__).parents[1] / "configs"
LENGTHS = ("steps", "passes")  # the two ways to say how long a run is
# Values of settings that have no default, for commands that do not read them.
UNREAD: dict[str, Any] = {"data.path": "", "learn.policy.lr": 0.0}


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    command: str | None = None,
) -> Config:
    """Read settings, replace some of them, and check everything that needs no device.

    `source`: a YAML file, a run's folder, the name of a preset, or a mapping of the same form.
    `overrides`: Python values by nested or dotted names, {"sample": {"temperature": 0.7}} or
    {"sample.temperature": 0.7}, where a section replaces the fields that it names and None removes an
    optional section; or, as on the command line, ["sample.temperature=0.7"], whose values are YAML.
    `command`: what the settings are for, such as "sft" (`check.READS`). What that command does not read need
    not be given and is not checked. None: everything is checked.

    Raises `ConfigError`, with every complaint.
    """
    tree, name = copy.deepcopy(source), "config"
    if isinstance(source, str | Path):
        presets = ", ".join(sorted(path.name.removesuffix(".yaml") for path in PRESETS.glob("*.yaml")))
        tree, name = read_yaml(source, f"presets that come with the package: {presets}") or {}, str(source)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{name}: a mapping of settings is needed, got {type(tree).__name__}")
    tree = dict(tree)
    spell_out_reward(tree)
    if isinstance(overrides, Mapping):
        merge(tree, overrides)
    else:
        for item in overrides:
            override(tree, item)
    given = {str(item).partition("=")[0] for item in overrides}.intersection(LENGTHS)
    if any(tree[name] is not None for name in given):  # it replaces the file's, of either kind
        tree = {name: value for name, value in tree.items() if name not in LENGTHS or name in given}
    return from_tree(tree, name, command)


def find_config(path: str | Path) -> Path:
    """The file at `path`, or a run's, by its folder; without either, the preset of that bare name, such as
    `quickstart`.
    """
    if Path(path).is_dir():
        if (file := Path(path) / "config.yaml").is_file():
            return file
        remedy = "give a run's folder, such as runs/quickstart, or a config file"
        raise ConfigError(f"{path}: no config.yaml in it; {remedy}")
    preset = PRESETS / (path if str(path).endswith(".yaml") else f"{path}.yaml")
    bare = Path(path).name == str(path) and not Path(path).exists()
    return preset if bare and preset.exists() else Path(path)


def read_yaml(path: str | Path, remedy: str) -> Any:
    """The contents of a YAML file or a preset. `remedy` ends the message if it is missing or not YAML."""
    path = find_config(path)
    with files.reading(path, remedy):
        text = Path(path).read_text(encoding="utf-8")
    return parse_yaml(text, str(path), remedy)


def parse_yaml(text: str, source: str, remedy: str) -> Any:
    """Parse YAML, and refuse a key that a mapping holds twice: PyYAML would silently keep only the last."""
    with files.reading(source, remedy):
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    if complaints := list(_repeated_keys(root)):
        raise ConfigError("\n".join(f"{source}: {complaint}" for complaint in complaints))
    with files.reading(source, remedy):
        return None if root is None else loader.construct_document(root)


def _repeated_keys(root: yaml.Node | None) -> Iterator[str]:
    """A complaint for each key that a mapping at any depth holds more than once."""
    seen: set[int] = set()
    todo: list[tuple[tuple[str, ...], yaml.Node | None]] = [((), root)]
    while todo:
        path, node = todo.pop()
        if id(node) in seen:  # an alias may lead back to a node that holds it
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += [((*path, str(i)), item) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            lines = defaultdict(list)
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    lines[key.tag, key.value].append(key.start_mark.line + 1)
                todo.append(((*path, str(key.value)), value))
            for (_, name), at in lines.items():
                if len(at) > 1:
                    where = f"{len(at)} times, on lines {', '.join(map(str, at[:-1]))} and {at[-1]}"
                    yield f"{'.'.join([*path, name])}: given {where}; only the last would count, so keep one"


def from_tree(tree: dict[str, Any], source: str = "config", command: str | None = None) -> Config:
    """Build and check a `Config` from nested dicts. `command`: as in `load`."""
    tree = copy.deepcopy(tree)
    spell_out_reward(tree)
    for name, value in UNREAD.items():
        section = tree.get(name.partition(".")[0]) or {}
        if not check.reads(command, name) and isinstance(section, dict) and name not in flat(tree):
            _put(tree, tuple(name.split(".")), value, name)
    try:
        config = pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {_complaint(error)}" for error in e.errors())) from None
    problems = [f"{name}: {text}" for name, text in check.problems(config) if check.reads(command, name)]
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
    return config


def spell_out_reward(tree: dict[str, Any]) -> None:
    """Replace the short forms of `reward`, a list of components or a preset's name, by a section."""
    reward = tree.get("reward")
    if isinstance(reward, list):
        tree["reward"] = {"components": reward}
    elif isinstance(reward, str):
        if reward not in REWARDS:
            hint = nearest(reward, REWARDS) or f"there are {', '.join(REWARDS)}"
            raise ConfigError(f"reward: {reward!r}: no such preset; {hint}")
        tree["reward"] = copy.deepcopy(REWARDS[reward])


def to_tree(config: Any) -> dict[str, Any]:
    """Nested dicts and lists, as YAML reads them back."""
    return to_jsonable_python(config)


def dump(config: Config) -> str:
    """All settings as YAML; `load` reads it back to an equal `Config`."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree of settings by their dotted names."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def differences(a: dict[str, Any], b: dict[str, Any], where: Sequence[str] = ("there", "now")) -> list[str]:
    """A line for each setting by dotted name that has different values in a and in b. It is null where it is
    not given.
    """
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return [f"{name}: {a.get(name)!r} {where[0]}, {b.get(name)!r} {where[1]}" for name in names]


def override(tree: dict[str, Any], item: str) -> None:
    """Put one `a.b=value` into a tree of settings."""
    name, sep, text = item.partition("=")
    if not sep or not name:
        raise ConfigError(f"override {item!r}: write it as a.b=value, such as sample.temperature=0.8")
    remedy = "the value must be YAML; quote a text that holds : or { or ["
    value, path = parse_yaml(text, f"override {item!r}", remedy), tuple(name.split("."))
    kind = get_type_hints(_section_at(path[:-1])).get(path[-1], object)
    kinds = set(get_args(kind) or (kind,))
    if kinds <= {str, type(None)} and not isinstance(value, str | list | dict | None):
        value = text.strip()  # name=2024 names a run, though YAML reads a number
    _put(tree, path, value, item)


def merge(tree: dict[str, Any], overrides: Mapping[str, Any], above: tuple[str, ...] = ()) -> None:
    """Put Python values into a tree of settings, under nested or dotted names."""
    for name, value in overrides.items():
        path = (*above, *str(name).split("."))
        kind = get_type_hints(_section_at(path[:-1])).get(path[-1])
        if isinstance(value, Mapping) and section_class(kind) and get_origin(kind) is not dict:
            merge(tree, value, path)
        else:
            _put(tree, path, str(value) if isinstance(value, PurePath) else value, ".".join(path))


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any, item: str) -> None:
    *parents, leaf = path
    node = tree
    for i, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            raise ConfigError(f"override {item!r}: {'.'.join(parents[: i + 1])} is a value, it has no fields")
        node = node[key]
    node[leaf] = value
    spell_out_reward(tree)


def section_class(kind: Any) -> type | None:
    """The section that a field of this type holds: as it is, optional, or as the values of a mapping."""
    kinds = (kind, *get_args(kind))
    return next((k for k in kinds if dataclasses.is_dataclass(k) and isinstance(k, type)), None)


def section_kinds(kind: Any) -> dict[str, type]:
    """Of a list whose items are sections told apart by their `kind`: the section of each kind."""
    item = next(iter(get_args(kind)), None)
    if get_origin(kind) is not tuple or not (classes := get_args(next(iter(get_args(item)), None))):
        return {}
    return {get_args(get_type_hints(cls)["kind"])[0]: cls for cls in classes if isinstance(cls, type)}


def _section_at(path: Sequence[Any]) -> Any:
    """The section that the dotted name `path` leads to, or lies in."""
    cls: Any = Config
    kinds: dict[str, type] = {}
    for key in path:
        kind = get_type_hints(cls, include_extras=True).get(key)
        cls = kinds.get(key) or section_class(kind) or cls
        kinds = section_kinds(kind) or kinds
    return cls


def _complaint(error: Any) -> str:
    """One of pydantic's errors in our words."""
    path = tuple(error["loc"])
    name, value, kind = ".".join(map(str, path)), error.get("input"), error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in dataclasses.fields(_section_at(path[:-1]))]
        hint = nearest(str(path[-1]), known) or f"there are {', '.join(known)}"
        return f"{name}: no such setting; {hint}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = section_kinds(get_type_hints(RewardConfig, include_extras=True)[path[1]])
        wrong = f"{error['ctx']['tag']!r}: no such kind" if "tag" in error["ctx"] else "needed, and not given"
        return f"{name}.kind: {wrong}; there are {', '.join(kinds)}"
    if kind == "model_attributes_type":
        return f"{name}: {value!r} is a value where a section with kind is needed, such as {{kind: rule}}"
    if kind in ("missing", "missing_argument"):
        return f"{name}: needed, and not given"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        known = ", ".join(field.name for field in dataclasses.fields(_section_at(path)))
        return f"{name}: {value!r} is a value where a section with {known} is needed"
    if kind == "string_type":
        as_read = f"{value!r} ({type(value).__name__}, as YAML reads it)"
        return f"{name}: {as_read} where a text is needed; put it in quotes"
    letters = "must be letters, digits, '.', '_' and '-' only, since it names a"
    if name == "name":
        return f"name: {value!r} {letters} folder inside runs"
    if path[-1] == "[key]":
        return f"{'.'.join(map(str, path[:-2]))}: {value!r} {letters} file"
    return f"{name}: {value!r}: {error['msg'][0].lower()}{error['msg'][1:]}"

"""Settings in and out: YAML and `a.b=value` to a checked `Config`, and every complaint about them."""

import copy
import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, get_args, get_origin, get_type_hints

import pydantic
import yaml
from pydantic_core import to_jsonable_python

from medrlvr_jax.config.schema import COMPARING, EVAL_SHARES, STEP_SHARES, Config, EvalConfig, SetConfig
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "configs"


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Read settings, replace some of them, and check everything that needs no device; `ConfigError` has every complaint.

    `source`: a YAML file, or a mapping of the same form. `overrides`: a mapping with Python's values, whose names are nested or dotted,
    {"sample": {"temperature": 0.7}} or {"sample.temperature": 0.7}; or, as on the command line, ["sample.temperature=0.7"] with YAML's.
    A section that is given as a mapping replaces the fields that it names, and None takes an optional section out.
    """
    named = isinstance(source, str | Path)
    presets = ", ".join(sorted(path.name.removesuffix(".yaml") for path in PRESETS.glob("*.yaml")))
    tree = (read_yaml(source, f"presets that come with the package: {presets}") or {}) if named else copy.deepcopy(dict(source))
    name = str(source) if named else "config"
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: a mapping of settings is needed, got {type(tree).__name__}")
    if isinstance(overrides, Mapping):
        merge(tree, overrides)
    else:
        for item in overrides:
            override(tree, item)
    return from_tree(tree, name)


def find_config(path: str | Path) -> Path:
    """The file at `path`; or, where there is none, the preset of that bare name, such as `quickstart`."""
    preset = PRESETS / (path if str(path).endswith(".yaml") else f"{path}.yaml")
    return preset if not Path(path).exists() and Path(path).name == str(path) and preset.exists() else Path(path)


def read_yaml(path: str | Path, remedy: str) -> Any:
    """What a YAML file or a preset holds; `remedy` is for one that is not there or no YAML."""
    path = find_config(path)
    with files.reading(path, remedy):
        text = Path(path).read_text(encoding="utf-8")
    return parse_yaml(text, str(path), remedy)


def parse_yaml(text: str, source: str, remedy: str) -> Any:
    """YAML in which no key of a mapping stands twice: PyYAML would keep the last and lose the others without a word."""
    with files.reading(source, remedy):
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    if complaints := list(_repeated(root)):
        raise ConfigError("\n".join(f"{source}: {complaint}" for complaint in complaints))
    with files.reading(source, remedy):
        return None if root is None else loader.construct_document(root)


def _repeated(root: yaml.Node | None) -> Iterator[str]:
    """A complaint for each key that a mapping at any depth holds more than once."""
    seen: set[int] = set()
    todo: list[tuple[tuple[str, ...], yaml.Node | None]] = [((), root)]
    while todo:
        path, node = todo.pop()
        if id(node) in seen:  # an alias of what was looked through already, perhaps of a node that it stands in
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
            for (_, name), where in lines.items():
                if len(where) > 1:
                    on = f"on lines {', '.join(map(str, where[:-1]))} and {where[-1]}"
                    yield f"{'.'.join([*path, name])}: given {len(where)} times, {on}; only the last would count, so keep one"


def from_tree(tree: dict[str, Any], source: str = "config") -> Config:
    """Build and check a `Config` from nested dicts; every complaint in one `ConfigError`."""
    try:
        config = pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {_complaint(error)}" for error in e.errors())) from None
    problems = _cross_checks(config)
    if problems:
        raise ConfigError("\n".join(f"{source}: {p}" for p in problems))
    return config


def to_tree(config: Any) -> dict[str, Any]:
    """Nested dicts and lists, as YAML reads them back."""
    return to_jsonable_python(config)


def dump(config: Config) -> str:
    """The resolved settings as YAML; `load` reads it back to an equal `Config`."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings by their dotted names."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def override(tree: dict[str, Any], item: str) -> None:
    name, sep, text = item.partition("=")
    if not sep or not name:
        raise ConfigError(f"override {item!r}: write it as a.b=value, such as sample.temperature=0.7")
    value = parse_yaml(text, f"override {item!r}", "the value must be YAML; quote a text that holds : or { or [")
    *parents, leaf = name.split(".")
    if not isinstance(value, str | list | dict | None) and _kinds_at((*parents, leaf)) <= {str, type(None)}:
        value = text.strip()  # name=2024 names a run, though YAML reads a number
    _put(tree, (*parents, leaf), value, item)


def merge(tree: dict[str, Any], overrides: Mapping[str, Any], above: tuple[str, ...] = ()) -> None:
    """Put Python's values into a tree of settings, under nested or dotted names."""
    for name, value in overrides.items():
        path = (*above, *str(name).split("."))
        if isinstance(value, Mapping) and _is_section(path):
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


def _is_section(path: tuple[str, ...]) -> bool:
    kind = get_type_hints(_section_at(path[:-1])).get(path[-1])
    return get_origin(kind) is not dict and any(dataclasses.is_dataclass(t) for t in (kind, *get_args(kind)))


def _fields_at(path: tuple) -> list[str]:
    """The names of the fields of the section that `path` leads to."""
    return [f.name for f in dataclasses.fields(_section_at(path))]


def _section_at(path: tuple) -> Any:
    cls: Any = Config
    for key in path:
        kind = get_type_hints(cls).get(key) if dataclasses.is_dataclass(cls) else None
        found = [t for t in (kind, *get_args(kind)) if dataclasses.is_dataclass(t)]
        cls = found[0] if found else SetConfig if cls is EvalConfig and key == "sets" else cls
    return cls


def _kinds_at(path: tuple) -> set[Any]:
    """The types that the setting at `path` may have; {object} for one that there is not."""
    kind = get_type_hints(_section_at(path[:-1])).get(path[-1], object)
    return set(get_args(kind) or (kind,))


def _complaint(error: Any) -> str:
    path = tuple(error["loc"])
    name, value = ".".join(map(str, path)), error.get("input")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return f"{name}: no such setting; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
    if error["type"] in ("missing", "missing_argument"):
        return f"{name}: needed, and not given"
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{name}: {value!r} is a value where a section with {', '.join(_fields_at(path))} is needed"
    if error["type"] == "string_type":
        return f"{name}: {value!r} ({type(value).__name__}, as YAML reads it) where a text is needed; put it in quotes"
    if name == "name":
        return f"name: {value!r} must be letters, digits, '.', '_' and '-' only, since it names a folder inside runs"
    if path[-1] == "[key]":
        return f"{'.'.join(map(str, path[:-2]))}: {value!r} must be letters, digits, '.', '_' and '-' only, since it names a file"
    return f"{name}: {value!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _cross_checks(c: Config) -> list[str]:
    """What no single field can say; a list of complaints, empty when all is well."""
    out = []
    if (c.steps is None) == (c.passes is None):
        out.append(f"steps: {c.steps} and passes: {c.passes}: give exactly one of the two")
    if (c.prompt.template, c.reward.mode == "direct") in (("direct", False), ("think", True)):
        pays = "an answer without a thought" if c.reward.mode == "direct" else "a thought and an answer"
        asks, mend = c.prompt.template, "reward.mode=direct" if c.prompt.template == "direct" else "prompt.template=direct"
        out.append(f"reward.mode: {c.reward.mode} pays for {pays}, which prompt.template {asks} does not ask for; set {mend}")
    if not c.prompt.chat and (given := [name for name in ("system", "template_args") if getattr(c.prompt, name) not in (None, {})]):
        out.append(f"prompt.{given[0]}: it is the chat template's, and prompt.chat is false; set prompt.chat to true, or take it out")
    paying = [name for name in ("fn", "random") if getattr(c.reward, name) is not None]
    if len(paying + [name for name in ("leak_penalty", "before_penalty") if getattr(c.reward, name)]) > 1 and paying:
        out.append(f"reward.{paying[0]}: it alone says what is paid; take the other of fn, random, leak_penalty and before_penalty out")
    if c.model.lora and not c.model.lora.targets:
        out.append("model.lora.targets: [] would train nothing; name some of the layers' matrices, or set model.lora to null")
    if c.sample.questions % c.learn.minibatch:
        out.append(_divide("learn.minibatch", c.learn.minibatch, "sample.questions", c.sample.questions))
    if c.learn.microbatch and c.learn.minibatch % c.learn.microbatch:
        out.append(_divide("learn.microbatch", c.learn.microbatch, "learn.minibatch", c.learn.minibatch))
    if c.sample.min_new_tokens >= c.sample.max_new_tokens:
        out.append(f"sample.min_new_tokens: {c.sample.min_new_tokens} must be below sample.max_new_tokens = {c.sample.max_new_tokens}")
    if c.sample.weights == "int8" and c.loss.sampler_cap is None:
        out.append("sample.weights: int8 draws from another policy than the one that learns; set loss.sampler_cap, 2.0 is usual")
    if c.sample.temperature == 0:
        out.append("sample.temperature: 0 is greedy, and greedy rollouts teach nothing; set it above 0 (eval.temperature may be 0)")
    if c.kl.coef > 0 and c.kl.into == "loss" and c.kl.estimator == "k1":
        out.append("kl.estimator: k1 in the loss has an expected gradient of zero; take k3 (GRPO) or k2, or put it into reward")
    if c.loss.surrogate == "cispo" and (c.loss.ratio_cap or c.loss.dual_clip):
        out.append("loss.surrogate: cispo has no use for loss.ratio_cap or loss.dual_clip; set them to null")
    if c.kl.target is not None and not (c.kl.coef > 0 and c.kl.into == "reward"):
        out.append(f"kl.target: {c.kl.target}: the adaptive coefficient needs kl.coef > 0 and kl.into reward")
    if c.log.profile and c.log.profile[0] > c.log.profile[1]:
        out.append(f"log.profile: {list(c.log.profile)}: the first step comes first, then the last")
    for name, spec in [("data", c.data), *((f"eval.sets.{name}", spec) for name, spec in c.eval.sets.items())]:
        counted = spec.pass_count
        if counted and counted.top and not counted.order:
            out.append(f"{name}.pass_count.top: {counted.top} of which? give order, such as variance")
        if counted and not counted.keep and not counted.order:
            out.append(f"{name}.pass_count: neither keep nor order, so it does nothing; give keep, such as [1, 7], or order")
        if counted and counted.keep and counted.keep[0] > counted.keep[1]:
            out.append(f"{name}.pass_count.keep: {list(counted.keep)}: the least comes first, then the most")
    same = [name for name, spec in c.eval.sets.items() if not spec.shuffle_options]
    if c.eval.samples > 1 and c.eval.temperature == 0 and (same or not c.eval.sets):
        remedy = "set eval.temperature above 0, or shuffle_options of " + (", ".join(same) or "the sets")
        out.append(f"eval.samples: {c.eval.samples} greedy samples are all the same; {remedy}")
    return out


def check_rl(c: Config) -> None:
    """Refuse what only reinforcement learning asks of the settings: fine-tuning and evaluation have neither advantages nor a critic."""
    out = []
    if c.advantage.estimator == "gae" and c.learn.critic is None:
        out.append("advantage.estimator: gae needs learn.critic (such as {lr: 9e-6}); or take estimator group")
    if c.advantage.estimator != "gae" and c.learn.critic is not None:
        out.append(f"learn.critic: {c.advantage.estimator} has no use for a critic; set learn.critic to null, or take estimator gae")
    if c.advantage.estimator in COMPARING and c.sample.samples < 2:
        compared = f"{c.advantage.estimator} compares samples of one question"
        out.append(f"sample.samples: {c.sample.samples}: {compared}, so at least 2 are needed")
    if c.learn.critic_warmup and c.learn.critic is None:
        out.append(f"learn.critic_warmup: {c.learn.critic_warmup} steps would teach nothing, for learn.critic is null; set it to 0")
    if out:
        raise ConfigError("\n".join(out))


def check_best(c: Config, of_steps: tuple[str, ...] = STEP_SHARES) -> None:
    """Refuse a checkpoint.best that no record of the run would hold, so that no checkpoint would be kept for it.

    `of_steps`: those that the steps themselves record. Not for other commands: they may replace the sets that a run was made with.
    """
    known = [*(f"eval.{name}.{share}" for name in c.eval.sets for share in EVAL_SHARES), *of_steps]
    if c.checkpoint.best is not None and c.checkpoint.best not in known:
        near = difflib.get_close_matches(c.checkpoint.best, known, n=1, cutoff=0.6)
        mean = f"did you mean {near[0]}? " if near else ""
        there = f"there are {', '.join(known)}" if known else "name one of eval.sets, of which there are none, or set it to null"
        raise ConfigError(f"checkpoint.best: {c.checkpoint.best}: no such metric here; {mean}{there}")


def _divide(small: str, s: int, large: str, n: int) -> str:
    return f"{small}: {s} does not divide {large} = {n}; the nearest that do: {nearest_divisors(s, n)}"


def nearest_divisors(wanted: int, n: int) -> str:
    """The two divisors of n that are nearest to `wanted`, for messages."""
    near = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))[:2]
    return ", ".join(map(str, sorted(near)))

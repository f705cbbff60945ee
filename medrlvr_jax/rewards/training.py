"""The components of a training's reward, with their functions started."""

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from medrlvr_jax.config.reward import FunctionConfig, ProcessConfig, RewardConfig, VerifierConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards.components import Component, RewardFunction, list_components, unique_names
from medrlvr_jax.rewards.facts import FactMatcher
from medrlvr_jax.rewards.user import LocalFunction, WorkerFunction, source_digest
from medrlvr_jax.rewards.worker import Function, function_name, to_number

# what `train(rewards=…)` takes: one callable, or several, each by itself or with its weight
UserRewards = Function | Sequence[Function | tuple[Function, float]]


@contextmanager
def start_components(
    config: RewardConfig,
    user_components: tuple[Component, ...] | None = None,
    questions: Sequence[Question] = (),
    verifiers: Mapping[str, RewardFunction] | None = None,
) -> Iterator[tuple[Component, ...]]:
    """Yield the components of the reward. Functions that are started here end with the context.

    `user_components` replace those of `config`. `questions` are the training set. `verifiers` are the loaded
    verifiers by component name.
    """
    if user_components is not None:
        _refuse_settings(config)
        yield user_components
        return
    with ExitStack() as stack:
        out = []
        for component in list_components(config):
            function = None
            match component.settings:
                case FunctionConfig():
                    function = WorkerFunction(component.settings)
                    stack.callback(function.close)
                case ProcessConfig():
                    function = FactMatcher(questions, component.settings, component.name)
                case VerifierConfig():
                    function = (verifiers or {})[component.name]
            out.append(dataclasses.replace(component, function=function))
        yield tuple(out)


def _refuse_settings(config: RewardConfig) -> None:
    """Raise `ConfigError` if settings define the reward beside `train(rewards=…)`."""
    for name in ("fn", "random", "leak_penalty", "before_penalty", "components"):
        if value := getattr(config, name):
            remedy = "rewards=[…] replaces the reward of the config; take one of the two out"
            raise ConfigError(f"reward.{name}: {value}: {remedy}")


def components_from_callables(rewards: UserRewards) -> tuple[Component, ...]:
    """Return one component for each callable.

    Raises `ConfigError` if `rewards` is something else than `UserRewards`, or if a callable needs an argument
    that is not in `worker.ARGUMENTS`.
    """
    items = [rewards] if callable(rewards) else list(rewards)
    if not items:
        remedy = "give a callable, or leave rewards out to train by `reward` of the config"
        raise ConfigError(f"rewards: []: there is no reward; {remedy}")
    functions, weights = [], []
    for item in items:
        function, weight, *more = item if isinstance(item, tuple) and len(item) > 1 else (item, 1.0)
        if more or not callable(function) or not isinstance(to_number(weight), float):
            remedy = "give a callable, or a pair of a callable and its weight, such as (reward, 0.5)"
            raise ConfigError(f"rewards: {reprlib.repr(item)}: {remedy}")
        functions.append(LocalFunction(cast(Function, function)))
        weights.append(float(weight))
    names = unique_names([function.name.rpartition(".")[2] for function in functions])
    rows = zip(names, weights, functions, strict=True)
    return tuple(Component(name, weight, function=function) for name, weight, function in rows)


def describe_callables(components: Sequence[Component]) -> list[dict[str, Any]]:
    """Return name, weight and digest of the source text of each callable, for inputs.json."""
    return [
        {
            "name": function_name(component.function.callable),
            "weight": component.weight,
            "sha256": source_digest(component.function.callable),
        }
        for component in components
        if isinstance(component.function, LocalFunction)
    ]

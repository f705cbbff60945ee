"""What is paid in a training: the terms of the reward, each with the judge that it needs, started."""

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from medrlvr_jax.config.reward import FunctionConfig, ProcessConfig, RewardConfig, VerifierConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.rewards.components import Component, Judge, components, unique_names
from medrlvr_jax.rewards.facts import Facts
from medrlvr_jax.rewards.user import InProcess, UserReward, source_of
from medrlvr_jax.rewards.worker import Function, name_of, number_of

Given = Function | Sequence[Function | tuple[Function, float]]  # callables, each with a weight or not
Terms = tuple[Component, ...]


@contextmanager
def started(
    config: RewardConfig,
    given: Terms | None = None,
    questions: Sequence[Question] = (),
    verifiers: Mapping[str, Judge] | None = None,
) -> Iterator[Terms]:
    """The terms of the reward, `given` or those of `config`, with judges that live as long as the context.

    `questions`: what is trained on. `verifiers`: the models among the terms, by name (model_rewards/).
    """
    if given is not None:
        refuse_both(config)
        yield given
        return
    with ExitStack() as stack:
        terms = []
        for term in components(config):
            match term.settings:
                case FunctionConfig():
                    worker = UserReward(term.settings)
                    stack.callback(worker.close)
                    term = dataclasses.replace(term, judge=worker)
                case ProcessConfig():
                    term = dataclasses.replace(term, judge=Facts(questions, term.settings))
                case VerifierConfig():
                    term = dataclasses.replace(term, judge=(verifiers or {})[term.name])
            terms.append(term)
        yield tuple(terms)


def refuse_both(config: RewardConfig) -> None:
    """Raise `ConfigError` where the settings, too, say what is paid."""
    for name in ("fn", "random", "leak_penalty", "before_penalty", "components"):
        if value := getattr(config, name):
            remedy = "rewards=[…] alone say what is paid; take one of the two out"
            raise ConfigError(f"reward.{name}: {value}: {remedy}")


def from_callables(rewards: Given) -> Terms:
    """Terms of one callable, or of a sequence of callables and of pairs (callable, weight).

    Raises `ConfigError` for anything else, and for a callable that needs an argument not among
    `user.ARGUMENTS`.
    """
    items = [rewards] if callable(rewards) else list(rewards)
    if not items:
        remedy = "give a callable, or leave rewards out: then `reward` of the config pays"
        raise ConfigError(f"rewards: [] pays nothing; {remedy}")
    judges, weights = [], []
    for item in items:
        function, weight, *more = item if isinstance(item, tuple) and len(item) > 1 else (item, 1.0)
        if more or not callable(function) or not isinstance(number_of(weight), float):
            remedy = "give a callable, or a pair of a callable and its weight, such as (reward, 0.5)"
            raise ConfigError(f"rewards: {reprlib.repr(item)}: {remedy}")
        judges.append(InProcess(cast(Function, function)))
        weights.append(float(weight))
    names = unique_names([judge.name.rpartition(".")[2] for judge in judges])
    rows = zip(names, weights, judges, strict=True)
    return tuple(Component(name, weight, judge=judge) for name, weight, judge in rows)


def record(terms: Terms) -> list[dict[str, Any]]:
    """Of the callables among the terms, for inputs.json: name, weight, digest of the source text."""
    judged = [(term.weight, term.judge.function) for term in terms if isinstance(term.judge, InProcess)]
    entry = lambda w, function: {"name": name_of(function), "weight": w, "sha256": source_of(function)}
    return [entry(weight, function) for weight, function in judged]

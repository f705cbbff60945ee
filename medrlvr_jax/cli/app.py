"""The app in which commands are registered, the types of their arguments, and shared helpers."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter
from cyclopts.validators import Number

import medrlvr_jax

if TYPE_CHECKING:
    from medrlvr_jax.config import schema

TRAIN, EVALUATE, INSPECT, HELP = map(Group.create_ordered, ("Train", "Evaluate", "Check and inspect", "Help"))
app = App(
    name="medrlvr",
    help="""Reinforcement learning from verifiable rewards on medical questions, in JAX.

    First run:         medrlvr train configs/quickstart.yaml
    Change a setting:  medrlvr train configs/quickstart.yaml seed=1 name=mine
    List settings:     medrlvr train --help""",
    help_format="plaintext",
    version=medrlvr_jax.__version__,
    group_commands=HELP,
    group_parameters=Group("Options"),
)

OVERRIDE = "Override settings: a.b=value, such as sample.temperature=0.8. Values are YAML."
DISTRIBUTED = "Run as one of several processes. Each of them runs this same command."
STEP = "The step of the run's checkpoint to use. Default: the newest."
Config = Annotated[str, Parameter(help="A YAML file of settings, or a preset's name, such as quickstart.")]
Source = Annotated[Path, Parameter(help="A run's folder, or a config whose model.path names the model.")]
Run = Annotated[Path, Parameter(help="A run's folder, such as runs/quickstart.")]
Settings = Annotated[str, Parameter(help=OVERRIDE)]
Step = Annotated[int | Literal["best"] | None, Parameter(metavar="N|best", show_choices=False, help=STEP)]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Distributed = Annotated[Flag, Parameter(help=DISTRIBUTED)]
PositiveInteger = Annotated[int, Parameter(metavar="N", validator=Number(gte=1))]
NonNegativeInteger = Annotated[int, Parameter(metavar="N", validator=Number(gte=0))]
Port = Annotated[int, Parameter(metavar="N", validator=Number(gte=0, lte=65535))]
Penalty = Annotated[float, Parameter(metavar="X", validator=Number(gte=0, lt=math.inf))]
Paths = Annotated[Path, Parameter(required=True)]  # one or more
# All words up to the next option. Settings may be among them: see `split_settings`.
Words = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)]


def command(group: Group) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command. `--help` lists a group's commands in the order of their code."""
    return lambda function: app.command(function, group=group, sort_key=function.__code__.co_firstlineno)


def split_settings(words: list[str] | None, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split an option's words into its values and settings `a.b=value`, which are added to `settings`."""
    words = words or []
    return [word for word in words if "=" not in word], [*settings, *(word for word in words if "=" in word)]


def load(config: Any, settings: Sequence[str] = (), command: str | None = None) -> "schema.Config":
    """Load and check settings by `config.load.load`, before the slow import of JAX."""
    from medrlvr_jax.config import load as configs

    return configs.load(config, settings, command)

"""The app that commands register in, the types of their arguments, and what several commands do."""

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

CONFIG = "The config: a YAML file of settings, or the name of a preset, such as quickstart."
SOURCE = "A run's folder; or a config, which stands for the model that it names."
SETTINGS = "Replace settings of the file: a.b=value, such as sample.temperature=0.8. Values are YAML."
DISTRIBUTED = "Run as one of several processes that run this same command together."
STEP = "The run's checkpoint to take. Default: the newest."
Config = Annotated[str, Parameter(help=CONFIG)]
Source = Annotated[Path, Parameter(help=SOURCE)]
Run = Annotated[Path, Parameter(help="A run's folder, such as runs/quickstart.")]
Settings = Annotated[str, Parameter(help=SETTINGS)]
Step = Annotated[int | Literal["best"] | None, Parameter(metavar="N|best", show_choices=False, help=STEP)]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Distributed = Annotated[Flag, Parameter(help=DISTRIBUTED)]
Whole = Annotated[int, Parameter(metavar="N")]
Penalty = Annotated[float, Parameter(metavar="X", validator=Number(gte=0, lt=math.inf))]
Paths = Annotated[Path, Parameter(required=True)]  # one or more
# The words up to the next option, among which settings may stand: see `apart`.
Words = Annotated[list[str] | None, Parameter(negative="", consume_multiple=True)]


def command(group: Group) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command. `--help` lists a group's in the order of their file."""
    return lambda function: app.command(function, group=group, sort_key=function.__code__.co_firstlineno)


def apart(words: list[str] | None, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of an option that takes several words, and all settings, also those among the words."""
    words = words or []
    return [word for word in words if "=" not in word], [*settings, *(word for word in words if "=" in word)]


def load(config: Any, settings: Sequence[str] = (), command: str | None = None) -> "schema.Config":
    """The checked settings, before JAX is imported, which takes seconds: see `config.load.load`."""
    from medrlvr_jax.config import load as configs

    return configs.load(config, settings, command)

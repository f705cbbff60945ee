"""Med-RLVR in JAX: reinforcement learning from verifiable rewards on medical questions.

    import medrlvr_jax as mr

    config = mr.load_config("configs/quickstart_grpo.yaml", {"steps": 8})

    def reward(completions, questions, **_):
        return [float("first line" in c) for c in completions]

    result = mr.train(config, rewards=[reward])  # writes runs/quickstart_grpo/, as `medrlvr train` does
    model = mr.load_model("runs/quickstart_grpo")  # a run, a Hugging Face directory, or "embedded"
    print(mr.generate(model, ["Question: …"], max_new_tokens=48))

Importing the package is fast: the module of a name, and JAX, are imported when the name is first used.
`advantages` and `losses` are modules whose functions need nothing else of the package. Unusable input raises
one of the errors below, and each message names the remedy.
"""

import importlib
from typing import TYPE_CHECKING, Any

import medrlvr_jax.world  # noqa: F401  # registers itself as the source `embedded`

if TYPE_CHECKING:
    from medrlvr_jax.api import Completion, Evaluation, LoadedModel, evaluate, generate, load_model
    from medrlvr_jax.config.load import load as load_config
    from medrlvr_jax.config.schema import Config, RewardConfig
    from medrlvr_jax.data.question import DataError, Example, Question
    from medrlvr_jax.host.errors import ConfigError, Diverged, Unwritable
    from medrlvr_jax.rewards.user import RewardError
    from medrlvr_jax.rewards.verdicts import score
    from medrlvr_jax.rl import advantages, losses
    from medrlvr_jax.rl.sft import sft
    from medrlvr_jax.rl.train import train
    from medrlvr_jax.runs.seal import CheckpointError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Completion",
    "Config",
    "ConfigError",
    "DataError",
    "Diverged",
    "Evaluation",
    "Example",
    "LoadedModel",
    "Question",
    "RewardConfig",
    "RewardError",
    "Unwritable",
    "advantages",
    "evaluate",
    "generate",
    "load_config",
    "load_model",
    "losses",
    "score",
    "sft",
    "train",
]

_MODULES = {  # the names of each module; the imports above repeat them for type checkers and editors
    "api": ("Completion", "Evaluation", "LoadedModel", "evaluate", "generate", "load_model"),
    "config.schema": ("Config", "RewardConfig"),
    "data.question": ("DataError", "Example", "Question"),
    "host.errors": ("ConfigError", "Diverged", "Unwritable"),
    "rewards.verdicts": ("score",),
    "rewards.user": ("RewardError",),
    "rl.sft": ("sft",),
    "rl.train": ("train",),
    "runs.seal": ("CheckpointError",),
}
_NAMES = {name: f"{module}:{name}" for module, names in _MODULES.items() for name in names}
_NAMES |= {"load_config": "config.load:load", "advantages": "rl.advantages", "losses": "rl.losses"}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, _, attribute = _NAMES[name].partition(":")
    module = importlib.import_module(f"{__name__}.{path}")
    globals()[name] = value = getattr(module, attribute) if attribute else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

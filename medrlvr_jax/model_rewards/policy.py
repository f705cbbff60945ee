"""The components that ask the policy itself: probability.py, consistency.py, image_dependence.py.

The host makes a request for each row when it grades the row. A program on the device answers all of them.
"""

from collections.abc import Sequence

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import ConsistencyConfig, LooksConfig, ProbabilityConfig, RewardConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model_rewards import consistency, image_dependence, probability
from medrlvr_jax.model_rewards.answer_scores import PolicyReward
from medrlvr_jax.rewards.components import list_components


def make_policy_rewards(parts: Parts) -> dict[str, PolicyReward]:
    """Return the components that ask the policy, by name. Nothing is compiled yet."""
    out = {}
    for component in list_components(parts.config.reward):
        match section := component.settings:
            case ProbabilityConfig():
                out[component.name] = probability.make_reward(parts, section)
            case ConsistencyConfig():
                out[component.name] = consistency.make_reward(parts, section)
            case LooksConfig():
                out[component.name] = image_dependence.make_reward(parts, section)
    return out


def needs_grey_images(config: RewardConfig) -> bool:
    """Return whether a component needs the prompts with grey images too."""
    return any(section.kind == "looks" for section in config.components)


def check_questions(config: RewardConfig, tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
    """Raise `ConfigError` if the questions lack what a component needs: letters, texts, facts or images.

    The component would have the same value for all completions.
    """
    for section in config.components:
        if section.kind == "consistency":
            consistency.letter_tokens(tokenizer)
        no_letters = next((q.id for q in questions if q.value is not None), None)
        if section.kind == "consistency" and no_letters is not None:
            problem = f"it compares letters, and question {no_letters} has not one right letter"
            raise ConfigError(f"reward.components: consistency: {problem}; take it out")
        if section.kind == "looks" and not any(q.images for q in questions):
            raise ConfigError("reward.components: looks: no question of data.path has images; take it out")
        no_texts = not any(q.value is not None and q.value.kind == "text" for q in questions)
        if section.kind == "verifier" and section.when == "undecided" and no_texts:
            problem = "no right answer in data.path is a text, so it would never be asked"
            raise ConfigError(f"reward.components: verifier: {problem}; set when to wrong or always")
        if section.kind == "process" and not any(q.facts for q in questions):
            remedy = "give them a field facts, or take it out"
            raise ConfigError(f"reward.components: process: no question of data.path has facts; {remedy}")

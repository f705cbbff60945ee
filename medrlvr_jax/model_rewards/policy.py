"""The components of the reward that ask the policy itself, each in a file of its own: probability.py,
consistency.py, looks.py. The host writes down what is asked of each row while it grades; a program answers
for all rows.
"""

from collections.abc import Sequence

from medrlvr_jax.build import Parts
from medrlvr_jax.config.reward import ConsistencyConfig, LooksConfig, ProbabilityConfig, RewardConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.data.tokenizer import Tokenizer
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model_rewards import consistency, looks, probability
from medrlvr_jax.model_rewards.ask import PolicyReward
from medrlvr_jax.rewards.components import list_components


def make_policy_rewards(parts: Parts) -> dict[str, PolicyReward]:
    """By name, the components of the reward that ask the policy. Nothing is compiled yet."""
    out = {}
    for term in list_components(parts.config.reward):
        match section := term.settings:
            case ProbabilityConfig():
                out[term.name] = probability.reward(parts, section)
            case ConsistencyConfig():
                out[term.name] = consistency.reward(parts, section)
            case LooksConfig():
                out[term.name] = looks.reward(parts, section)
    return out


def asks_blank(config: RewardConfig) -> bool:
    """Whether a component needs the prompts with grey images."""
    return any(section.kind == "looks" for section in config.components)


def check_questions(config: RewardConfig, tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
    """Refuse questions that lack what a component asks for (letters of one token each, texts, facts, images):
    its value would be the same for all completions.
    """
    for section in config.components:
        if section.kind == "consistency":
            consistency.letter_tokens(tokenizer)
        no_letters = next((q.id for q in questions if q.value is not None), None)
        if section.kind == "consistency" and no_letters is not None:
            problem = f"it asks for letters, and question {no_letters} has not one right letter"
            raise ConfigError(f"reward.components: consistency: {problem}; take it out")
        if section.kind == "looks" and not any(q.images for q in questions):
            raise ConfigError("reward.components: looks: no question of data.path has images; take it out")
        no_texts = not any(q.value is not None and q.value.kind == "text" for q in questions)
        if section.kind == "verifier" and section.when == "undecided" and no_texts:
            why = "no right answer in data.path is a text, so it is never asked; set when to wrong or always"
            raise ConfigError(f"reward.components: verifier: {why}")
        if section.kind == "process" and not any(q.facts for q in questions):
            remedy = "give them a field facts, or take it out"
            raise ConfigError(f"reward.components: process: no question of data.path has facts; {remedy}")

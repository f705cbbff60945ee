"""The reward of completions: parse, grade, compute the components, add them by their weights.

from medrlvr_jax import rewards

rewards.parse(["<think>x</think><answer>B</answer>"], "strict").answer  # ["B"]
rewards.choice("B", "B", ["aspirin", "heparin"]).correct                # True
rewards.value("0.05 g/L", question.value).correct                       # True for 5 mg/dL
rewards.grade(completions, questions).reward                            # float32 [N]
"""

from medrlvr_jax.rewards.graders import Grade, choice, value
from medrlvr_jax.rewards.parse import REASONS, Parsed, parse
from medrlvr_jax.rewards.verdicts import Verdicts, grade, score

__all__ = ["REASONS", "Grade", "Parsed", "Verdicts", "choice", "grade", "parse", "score", "value"]

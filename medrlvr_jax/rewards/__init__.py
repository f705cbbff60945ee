"""What a completion is worth: the rule, or a user's functions; and which of the paper's six stages it shows.

from medrlvr_jax import rewards

rewards.parse(["<think>x</think><answer>B</answer>"], "strict").answer  # ["B"]
rewards.choice("B", "B", ["aspirin", "heparin"]).correct                # True
rewards.value("0.05 g/L", question.value).correct                       # True for 5 mg/dL
rewards.grade(completions, questions).reward                            # float32 [N]
"""

from medrlvr_jax.rewards.base import Verdicts, grade, score
from medrlvr_jax.rewards.graders import Grade, choice, value
from medrlvr_jax.rewards.parse import REASONS, Parsed, parse

__all__ = ["REASONS", "Grade", "Parsed", "Verdicts", "choice", "grade", "parse", "score", "value"]

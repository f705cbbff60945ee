"""A model as verifier: whether an answer means what the right one means, where spelling alone cannot tell.

This module has what needs no device: the prompts, which rows are asked, how a reply is read, and what a row
is worth. rollout/judge.py runs a verifier on the run's own mesh, endpoint.py asks one that a server runs.

A verdict is one of two, `Yes` or `No`, after a lead that is the same in every reply (`Final Decision:`):

hard  The verifier writes its reply, greedily. The verdict is what follows the lead on the last line that has
      it (General-Reasoner, arXiv 2505.14652). A reply without one counts as No.
soft  The lead is put behind the prompt, and the value is the probability of Yes among the two verdicts: one
      pass over the prompt, nothing is generated (the soft reward of arXiv 2503.23829, where the verifier
      answers greedily and the two verdicts hold all probability).

The rule comes first. A completion without an answer in the right format is never sent, whatever the verifier
would say of it: General-Reasoner pays −0.5, and then +1 after all if the verifier says Yes to «None». What
the rule finds right is right.
"""

import re
import string
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from medrlvr_jax.data.question import Question

LEAD = "Final Decision:"  # what stands before a verdict
VERDICTS = (" Yes", " No")  # as tokens that follow the lead
PROMPTS = {
    "binary": (
        "Question: {question}\n"
        "Reference answer: {reference}\n"
        "Given answer: {answer}\n"
        "Does the given answer mean the same as the reference answer? Do not solve the question. End with "
        '"Final Decision: Yes" or "Final Decision: No".\n'
    ),
    # The wording that TIGER-Lab/general-verifier was trained with.
    "general_reasoner": (
        "User: ### Question: {question}\n\n"
        "### Ground Truth Answer: {reference}\n\n"
        "### Student Answer: {answer}\n\n"
        "For the above question, please verify if the student's answer is equivalent to the ground truth "
        "answer.\n"
        "Do not solve the question by yourself; just check if the student's answer is equivalent to the "
        "ground truth answer.\n"
        "If the student's answer is correct, output \"Final Decision: Yes\". If the student's answer is "
        'incorrect, output "Final Decision: No". Assistant:'
    ),
}
MOST = 10  # tokens by which lengths may differ before the length penalty stops growing


class Case(NamedTuple):
    """What a verifier is shown of one response; a template has these fields."""

    question: str  # with its lettered options, if it has any
    reference: str  # the right answer, of a choice "B. heparin"
    answer: str  # as the response gives it, in one line
    thought: str
    response: str  # the whole completion


def case(question: Question, answer: str, thought: str, response: str) -> Case:
    """The answer's line breaks become blanks, so that it cannot imitate the prompt's other parts."""
    asked = "\n".join([question.question, *question.lettered])
    right = question.right_text if question.value is not None else question.lettered[question.answer]
    return Case(asked, right, " ".join(answer.split()), thought, response)


def template_of(prompt: str) -> str:
    """The template of that name; else `prompt` is one itself. `ValueError` says what is wrong with it."""
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as e:
        raise ValueError(f"{e}; write a brace that is meant as {{{{ or }}}}") from None
    known = ", ".join(f"{{{name}}}" for name in Case._fields)
    if unknown := [name for name in fields if name not in Case._fields]:
        raise ValueError(f"it has {{{unknown[0]}}}; there are {known}")
    if not {"answer", "response"} & set(fields):
        names = ", ".join(PROMPTS)
        raise ValueError(f"it shows no {{answer}}; give {names}, or a text with some of {known}")
    return prompt


def wording(template: str, shown: Case, soft: bool) -> str:
    """The prompt for one response; of a soft verdict, with the lead."""
    text = template.format(**shown._asdict())
    if not soft:
        return text
    return text + (LEAD if not text or text[-1].isspace() else f" {LEAD}")


def to_ask(
    when: Literal["undecided", "wrong", "always"],
    answered: Bool[np.ndarray, " N"],
    right: Bool[np.ndarray, " N"],
    text: Bool[np.ndarray, " N"],
) -> Bool[np.ndarray, " N"]:
    """Which rows the verifier is asked about: of those with an answer, all, those that the rule does not find
    right, or of these only the ones whose reference is a `text`, where spelling does not decide.
    """
    if when == "always":
        return answered
    return answered & ~right & (text if when == "undecided" else True)


def verdict(reply: str, verdicts: tuple[str, str] = VERDICTS) -> bool | None:
    """True for Yes, False for No, by the last line that has the lead; None where it has none or both."""
    lines = [line for line in reply.splitlines() if LEAD in line]
    if not lines:
        return None
    words = re.findall(r"\w+", lines[-1].rpartition(LEAD)[2].casefold())
    yes, no = (word.strip().casefold() for word in verdicts)
    if not words or words[0] not in (yes, no) or {yes, no} <= set(words):
        return None
    return words[0] == yes


def length_factor(answer: int, reference: int, penalty: float) -> float:
    """1 − penalty · min(10, |difference of the lengths in tokens|): General-Reasoner has 0.05."""
    return 1 - penalty * min(MOST, abs(answer - reference))


def standardised(values: Float32[np.ndarray, " N"], of_all: Sequence[float]) -> Float32[np.ndarray, " N"]:
    """(value − mean) / spread over the batch `of_all`, without those that are not finite; 0 where all are
    equal.
    """
    batch = np.array(of_all, np.float64)
    batch = batch[np.isfinite(batch)]
    spread = batch.std() if len(batch) else 0.0
    if spread < 1e-6:
        return np.where(np.isfinite(values), np.float32(0), values)
    return ((values - batch.mean()) / spread).astype(np.float32)

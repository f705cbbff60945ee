"""The component `verifier`: a model decides whether an answer means the same as the right one.

Spelling alone cannot decide that for texts. This module needs no device: it has the prompts, selects the rows
that are sent, reads the replies, and computes the values. verifier_models.py runs a verifier on the run's
mesh or on a server.

A verdict is one of two words, `Yes` or `No`, behind a lead that is the same in every reply (`Final
Decision:`):

hard  The verifier generates a reply, greedily. The verdict follows the lead on the last line that has it
      (General-Reasoner, arXiv 2505.14652). A reply without a verdict counts as No.
soft  The lead is appended to the prompt. The value is the probability of Yes among the two verdicts, so one
      pass over the prompt suffices (the soft reward of arXiv 2503.23829, where the verifier samples greedily
      and the two verdicts hold all probability).

The rule comes first. An answer that the rule finds right is worth 1. A completion without an answer in the
right format is never sent: General-Reasoner gives it −0.5, and then +1 if the verifier says Yes to «None».
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from medrlvr_jax.config.reward import VerifierConfig
from medrlvr_jax.config.schema import AdvantageConfig
from medrlvr_jax.data.question import Question
from medrlvr_jax.host.processes import gather
from medrlvr_jax.rewards.components import ComponentValues
from medrlvr_jax.rewards.graders import Graded
from medrlvr_jax.rewards.user import RewardError

LEAD = "Final Decision:"  # before a verdict
VERDICTS = (" Yes", " No")  # behind the lead, unless the settings name others
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
MAX_DIFFERENCE = 10  # tokens, from which the length penalty no longer grows


class PromptFields(NamedTuple):
    """What a template may show of one response."""

    question: str  # with its options, each behind its letter
    reference: str  # the right answer, for a choice "B. heparin"
    answer: str  # the response's answer in one line
    thought: str
    response: str  # the whole completion


def prompt_fields(question: Question, answer: str, thought: str, response: str) -> PromptFields:
    """Line breaks of the answer become spaces, so that it cannot imitate the prompt's other parts."""
    text = "\n".join([question.question, *question.lettered_options])
    right = question.right_text if question.value is not None else question.lettered_options[question.answer]
    return PromptFields(text, right, " ".join(answer.split()), thought, response)


def find_template(prompt: str) -> str:
    """Return the template with this name, or `prompt` itself. Raises `ValueError` if it is not a template."""
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as e:
        raise ValueError(f"{e}; write a literal brace as {{{{ or }}}}") from None
    known = ", ".join(f"{{{name}}}" for name in PromptFields._fields)
    if unknown := [name for name in fields if name not in PromptFields._fields]:
        raise ValueError(f"it has {{{unknown[0]}}}; there are {known}")
    if not {"answer", "response"} & set(fields):
        names = ", ".join(PROMPTS)
        raise ValueError(f"it shows no {{answer}}; give {names}, or a text with some of {known}")
    return prompt


def append_lead(prompt: str) -> str:
    """Return the prompt that is followed by the verdict."""
    return prompt + (LEAD if not prompt or prompt[-1].isspace() else f" {LEAD}")


def select_rows(
    when: Literal["undecided", "wrong", "always"],
    answered: Bool[np.ndarray, " N"],
    right: Bool[np.ndarray, " N"],
    text: Bool[np.ndarray, " N"],
) -> Bool[np.ndarray, " N"]:
    """Return which of the rows with an answer are sent to the verifier.

    always     all of them
    wrong      those that are wrong by the rule
    undecided  of the wrong ones, those whose reference is a `text`: spelling does not decide them
    """
    if when == "always":
        return answered
    return answered & ~right & (text if when == "undecided" else True)


def read_verdict(reply: str, verdicts: tuple[str, str]) -> float | None:
    """Return 1 for Yes and 0 for No by the last line that has the lead; None if it has no verdict or both."""
    lines = [line for line in reply.splitlines() if LEAD in line]
    if not lines:
        return None
    words = re.findall(r"\w+", lines[-1].rpartition(LEAD)[2].casefold())
    yes, no = (word.strip().casefold() for word in verdicts)
    if not words or words[0] not in (yes, no) or {yes, no} <= set(words):
        return None
    return float(words[0] == yes)


def length_factor(answer: int, reference: int, penalty: float) -> float:
    """Return 1 − penalty · min(10, |difference of the lengths in tokens|). General-Reasoner has 0.05."""
    return 1 - penalty * min(MAX_DIFFERENCE, abs(answer - reference))


def standardise(
    values: Float64[np.ndarray, " N"], batch: Float64[np.ndarray, " B"]
) -> Float64[np.ndarray, " N"]:
    """Return (value − mean) / standard deviation by the finite values of the batch; 0 if all are equal."""
    batch = batch[np.isfinite(batch)]
    spread = batch.std() if len(batch) else 0.0
    return (values - (batch.mean() if len(batch) else 0.0)) / (spread if spread > 1e-6 else np.inf)


def divides_by_spread(advantage: AdvantageConfig) -> bool:
    """Return whether the estimator divides by a standard deviation, so that scale does not matter."""
    if advantage.estimator in ("group", "gdpo"):
        return True
    return advantage.whiten and advantage.estimator not in ("group_mean", "rloo")


# a value from 0 to 1; None for a reply without a verdict; a str that says why there is no reply
Reply = float | None | str


@dataclass(frozen=True, eq=False)
class Verifier:
    """The `RewardFunction` of the component."""

    name: str
    settings: VerifierConfig
    ask: Callable[[Sequence[str]], Sequence[Reply]]  # prompts → replies; all processes call it together
    encode: Callable[[list[str]], list[list[int]]]  # texts → tokens, for the length penalty
    standardise: bool

    def compute(self, graded: Graded) -> ComponentValues:
        """The metrics are the shares of rows that were sent, and of sent rows without a verdict."""
        s, parsed = self.settings, graded.parsed
        answered = graded.parsed.format_ok & np.array([bool(text) for text in parsed.answer], bool)
        is_text = [q.value is not None and q.value.kind == "text" for q in graded.questions]
        sent = select_rows(s.when, answered, graded.correct, np.array(is_text, bool))
        values = np.where(graded.correct, 1.0, np.where(answered, 0.0, s.no_answer))
        template, rows = find_template(s.prompt), np.flatnonzero(sent).tolist()
        fields = [
            prompt_fields(graded.questions[i], parsed.answer[i], parsed.thought[i], graded.completions[i])
            for i in rows
        ]
        prompts = [template.format(**each._asdict()) for each in fields]
        failed: dict[int, str] = {}
        unclear = np.zeros(len(values), bool)
        for row, reply in zip(rows, self.ask(prompts), strict=True):
            unclear[row] = reply is None
            if isinstance(reply, str):
                failed[row] = reply
            values[row] = np.nan if isinstance(reply, str) else reply or 0.0
        self._check_failures(len(rows), failed)
        if s.length_penalty:
            values *= [self._factor(value, i, graded) for i, value in enumerate(values)]
        if self.standardise:
            values = standardise(values, np.array([*chain.from_iterable(gather(values.tolist()))]))
        metrics = {f"{self.name}_share": sent, f"{self.name}_unclear": unclear}
        return ComponentValues(values.tolist(), failed, metrics)

    def _factor(self, value: float, row: int, graded: Graded) -> float:
        if not value > 0:
            return 1.0
        answer, reference = graded.parsed.answer[row], graded.questions[row].right_text
        given, right = self.encode([answer, reference])
        return length_factor(len(given), len(right), self.settings.length_penalty)

    def _check_failures(self, sent: int, failed: Mapping[int, str]) -> None:
        """Raise `RewardError` if the verifier failed on all rows of a batch, in all processes."""
        total, broken = map(sum, zip(*gather([sent, len(failed)]), strict=True))
        if total and broken == total:
            reason = f": {next(iter(failed.values()))}" if failed else ""
            raise RewardError(
                f"reward.components: {self.name} failed on all {total} answers of a batch{reason}"
            )

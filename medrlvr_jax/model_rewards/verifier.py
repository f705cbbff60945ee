"""A model as verifier: whether an answer means what the right one means, where spelling alone cannot tell.

This module has what needs no device: the prompts, which rows are asked, how a reply is read, and what a row
is worth. verifier_models.py runs one on the run's own mesh, endpoint.py asks one that a server runs.

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

LEAD = "Final Decision:"  # what stands before a verdict
VERDICTS = (" Yes", " No")  # what follows it unless the settings name others
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
    asked = "\n".join([question.question, *question.lettered_options])
    right = question.right_text if question.value is not None else question.lettered_options[question.answer]
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


def wording(template: str, shown: Case) -> str:
    """The prompt for one response, without the lead."""
    return template.format(**shown._asdict())


def with_lead(prompt: str) -> str:
    """A prompt that the verdict follows at once."""
    return prompt + (LEAD if not prompt or prompt[-1].isspace() else f" {LEAD}")


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


def verdict(reply: str, verdicts: tuple[str, str]) -> bool | None:
    """True for Yes, False for No, by the last line that has the lead; None where it has none or both."""
    lines = [line for line in reply.splitlines() if LEAD in line]
    if not lines:
        return None
    words = re.findall(r"\w+", lines[-1].rpartition(LEAD)[2].casefold())
    yes, no = (word.strip().casefold() for word in verdicts)
    if not words or words[0] not in (yes, no) or {yes, no} <= set(words):
        return None
    return words[0] == yes


def hard_reply(text: str, verdicts: tuple[str, str]) -> float | None:
    """`verdict` as a value: 1 for Yes, 0 for No."""
    yes = verdict(text, verdicts)
    return None if yes is None else float(yes)


def length_factor(answer: int, reference: int, penalty: float) -> float:
    """1 − penalty · min(10, |difference of the lengths in tokens|): General-Reasoner has 0.05."""
    return 1 - penalty * min(MOST, abs(answer - reference))


def standardised(values: Float64[np.ndarray, " N"], of_all: Sequence[float]) -> Float64[np.ndarray, " N"]:
    """(value − mean) / spread over what is finite of the batch `of_all`; 0 where all are equal."""
    batch = np.array(of_all)
    batch = batch[np.isfinite(batch)]
    spread = batch.std() if len(batch) else 0.0
    return (values - (batch.mean() if len(batch) else 0.0)) / (spread if spread > 1e-6 else np.inf)


def divides_by_spread(advantage: AdvantageConfig) -> bool:
    """Whether the estimator makes rewards independent of their scale by itself."""
    if advantage.estimator in ("group", "gdpo"):
        return True
    return advantage.whiten and advantage.estimator not in ("group_mean", "rloo")


Reply = (
    float | None | str
)  # the probability of Yes, or 1 or 0; None: no verdict; a str: why there is no reply


@dataclass(frozen=True, eq=False)
class Verifier:
    """A verifier as a component's judge."""

    name: str
    settings: VerifierConfig
    ask: Callable[[Sequence[str]], Sequence[Reply]]  # of each prompt; all processes call it together
    spell: Callable[[list[str]], list[list[int]]]  # texts as tokens, whose lengths are compared
    standardise: bool

    def compute(self, graded: Graded) -> ComponentValues:
        """The values of N rows. Also which were sent, and of those the ones without a verdict."""
        s, parsed = self.settings, graded.parsed
        answered = graded.parsed.format_ok & np.array([bool(text) for text in parsed.answer], bool)
        is_text = [q.value is not None and q.value.kind == "text" for q in graded.questions]
        asked = to_ask(s.when, answered, graded.correct, np.array(is_text, bool))
        values = np.where(graded.correct, 1.0, np.where(answered, 0.0, s.no_answer))
        template = template_of(s.prompt)
        rows = np.flatnonzero(asked).tolist()
        texts = [parsed.answer, parsed.thought, graded.completions]
        prompts = [
            wording(template, case(graded.questions[i], *(column[i] for column in texts))) for i in rows
        ]
        failed: dict[int, str] = {}
        unclear = np.zeros(len(values), bool)
        for row, reply in zip(rows, self.ask(prompts), strict=True):
            unclear[row] = reply is None
            if isinstance(reply, str):
                failed[row] = reply
            values[row] = np.nan if isinstance(reply, str) else reply or 0.0
        self._refuse_silence(len(rows), failed)
        if s.length_penalty:
            values *= [self._factor(value, i, graded) for i, value in enumerate(values)]
        if self.standardise:
            values = standardised(values, list(chain.from_iterable(gather(values.tolist()))))
        shares = {f"{self.name}_share": asked, f"{self.name}_unclear": unclear}
        return ComponentValues(values.tolist(), failed, shares)

    def _factor(self, value: float, row: int, graded: Graded) -> float:
        if not value > 0:
            return 1.0
        answer, reference = graded.parsed.answer[row], graded.questions[row].right_text
        given, right = self.spell([answer, reference])
        return length_factor(len(given), len(right), self.settings.length_penalty)

    def _refuse_silence(self, asked: int, failed: Mapping[int, str]) -> None:
        """End the run where the verifier failed on all rows of a batch, in all processes."""
        total, broken = map(sum, zip(*gather([asked, len(failed)]), strict=True))
        if total and broken == total:
            reason = f": {next(iter(failed.values()))}" if failed else ""
            raise RewardError(
                f"reward.components: {self.name} failed on all {total} answers of a batch{reason}"
            )

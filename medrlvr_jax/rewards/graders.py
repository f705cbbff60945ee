"""Grade answers: one grader for each kind of reference, and `parse_and_grade` for N completions.

A grader compares the text between the answer tags with the question's reference. `choice` grades the letter
of an option; `value` grades numbers, dates, durations, labels and texts. A text that is not an answer of the
question's kind (two letters, a number in words) breaks the format.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from medrlvr_jax.config.reward import RewardConfig
from medrlvr_jax.data.question import LETTERS, Question
from medrlvr_jax.data.values import Reference, Unreadable, matches, read_labels
from medrlvr_jax.rewards.parse import WHITE, Parsed, parse


class Grade(NamedTuple):
    answer: str  # the letter or the value; "" where the text is not an answer of the question's kind
    correct: bool
    reason: str  # a key of parse.REASONS or of values.REASONS


class TokenCounts(NamedTuple):
    """Token counts of N sampled completions."""

    lengths: Int[np.ndarray, " N"]  # tokens up to and including the stop token
    stopped: Bool[np.ndarray, " N"]  # False where the limit cut the response
    budget: int  # tokens that a response may have


@dataclass(frozen=True)
class Graded:
    """N completions after parsing and grading. All components of the reward are computed from this."""

    completions: Sequence[str]
    questions: Sequence[Question]
    parsed: Parsed
    format_ok: Bool[np.ndarray, " N"]
    correct: Bool[np.ndarray, " N"]
    answer: np.ndarray  # str [N], see `Grade.answer`
    reason: np.ndarray  # str [N], see `Grade.reason`
    tokens: TokenCounts | None = None  # None for texts from a file


def parse_and_grade(
    completions: Sequence[str],
    questions: Sequence[Question],
    config: RewardConfig,
    tokens: TokenCounts | None = None,
) -> Graded:
    """Parse completion i and grade its answer by question i."""
    parsed = parse(completions, config.mode, [LETTERS[: len(q.options)] for q in questions])
    # The samples of one question give few distinct answers. Each is graded once.
    cache: dict[tuple[int, str, str], Grade] = {}
    grades = []
    for question, answer, reason in zip(questions, parsed.answer, parsed.reason, strict=True):
        key = id(question), answer, reason
        if (grade := cache.get(key)) is None:
            grade = cache[key] = Grade("", False, reason) if reason else grade_answer(answer, question)
        grades.append(grade)
    answers, correct, reasons = zip(*grades, strict=True) if grades else ((), (), ())
    answer = np.array(answers, str)
    columns = answer != "", np.array(correct, bool), answer, np.array(reasons, str)
    return Graded(completions, questions, parsed, *columns, tokens)


def grade_answer(answer: str, question: Question) -> Grade:
    """Grade the text between the answer tags by the question's reference."""
    if question.value is not None:
        return value(answer, question.value)
    return choice(answer, question.reference, question.options)


def choice(answer: str, reference: str, options: Sequence[str]) -> Grade:
    """Grade an option's letter, or its letter with `.`, `)` or `:` and exactly its text.

    `reference` is the letter of the right option.
    """
    if not answer:
        return Grade("", False, "empty_answer")
    letter, mark, text = answer[0], answer[1:2], answer[2:].strip(WHITE)
    if not "A" <= letter <= "Z" or mark not in ("", ".", ")", ":"):
        return Grade("", False, "not_one_letter")
    if letter not in LETTERS[: len(options)]:
        return Grade("", False, "letter_not_an_option")
    if mark and (not text or text != options[LETTERS.index(letter)].strip(WHITE)):
        return Grade("", False, "other_text")
    return Grade(letter, letter == reference, "correct" if letter == reference else "wrong")


def value(answer: str, reference: Reference) -> Grade:
    """Grade a number, date, duration, set of labels or text, by the grammar of data/values.py."""
    if not answer:
        return Grade("", False, "empty_answer")
    try:
        right = matches(answer, reference)
    except Unreadable as e:
        return Grade("", False, str(e))
    if reference.kind in ("label", "labels"):  # "c; A" votes for the same as "A, C"
        answer = ", ".join(read_labels(answer, reference.allowed))
    return Grade(answer, right, "correct" if right else "wrong")


def accepts(answer: str, question: Question, accept: Literal["letter", "words", "mention"]) -> bool:
    """Return whether an answer to a choice is right by the rule of another system.

    letter   The answer is the letter alone (Med-R1).
    words    The answer is the letter, "B. its text" or its text, ignoring case (MedVLThinker).
    mention  The answer has one letter from A to J, once, ignoring case, and it is the right one (MedVLM-R1).
    """
    letter, text = question.reference, question.right_text
    if accept == "letter":
        return answer == letter
    if accept == "words":
        return answer.lower() in (letter.lower(), f"{letter}. {text}".lower().strip(), text.lower().strip())
    return re.findall("[A-J]", answer.upper()) == [letter]

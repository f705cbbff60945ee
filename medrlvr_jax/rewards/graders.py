"""Whether an answer is right: one grader for each kind of reference: `choice` among options, and `value`.

A grader reads the text that `parse` found in <answer>, and compares it with what the question gives as right.
A text that is no answer of the question's kind (two letters, a number in words) counts as wrong in its
format.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from medrlvr_jax.data.question import LETTERS, Question
from medrlvr_jax.data.values import Reference, Unreadable, matches, read_labels
from medrlvr_jax.rewards.parse import WHITE


class Grade(NamedTuple):
    answer: str  # as the grader reads it; "" where the text is no answer of its kind
    correct: bool
    reason: str  # a key of REASONS


def judge_answer(answer: str, question: Question) -> Grade:
    """The text between the answer tags, judged by what the question gives as right."""
    if question.value is not None:
        return value(answer, question.value)
    return choice(answer, question.reference, question.options)


def choice(answer: str, reference: str, options: Sequence[str]) -> Grade:
    """An option's letter, or its letter with `.`, `)` or `:` and its text, spelled the same.

    `reference`: the letter of the right option.
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


def accepts(answer: str, question: Question, how: Literal["letter", "words", "mention"]) -> bool:
    """Whether an answer to a choice is right as other systems read it.

    letter   The letter alone (Med-R1).
    words    The letter, "B. its text" or its text, ignoring case (MedVLThinker).
    mention  The one letter from A to J that occurs, once, in capitals or not (MedVLM-R1).
    """
    key, text = question.reference, question.right_text
    if how == "letter":
        return answer == key
    if how == "words":
        return answer.lower() in (key.lower(), f"{key}. {text}".lower().strip(), text.lower().strip())
    return re.findall("[A-J]", answer.upper()) == [key]


def value(answer: str, reference: Reference) -> Grade:
    """A number, date, duration, set of labels or text, as data/values.py reads it."""
    if not answer:
        return Grade("", False, "empty_answer")
    try:
        right = matches(answer, reference)
    except Unreadable as e:
        return Grade("", False, str(e))
    if reference.kind in ("label", "labels"):  # "c; A" votes for the same as "A, C"
        answer = ", ".join(read_labels(answer, reference.allowed))
    return Grade(answer, right, "correct" if right else "wrong")

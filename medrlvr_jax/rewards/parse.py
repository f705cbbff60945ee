r"""From a completion to its format, thought and answer: `parse`. The three modes are three formats.

White space is ASCII's six characters, space \t \n \v \f \r. Tags count only as spelled here: lower case,
nothing inside. Letters are ASCII capitals, so look-alikes from other scripts are no letters.

strict  Med-RLVR's format (arXiv 2502.19655) without its loopholes. The whole completion is one <think> with
        more than white space in it, closed, then one <answer>, closed. White space may stand around the tags,
        nothing else, and each of the four tags occurs once. What the answer says is judged by graders.py.
direct  As `strict`, for a completion that is the answer alone: one <answer>, no thought, nothing else.
paper   The paper's lenient format with its loopholes: the leftmost shortest match, anywhere, of
            (?s)<think>.+?</think>\s*<answer>\s*([A-E])\s*</answer>
        where A-E are the letters that the question offers. So a blank thought is a thought; a thought may
        contain tags, because it runs from the first <think>; and an answer that is no offered letter is
        skipped, and the search goes on.

Time is linear in the text, whatever it is: a completion is split at its tags once, by a pattern without
repetition, and every rule reads the two lists of tags and of the texts between them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from medrlvr_jax.data.question import EMPTY_THOUGHT, LETTERS

Mode = Literal["strict", "paper", "direct"]

WHITE = " \t\n\v\f\r"
TAG = re.compile(r"(</?(?:think|answer)>)")
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
LAYOUTS = {
    "strict": [THINK, END_THINK, ANSWER, END_ANSWER],
    "direct": [ANSWER, END_ANSWER],
}  # all tags, in order
MISSING = {THINK: "no_think", END_THINK: "unclosed_think", ANSWER: "no_answer", END_ANSWER: "unclosed_answer"}

REASONS = {  # of a verdict; where several fit, a mode reports the first in the order in which it checks them
    "correct": "the key's letter",
    "wrong": "another option's letter",
    "no_think": "no <think>",
    "unclosed_think": "no </think> (paper: none after the first <think>)",
    "no_answer": "no <answer>",
    "unclosed_answer": "no </answer> (paper: none right after an <answer> that follows a thought)",
    "text_between": "more than white space between </think> and <answer> (paper: everywhere)",
    "empty_think": "nothing in the thought (strict: nothing but white space)",
    "empty_answer": "nothing but white space in the answer",
    "not_one_letter": "the answer is not a letter: several, lower case, a look-alike, a text",
    "letter_not_an_option": "the answer is a capital that this question does not offer",
    "other_text": "strict, direct: a letter, then a text that is not this option's",
    "has_think": "direct: a <think> or </think>",
    "several_answers": "strict, direct: more than one <answer> among the first five tags",
    "repeated_tags": "strict, direct: another tag more than once among the first five tags",
    "tags_out_of_order": "strict, direct: each tag once, but not as <think> </think> <answer> </answer>",
    "text_before_think": "strict: more than white space before <think>",
    "text_before_answer": "direct: more than white space before <answer>",
    "text_after_answer": "strict, direct: more than white space after </answer>",
}


@dataclass(frozen=True)
class Parsed:
    """N completions taken apart."""

    format_ok: Bool[np.ndarray, " N"]
    before: list[str]  # what stands before the first <think>; "" without one
    thought: list[str]  # from the first <think> to the next </think>, or to the end; "" without a <think>
    answer: list[str]  # the answer without white space around it; "" where the format failed
    reason: list[str]  # why the format failed, a key of REASONS; "" where it did not


def parse(completions: Sequence[str], mode: Mode, letters: Sequence[str] | None = None) -> Parsed:
    """Format, thought and answer of each of N completions, each by itself.

    `letters`: what each row's question offers, such as "ABCD"; by default A to J. Only `paper` looks at it.
    """
    letters = [LETTERS] * len(completions) if letters is None else letters
    before, thought, answer, reason = [], [], [], []
    for completion, offered in zip(completions, letters, strict=True):
        pieces = TAG.split(completion)
        texts, tags = pieces[::2], pieces[1::2]  # texts[i] stands before tags[i]
        if tags == LAYOUTS["strict"]:
            head, inner = texts[:2]
        else:
            head, opened, tail = completion.partition(THINK)
            head, inner = head if opened else "", tail.partition(END_THINK)[0]
        before.append(head)
        thought.append(inner)
        content, why = _paper(texts, tags, offered) if mode == "paper" else _exact(texts, tags, mode)
        answer.append(content)
        reason.append(why)
    return Parsed(np.array([not why for why in reason], bool), before, thought, answer, reason)


def _exact(texts: list[str], tags: list[str], mode: Mode) -> tuple[str, str]:
    """(answer, "") by the modes `strict` and `direct`, or ("", reason) where the format failed."""
    if tags != LAYOUTS[mode]:
        return "", _wrong_tags(tags[:5], mode)
    before, *thought_and_gap, answer, after = (text.strip(WHITE) for text in texts)
    if before:
        return "", "text_before_think" if thought_and_gap else "text_before_answer"
    if thought_and_gap and not thought_and_gap[0]:
        return "", "empty_think"
    if thought_and_gap and thought_and_gap[1]:
        return "", "text_between"
    return ("", "text_after_answer") if after else (answer, "")


def _wrong_tags(tags: list[str], mode: Mode) -> str:
    """Why tags are not the mode's layout. The first five suffice: of four kinds, one is repeated."""
    if mode == "direct" and (THINK in tags or END_THINK in tags):
        return "has_think"
    if tags.count(ANSWER) > 1:
        return "several_answers"
    if len(set(tags)) < len(tags):
        return "repeated_tags"
    return next((MISSING[tag] for tag in LAYOUTS[mode] if tag not in tags), "tags_out_of_order")


def _paper(texts: list[str], tags: list[str], letters: str) -> tuple[str, str]:
    """(letter, "") by the mode `paper`, or ("", reason) where the format failed.

    Every </think> after the first <think> may be followed by the answer. Each check excludes some of them;
    the reason is the check that excludes the last.
    """
    if THINK not in tags:
        return "", "no_think"
    first, tags = tags.index(THINK) + 1, [*tags, "", ""]  # texts[first] follows the first <think>
    places = [i for i in range(first, len(tags)) if tags[i] == END_THINK]
    if not places:
        return "", "unclosed_think"
    places = [i for i in places if tags[i + 1] == ANSWER and not texts[i + 1].strip(WHITE)]
    if not places:
        return "", "text_between" if ANSWER in tags else "no_answer"
    places = [i for i in places if tags[i + 2] == END_ANSWER]
    if not places:
        return "", "unclosed_answer"
    answers = [(i, texts[i + 2].strip(WHITE)) for i in places]
    if not any(answer for _, answer in answers):
        return "", "empty_answer"
    answers = [(i, answer) for i, answer in answers if len(answer) == 1 and "A" <= answer <= "Z"]
    if not answers:
        return "", "not_one_letter"
    answers = [(i, answer) for i, answer in answers if answer in letters]
    if not answers:
        return "", "letter_not_an_option"
    return next(((answer, "") for i, answer in answers if i > first or texts[first]), ("", "empty_think"))


def is_r1(completion: str) -> bool:
    r"""Whether all of a completion matches (?s)<think>.*?</think>\s*<answer>.*?</answer>, as in open-r1."""
    inner = completion.removeprefix(THINK).removesuffix(END_ANSWER)
    ends = len(inner) == len(completion) - len(THINK) - len(END_ANSWER)
    return ends and re.search(r"</think>\s*<answer>", inner) is not None


def answer_text(completion: str, where: Literal["format", "r1", "tags", "text"]) -> str | None:
    """The text between the first <answer> and the next </answer>, stripped; None where there is no such text.

    `where`: r1: only of a completion that `is_r1`; text: the whole completion if it has no such tags.
    """
    if where == "r1" and not is_r1(completion):
        return None
    inner, closed, _ = completion.partition(ANSWER)[2].partition(END_ANSWER)
    if closed:
        return inner.strip()
    return completion.strip() if where == "text" else None


def judged_beginning(begun: str, mode: Mode) -> str:
    """What is judged before the sampled part if the prompt ends with `begun`, the response's beginning.

    The mode `direct` fails any thought, so an empty one that the prompt itself closes is left out.
    """
    empty = EMPTY_THOUGHT.match(begun) if mode == "direct" else None
    return begun[empty.end() :] if empty else begun


def beginning_trap(begun: str, mode: Mode) -> tuple[str, str] | None:
    """(what is wrong, a remedy) if the format fails for every response that begins with `begun`."""
    template = "chat template, prompt.template_args={enable_thinking: %s}"
    starts = f"every response begins with {begun!r}"
    if mode == "direct" and THINK in judged_beginning(begun, mode):
        wrong = f"{starts}, and reward.mode direct pays for none with a thought"
        return wrong, f"set reward.mode=strict, or, if it is an option of the {template % 'false'}"
    if mode != "direct" and EMPTY_THOUGHT.match(begun):
        wrong = f"{starts}, an empty thought, and reward.mode {mode} pays for one that is not"
        return wrong, f"set reward.mode=direct, or, if it comes from the {template % 'true'}"
    return None

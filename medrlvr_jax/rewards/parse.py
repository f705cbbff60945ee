r"""Parse completions: find the thought and the answer, and check the format. There are three formats.

White space means ASCII's six characters, space \t \n \v \f \r. Tags count only in lower case and without
anything inside. Letters are ASCII capitals, so look-alikes from other scripts do not count.

strict  Med-RLVR's format (arXiv 2502.19655) without its loopholes. The whole completion is one closed <think>
        that contains more than white space, then one closed <answer>. Each of the four tags occurs once, and
        only white space stands outside them. graders.py grades the answer.
direct  As `strict`, for completions without a thought: one closed <answer>, and nothing else.
paper   The paper's lenient format with its loopholes: the leftmost shortest match, anywhere, of
            (?s)<think>.+?</think>\s*<answer>\s*([A-E])\s*</answer>
        where A-E are the letters that the question offers. So a blank thought counts; a thought may contain
        tags, because it begins at the first <think>; and an answer that is not an offered letter is skipped,
        and the search goes on.

Parsing takes linear time for any text: a completion is split at its tags once, by a pattern without
repetition. Every rule then reads two lists, the tags and the texts between them.
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
}  # the tags of a completion, in order
MISSING = {THINK: "no_think", END_THINK: "unclosed_think", ANSWER: "no_answer", END_ANSWER: "unclosed_answer"}

REASONS = {  # of a verdict; if several apply, the mode reports the one that it checks first
    "correct": "the key's letter",
    "wrong": "another option's letter",
    "no_think": "no <think>",
    "unclosed_think": "no </think> (paper: none after the first <think>)",
    "no_answer": "no <answer>",
    "unclosed_answer": "no </answer> (paper: none right after an <answer> that follows a thought)",
    "text_between": "more than white space between </think> and <answer> (paper: everywhere)",
    "empty_think": "nothing in the thought (strict: nothing but white space)",
    "empty_answer": "nothing but white space in the answer",
    "not_one_letter": "the answer is not one capital letter: several, lower case, a look-alike, a text",
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
    """The parts of N completions."""

    format_ok: Bool[np.ndarray, " N"]
    before: list[str]  # the text before the first <think>; "" without a <think>
    thought: list[str]  # from the first <think> to the next </think>, or to the end; "" without a <think>
    answer: list[str]  # the answer without white space around it; "" where the format failed
    reason: list[str]  # why the format failed, a key of REASONS; "" where it is right


def parse(completions: Sequence[str], mode: Mode, letters: Sequence[str] | None = None) -> Parsed:
    """Parse N completions, each by itself.

    `letters` are the letters that each row's question offers, such as "ABCD"; A to J by default. Only `paper`
    reads them.
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
    """Return (answer, "") by the modes `strict` and `direct`, or ("", reason) if the format failed."""
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
    """Return why these tags are not the mode's layout.

    Five tags suffice as input: there are four kinds, so one of them is repeated.
    """
    if mode == "direct" and (THINK in tags or END_THINK in tags):
        return "has_think"
    if tags.count(ANSWER) > 1:
        return "several_answers"
    if len(set(tags)) < len(tags):
        return "repeated_tags"
    return next((MISSING[tag] for tag in LAYOUTS[mode] if tag not in tags), "tags_out_of_order")


def _paper(texts: list[str], tags: list[str], letters: str) -> tuple[str, str]:
    """Return (letter, "") by the mode `paper`, or ("", reason) if the format failed.

    The answer may follow any </think> after the first <think>. Each check excludes some of these places. The
    reason is the check that excludes the last one.
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
    r"""Return whether the whole completion matches open-r1's format.

    It is (?s)<think>.*?</think>\s*<answer>.*?</answer>.
    """
    inner = completion.removeprefix(THINK).removesuffix(END_ANSWER)
    ends = len(inner) == len(completion) - len(THINK) - len(END_ANSWER)
    return ends and re.search(r"</think>\s*<answer>", inner) is not None


def answer_text(completion: str, where: Literal["r1", "tags", "text"]) -> str | None:
    """Return the text between the first <answer> and the next </answer>, stripped, or None without such tags.

    With `r1`, return None also if the completion is not in open-r1's format. With `text`, return the whole
    completion if it has no such tags.
    """
    if where == "r1" and not is_r1(completion):
        return None
    inner, closed, _ = completion.partition(ANSWER)[2].partition(END_ANSWER)
    if closed:
        return inner.strip()
    return completion.strip() if where == "text" else None


def graded_prefix(begun: str, mode: Mode) -> str:
    """Return the part of the response's beginning in the prompt, `begun`, that is graded with the response.

    The mode `direct` allows no thought, so it leaves out an empty thought that the prompt itself closes.
    """
    empty = EMPTY_THOUGHT.match(begun) if mode == "direct" else None
    return begun[empty.end() :] if empty else begun


def prefix_conflict(begun: str, mode: Mode) -> tuple[str, str] | None:
    """Return (problem, remedy) if every response that begins with `begun` breaks the format, else None."""
    template = "chat template, prompt.template_args={enable_thinking: %s}"
    starts = f"every response begins with {begun!r}"
    if mode == "direct" and THINK in graded_prefix(begun, mode):
        problem = f"{starts}, and reward.mode direct allows no thought"
        return problem, f"set reward.mode=strict, or, if it is an option of the {template % 'false'}"
    empty = EMPTY_THOUGHT.match(begun)
    if empty and mode != "direct" and not parse([f"{empty[0]}{ANSWER}A{END_ANSWER}"], mode).format_ok[0]:
        problem = f"{starts}, an empty thought, which breaks the format of reward.mode {mode}"
        return problem, f"set reward.mode=direct, or, if it comes from the {template % 'true'}"
    return None

"""A question as a prompt: the wording, what the chat template writes around it, its tokens, and padding.

In a prompt only the chat template's own special tokens are special, never what data says. Prompts are never
truncated: those that are too long are dropped and counted.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from medrlvr_jax.config.schema import PromptConfig
from medrlvr_jax.data.question import EMPTY_THOUGHT, TAGS, DataError, Question
from medrlvr_jax.data.tokenizer import MESSAGE, Progress, Tokenizer, quiet
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.types import Prompts

# ---- wording: the paper does not give its own, so this is ours; it stands only here ----

ROLE = "You are a medical expert taking the United States Medical Licensing Examination (USMLE)."
BEGIN = f"{ROLE}\n\n{{question}}\n\n"
TEMPLATES = {
    "think": f"{BEGIN}Reason step by step inside <think> </think> tags, then give {{answer}} inside "
    "<answer> </answer> tags, in this form: <think>reasoning</think><answer>{form}</answer>",
    "direct": f"{BEGIN}Give {{answer}} inside <answer> </answer> tags, and nothing else, in this form: "
    "<answer>{form}</answer>",
    "none": "{question}",
}
FIELD = re.compile(r"\{(?:question|answer|form)\}")  # of a wording; braces in a question are text
IMAGE = "<image>"  # in a question's text: where its next image stands
DATES = {None: "2024-03-31", "month_first": "MM/DD/YYYY", "day_first": "DD/MM/YYYY"}
# By the kind of a question: what is asked for, and the word that stands for it.
ANSWERS = {
    "choice": ("the letter of the one best option", "letter"),
    "choices": ("the letters of all options that apply, separated by commas,", "letters"),
    "number": ("the number{unit}", "number"),
    "integer": ("the whole number{unit}", "number"),
    "date": ("the date, in the form {date},", "date"),
    "duration": ("the time in weeks and days, in the form 3 weeks 2 days,", "time"),
    "label": ("one of these labels: {labels},", "label"),
    "labels": ("one or more of these labels, separated by commas: {labels},", "labels"),
    "text": ("the answer in a few words", "answer"),
}


def render(question: Question, template: str) -> str:
    """The user's text: a question in the wording that `PromptConfig.template` names, or is."""
    asked = "\n".join([f"Question: {question.question}", *question.lettered_options])
    answer, form = answer_form(question)
    parts = {"{question}": asked, "{answer}": answer, "{form}": form}
    return FIELD.sub(lambda field: parts[field[0]], TEMPLATES.get(template, template))


def answer_form(question: Question) -> tuple[str, str]:
    """(what the prompt asks for, the word that stands for it) by the kind of the right answer."""
    (asked, form), value = ANSWERS[question.kind], question.value
    if value is None:
        return asked, form
    unit = f" in {value.unit}" if value.unit else ""
    return asked.format(unit=unit, date=DATES[value.order], labels=", ".join(value.allowed)), form


def sft_target(question: Question, target: str) -> str:
    """What fine-tuning teaches, by `SFTConfig.target`: the answer, or also the rationale as a thought."""
    answer = f"<answer>{question.reference}</answer>"
    if target == "answer":
        return answer
    if not question.rationale:
        remedy = "take sft.target answer, or a set with rationales"
        raise DataError(f"question {question.id}: it has no rationale to learn; {remedy}")
    if tag := next((tag for tag in TAGS if tag in question.rationale), None):
        problem = f"its rationale holds {tag}, which would break the format"
        raise DataError(f"question {question.id}: {problem}; take the tag out")
    return f"<think>{question.rationale}</think>\n{answer}"


# ---- what stands around a question ----


class Frame(NamedTuple):
    """A prompt without its question: ids, plain text before the user's text, plain text after it, ids.

    The plain text is encoded together with the question, since a token may span the seam; no special
    token does.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]
    given: str  # the end of after + tail: what the template itself writes into the assistant's turn


def frame(tok: Tokenizer, config: PromptConfig, begun: bool = True) -> Frame:
    """What stands around a user's message, with or without a template. `begun` False: without `given`."""
    if not config.chat:
        return Frame(tok.prefix, "", "\n", [], "")
    _check_template(tok, config)
    parts = converse(tok, config, "user").split(MESSAGE)
    if len(parts) != 2:
        problem = f"the chat template holds a message {len(parts) - 1} times"
        raise ConfigError(f"prompt.chat: true, but {problem}; set prompt.chat to false")
    before, after = parts
    if config.system and config.system.strip() not in before + after:
        problem = "the chat template leaves the system turn out"
        raise ConfigError(f"prompt.system: {problem}; set prompt.system to null")
    given = _given(tok, config, after)
    if twice := next((tag for tag in TAGS if tag in given and tag in config.prefill), None):
        problem = f"the chat template itself begins a response with {given!r}, so there would be two {twice}"
        raise ConfigError(f"prompt.prefill: {config.prefill!r}: {problem}; set prompt.prefill to ''")
    if not begun:
        after, given = after.removesuffix(given), ""
    start = max((m.end() for m in tok.specials.finditer(before)), default=0)
    end = min((m.start() for m in tok.specials.finditer(after)), default=len(after))
    head, tail = tok.encode_trusted(before[:start]), tok.encode_trusted(after[end:])
    return Frame(head, before[start:], after[:end], tail, given)


def begins(tok: Tokenizer, config: PromptConfig) -> str:
    """How every response begins, by the template and then by `prefill`: in the prompt, and graded."""
    return frame(tok, config).given + config.prefill


def _check_template(tok: Tokenizer, config: PromptConfig) -> None:
    if not tok.hf.chat_template:
        problem = "the tokenizer has no chat template"
        raise ConfigError(f"prompt.chat: true, but {problem}; set prompt.chat to false")
    template = tok.hf.get_chat_template()
    for name in config.template_args:  # jinja ignores names that it does not know
        reserved = name in ("messages", "add_generation_prompt")
        if reserved or not re.search(rf"\b{re.escape(name)}\b", template):
            problem = "the chat template has no such variable to set"
            raise ConfigError(f"prompt.template_args.{name}: {problem}; take it out, or correct its name")


def converse(tok: Tokenizer, config: PromptConfig, *roles: str) -> str:
    """A rendered conversation in which each role says MESSAGE; a single turn has the generation prompt."""
    turns = [{"role": role, "content": MESSAGE} for role in roles]
    source, remedy = f"{tok.hf.name_or_path}: chat_template", "set prompt.chat to false"
    if config.system is not None:
        turns.insert(0, {"role": "system", "content": config.system})
        source += f" of a conversation with prompt.system {config.system[:40]!r}"
        remedy = "set prompt.system to null"
    settings = config.template_args | {"add_generation_prompt": len(roles) == 1}
    with files.reading(source, remedy):
        return tok.hf.apply_chat_template(turns, tokenize=False, **settings)


def _given(tok: Tokenizer, config: PromptConfig, after: str) -> str:
    """The end of `after`, the prompt from the user's message on, that lies in the assistant's turn.

    It begins where the generation prompt departs from what stands before a past answer, but not within a
    role's name, and at the latest where a thought is opened, or opened and closed, at the very end.
    """
    try:
        past = converse(tok, config, "user", "assistant", "user").split(MESSAGE)
    except ConfigError:  # this template does not render past turns, so there is nothing to compare with
        past = []
    header = past[1] if len(past) == 4 else after
    differs = next((i for i, (a, b) in enumerate(zip(after, header, strict=False)) if a != b), None)
    start = min(len(after), len(header)) if differs is None else differs
    roles_end = max((m.end() for m in tok.specials.finditer(after) if m[0] not in TAGS), default=0)
    thought = re.search(r"(?:<think>\s*)?(?:</think>\s*)?\Z", after)
    thought_start = thought.start() if thought else len(after)
    return after[min(max(start, roles_end), thought_start) :].lstrip()


def to_teach(tok: Tokenizer, targets: list[str], config: PromptConfig) -> list[str]:
    """The targets without `begins`, which their prompts hold; they need not repeat the white space after it.

    After an empty thought in the prompt, targets without a thought are learned.
    """
    begun = begins(tok, config)
    if closed := EMPTY_THOUGHT.match(begun):
        begun = begun if any(TAGS[0] in target for target in targets) else begun[closed.end() :]
    start = begun.strip()
    if odd := next((t for t in targets if not t.startswith(start)), None):
        remedy = "change one of the two"
        if begun != config.prefill:
            switch = "set prompt.template_args={enable_thinking: …} where it has that"
            remedy = f"the chat template writes it: take another sft.target, or {switch}"
        raise ConfigError(f"prompt.prefill: {begun!r} is not how the target begins: {odd[:40]!r}; {remedy}")
    return [target[len(start) :] for target in targets]


# ---- tokens ----


def encode_questions(
    tok: Tokenizer,
    questions: list[Question],
    config: PromptConfig,
    begun: bool = True,
    images: Sequence[list[list[int]]] | None = None,
    progress: Progress = quiet,
) -> list[list[int]]:
    """The prompts' tokens. Without a chat template a prompt ends with a line break.

    `begun` False: without what is already given of the response, by the template or by `prefill`. `images`:
    the tokens of each image of each question; they stand where the question's text says `<image>` or, where
    it never does, first.
    """
    f = frame(tok, config, begun)
    rendered = [render(question, config.template) for question in questions]
    # A template may end the user's turn with plain text, such as "[/INST]", which a question could imitate.
    after = f.after.removesuffix(f.given)
    if config.chat and (end := next(filter(None, map(str.strip, after.splitlines())), "")):
        if bad := next((q for q, content in zip(questions, rendered, strict=True) if end in content), None):
            problem = f"it spells {end!r}, which ends the user's turn in this chat template"
            raise DataError(f"question {bad.id}: {problem}; take it out")
    tail = f.tail + (tok.spell([config.prefill])[0] if begun else [])
    texts = _spell(tok, questions, rendered, images, (f.before, f.after), progress)
    return [f.head + ids + tail for ids in texts]


def encode_texts(
    tok: Tokenizer,
    questions: list[Question],
    images: Sequence[list[list[int]]] | None = None,
    progress: Progress = quiet,
) -> list[list[int]]:
    """The tokens of the questions' texts alone, without wording; `images`: as in `encode_questions`."""
    rows = _spell(tok, questions, [q.question for q in questions], images, ("", ""), progress)
    return [tok.prefix + ids for ids in rows]


def _spell(
    tok: Tokenizer,
    questions: list[Question],
    contents: list[str],
    images: Sequence[list[list[int]]] | None,
    around: tuple[str, str],
    progress: Progress,
) -> list[list[int]]:
    """The tokens of the user's text of each question, between the two texts `around` it; an image's own stand
    in place of its mark.
    """
    before, after = around
    if images is None:
        if pictured := next((q for q in questions if q.images), None):
            remedy = "train or evaluate a vision-language model, or set fields={image: null} beside path"
            raise DataError(f"question {pictured.id}: it has images, which are not seen here; {remedy}")
        return tok.spell([before + content + after for content in contents], progress)
    marked = [before + _mark(*each) + after for each in zip(questions, contents, images, strict=True)]
    pieces = [text.split(IMAGE) if seen else [text] for text, seen in zip(marked, images, strict=True)]
    tokens = iter(tok.spell([piece for parts in pieces for piece in parts], progress))
    return [[i for image in (*seen, []) for i in (*next(tokens), *image)] for seen in images]


def _mark(question: Question, content: str, images: list[list[int]]) -> str:
    """The user's text with a mark for each image of its question; without images a mark is text."""
    marks = content.count(IMAGE)
    if images and marks not in (0, len(images)):
        problem = f"{IMAGE} stands {marks} times in it, and it has {len(images)} images"
        raise DataError(f"question {question.id}: {problem}; give as many, or no mark at all")
    return content if marks else IMAGE * len(images) + content


def encode_prompts(
    tok: Tokenizer,
    questions: list[Question],
    config: PromptConfig,
    images: Sequence[list[list[int]]] | None = None,
    progress: Progress = quiet,
) -> tuple[list[list[int]], list[int]]:
    """(tokens of the prompts that fit `max_tokens`, indices of the questions that do not)."""
    rows = encode_questions(tok, questions, config, images=images, progress=progress)
    dropped = [i for i, row in enumerate(rows) if len(row) > config.max_tokens]
    return [row for row in rows if len(row) <= config.max_tokens], dropped


def pad_prompts(rows: Sequence[list[int]], ids: UInt32[np.ndarray, " Q"], width: int, pad_id: int) -> Prompts:
    """Rows of tokens, left-padded to `width` columns."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if not 0 < len(row) <= width:
            raise ValueError(f"prompt {i} has {len(row)} tokens, and 1 to {width} fit: see encode_prompts")
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return Prompts(tokens, mask, np.asarray(ids, np.uint32))

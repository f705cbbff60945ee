"""Turn questions into prompts: wording, chat template, tokens, padding.

Only the chat template's own special tokens become special tokens; text from data never does. Prompts are
never truncated: those that are too long are dropped and counted.

The *response prefix* is the beginning of a response that the prompt already contains: what the chat template
writes into the assistant's turn, then `prompt.prefill`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from medrlvr_jax.config.schema import PromptConfig
from medrlvr_jax.data.question import EMPTY_THOUGHT, TAGS, DataError, Question
from medrlvr_jax.data.tokenizer import MESSAGE, Progress, Tokenizer, no_progress
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.types import Prompts

# ---- wording: the paper does not publish its own, so this one is ours ----

ROLE = "You are a medical expert taking the United States Medical Licensing Examination (USMLE)."
INTRO = f"{ROLE}\n\n{{question}}\n\n"
TEMPLATES = {
    "think": f"{INTRO}Reason step by step inside <think> </think> tags, then give {{answer}} inside "
    "<answer> </answer> tags, in this form: <think>reasoning</think><answer>{form}</answer>",
    "direct": f"{INTRO}Give {{answer}} inside <answer> </answer> tags, and nothing else, in this form: "
    "<answer>{form}</answer>",
    "none": "{question}",
}
FIELD = re.compile(r"\{(?:question|answer|form)\}")  # fields of a template; braces in a question are text
IMAGE = "<image>"  # marks the place of the next image in a question's text
DATES = {None: "2024-03-31", "month_first": "MM/DD/YYYY", "day_first": "DD/MM/YYYY"}
# For each kind of question: what the prompt asks for, and its placeholder in <answer>…</answer>.
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
    """Return the user's text for a question. `template` is the name of a template, or a template itself."""
    text = "\n".join([f"Question: {question.question}", *question.lettered_options])
    answer, form = _answer_form(question)
    parts = {"{question}": text, "{answer}": answer, "{form}": form}
    return FIELD.sub(lambda field: parts[field[0]], TEMPLATES.get(template, template))


def _answer_form(question: Question) -> tuple[str, str]:
    """Return what the prompt asks for, and its placeholder, for the question's kind."""
    (wanted, form), value = ANSWERS[question.kind], question.value
    if value is None:
        return wanted, form
    unit = f" in {value.unit}" if value.unit else ""
    return wanted.format(unit=unit, date=DATES[value.order], labels=", ".join(value.allowed)), form


def sft_target(question: Question, target: str) -> str:
    """Return the response to learn by `SFTConfig.target`: the answer, or the rationale and the answer."""
    answer = f"<answer>{question.reference}</answer>"
    if target == "answer":
        return answer
    if not question.rationale:
        remedy = "set sft.target to answer, or use a set with rationales"
        raise DataError(f"question {question.id}: it has no rationale to learn; {remedy}")
    if tag := next((tag for tag in TAGS if tag in question.rationale), None):
        problem = f"its rationale contains {tag}, which would break the format"
        raise DataError(f"question {question.id}: {problem}; remove the tag")
    return f"<think>{question.rationale}</think>\n{answer}"


# ---- the parts of a prompt around the question ----


class Frame(NamedTuple):
    """A prompt without its question: ids, text before the user's text, text after it, ids.

    The texts have no special tokens. They are encoded together with the question, since a token may span
    the boundary between them.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]
    prefix: str  # the end of after + tail: what the template writes into the assistant's turn


def make_frame(tok: Tokenizer, config: PromptConfig, with_prefix: bool = True) -> Frame:
    """Return the frame around a user's message. `with_prefix` False: leave the response prefix out."""
    if not config.chat:
        return Frame(tok.bos_ids, "", "\n", [], "")
    _check_template(tok, config)
    parts = render_conversation(tok, config, "user").split(MESSAGE)
    if len(parts) != 2:
        problem = f"the chat template renders a message {len(parts) - 1} times"
        raise ConfigError(f"prompt.chat: true, but {problem}; set prompt.chat to false")
    before, after = parts
    if config.system and config.system.strip() not in before + after:
        problem = "the chat template ignores the system turn"
        raise ConfigError(f"prompt.system: {problem}; set prompt.system to null")
    prefix = _template_prefix(tok, config, after)
    if twice := next((tag for tag in TAGS if tag in prefix and tag in config.prefill), None):
        problem = f"the chat template itself begins a response with {prefix!r}, so {twice} would occur twice"
        raise ConfigError(f"prompt.prefill: {config.prefill!r}: {problem}; set prompt.prefill to ''")
    if not with_prefix:
        after, prefix = after.removesuffix(prefix), ""
    start = max((m.end() for m in tok.special_pattern.finditer(before)), default=0)
    end = min((m.start() for m in tok.special_pattern.finditer(after)), default=len(after))
    head, tail = tok.encode_trusted(before[:start]), tok.encode_trusted(after[end:])
    return Frame(head, before[start:], after[:end], tail, prefix)


def response_prefix(tok: Tokenizer, config: PromptConfig) -> str:
    """Return the response prefix, which is part of the prompt, and graded as part of the response."""
    return make_frame(tok, config).prefix + config.prefill


def _check_template(tok: Tokenizer, config: PromptConfig) -> None:
    if not tok.hf.chat_template:
        problem = "the tokenizer has no chat template"
        raise ConfigError(f"prompt.chat: true, but {problem}; set prompt.chat to false")
    template = tok.hf.get_chat_template()
    for name in config.template_args:  # Jinja ignores unknown names
        reserved = name in ("messages", "add_generation_prompt")
        if reserved or not re.search(rf"\b{re.escape(name)}\b", template):
            problem = "the chat template has no such variable to set"
            raise ConfigError(f"prompt.template_args.{name}: {problem}; remove it, or correct its name")


def render_conversation(tok: Tokenizer, config: PromptConfig, *roles: str) -> str:
    """Render a conversation in which each role says MESSAGE. A single turn gets the generation prompt."""
    turns = [{"role": role, "content": MESSAGE} for role in roles]
    source, remedy = f"{tok.hf.name_or_path}: chat_template", "set prompt.chat to false"
    if config.system is not None:
        turns.insert(0, {"role": "system", "content": config.system})
        source += f" of a conversation with prompt.system {config.system[:40]!r}"
        remedy = "set prompt.system to null"
    settings = config.template_args | {"add_generation_prompt": len(roles) == 1}
    with files.reading(source, remedy):
        return tok.hf.apply_chat_template(turns, tokenize=False, **settings)


def _template_prefix(tok: Tokenizer, config: PromptConfig, after: str) -> str:
    """Return the part of `after`, the prompt after the user's message, that is in the assistant's turn.

    It begins where the generation prompt differs from the text before a past answer, but not within a role's
    name. It includes a thought that `after` opens, or opens and closes, at its very end.
    """
    try:
        past = render_conversation(tok, config, "user", "assistant", "user").split(MESSAGE)
    except ConfigError:  # this template does not render past turns, so there is nothing to compare with
        past = []
    header = past[1] if len(past) == 4 else after
    differs = next((i for i, (a, b) in enumerate(zip(after, header, strict=False)) if a != b), None)
    start = min(len(after), len(header)) if differs is None else differs
    roles_end = max((m.end() for m in tok.special_pattern.finditer(after) if m[0] not in TAGS), default=0)
    thought = re.search(r"(?:<think>\s*)?(?:</think>\s*)?\Z", after)
    thought_start = thought.start() if thought else len(after)
    return after[min(max(start, roles_end), thought_start) :].lstrip()


def strip_prefix(tok: Tokenizer, targets: list[str], config: PromptConfig) -> list[str]:
    """Remove the response prefix, which the prompts contain, from the targets of fine-tuning.

    White space after the prefix may be missing in targets. If the prefix is an empty thought, targets without
    a thought need not repeat it. Raises `ConfigError` if a target begins with another text.
    """
    prefix = response_prefix(tok, config)
    if (empty := EMPTY_THOUGHT.match(prefix)) and not any(TAGS[0] in target for target in targets):
        prefix = prefix[empty.end() :]
    start = prefix.strip()
    if odd := next((t for t in targets if not t.startswith(start)), None):
        remedy = "change one of the two"
        if prefix != config.prefill:
            switch = "set prompt.template_args={enable_thinking: …} if the template has it"
            remedy = f"the chat template writes it: use another sft.target, or {switch}"
        raise ConfigError(f"prompt.prefill: {prefix!r} is not how the target begins: {odd[:40]!r}; {remedy}")
    return [target[len(start) :] for target in targets]


# ---- tokens ----


def encode_questions(
    tok: Tokenizer,
    questions: list[Question],
    config: PromptConfig,
    with_prefix: bool = True,
    images: Sequence[list[list[int]]] | None = None,
    progress: Progress = no_progress,
) -> list[list[int]]:
    """Encode questions as prompts. Without a chat template, a prompt ends with a line break.

    `with_prefix` False: leave the response prefix out. `images`: the tokens of each image of each question.
    They replace the marks `<image>` in the question's text, or come first if it has none.
    """
    f = make_frame(tok, config, with_prefix)
    rendered = [render(question, config.template) for question in questions]
    # A template may end the user's turn with plain text, such as "[/INST]", which a question could imitate.
    after = f.after.removesuffix(f.prefix)
    if config.chat and (end := next(filter(None, map(str.strip, after.splitlines())), "")):
        if bad := next((q for q, content in zip(questions, rendered, strict=True) if end in content), None):
            problem = f"it contains {end!r}, which ends the user's turn in this chat template"
            raise DataError(f"question {bad.id}: {problem}; remove it")
    tail = f.tail + (tok.encode_untrusted([config.prefill])[0] if with_prefix else [])
    texts = _encode(tok, questions, rendered, images, (f.before, f.after), progress)
    return [f.head + ids + tail for ids in texts]


def encode_texts(
    tok: Tokenizer,
    questions: list[Question],
    images: Sequence[list[list[int]]] | None = None,
    progress: Progress = no_progress,
) -> list[list[int]]:
    """Encode the texts of questions alone, without a template; `images` as in `encode_questions`."""
    rows = _encode(tok, questions, [q.question for q in questions], images, ("", ""), progress)
    return [tok.bos_ids + ids for ids in rows]


def _encode(
    tok: Tokenizer,
    questions: list[Question],
    contents: list[str],
    images: Sequence[list[list[int]]] | None,
    around: tuple[str, str],
    progress: Progress,
) -> list[list[int]]:
    """Encode each question's text between the two texts `around` it, with image tokens in place of marks."""
    before, after = around
    if images is None:
        if pictured := next((q for q in questions if q.images), None):
            remedy = "use a vision-language model, or set fields={image: null} beside path"
            raise DataError(f"question {pictured.id}: it has images, which this model cannot read; {remedy}")
        return tok.encode_untrusted([before + content + after for content in contents], progress)
    marked = [before + _mark_images(*each) + after for each in zip(questions, contents, images, strict=True)]
    pieces = [
        text.split(IMAGE) if of_question else [text] for text, of_question in zip(marked, images, strict=True)
    ]
    tokens = iter(tok.encode_untrusted([piece for parts in pieces for piece in parts], progress))
    return [[i for image in (*of_question, []) for i in (*next(tokens), *image)] for of_question in images]


def _mark_images(question: Question, content: str, images: list[list[int]]) -> str:
    """Return the user's text with a mark for each image. If the question has no image, a mark is text."""
    marks = content.count(IMAGE)
    if images and marks not in (0, len(images)):
        problem = f"its text has {IMAGE} {marks} times, and it has {len(images)} images"
        raise DataError(f"question {question.id}: {problem}; give one mark for each image, or no mark")
    return content if marks else IMAGE * len(images) + content


def encode_prompts(
    tok: Tokenizer,
    questions: list[Question],
    config: PromptConfig,
    images: Sequence[list[list[int]]] | None = None,
    progress: Progress = no_progress,
) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of the prompts that fit `max_tokens`, and the indices of the other questions."""
    rows = encode_questions(tok, questions, config, images=images, progress=progress)
    dropped = [i for i, row in enumerate(rows) if len(row) > config.max_tokens]
    return [row for row in rows if len(row) <= config.max_tokens], dropped


def pad_prompts(rows: Sequence[list[int]], ids: UInt32[np.ndarray, " Q"], width: int, pad_id: int) -> Prompts:
    """Left-pad rows of tokens to `width` columns."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if not 0 < len(row) <= width:
            raise ValueError(f"prompt {i} has {len(row)} tokens, and 1 to {width} fit: see encode_prompts")
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return Prompts(tokens, mask, np.asarray(ids, np.uint32))

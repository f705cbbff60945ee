"""Between text and tokens: the tokenizer, the wording of prompts and targets, and the decoding of completions.

What a data file says is never obeyed: `<|im_end|>` inside a question is spelled out as plain text, while the chat template's own special
tokens are special. Prompts are never cut: those that are too long are dropped and counted. Masks, not pad ids, say what is a token.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from medrlvr_jax.config.schema import PromptConfig
from medrlvr_jax.data.formats import EMPTY_THOUGHT, LETTERS, DataError, Question
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model.weights import resolve
from medrlvr_jax.types import Prompts

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MESSAGE = "\ue000message\ue000"  # stands where the user's text goes while a chat template is rendered; private-use, so in no template


# ---- wording: the paper's own is not known, so this is ours; the only place where it stands ----

ROLE = "You are a medical expert taking the United States Medical Licensing Examination (USMLE)."
THINK = (
    "Reason step by step inside <think> </think> tags, then give the letter of the one best option inside <answer> </answer> tags, "
    "in this form: <think>reasoning</think><answer>letter</answer>"
)
DIRECT = "Give the letter of the one best option inside <answer> </answer> tags, and nothing else, in this form: <answer>letter</answer>"


def render(question: Question, template: str) -> str:
    """The user's text, by `PromptConfig.template`; `none` is the question and its lettered options alone."""
    asked = "\n".join([f"Question: {question.question}", *map("{}. {}".format, LETTERS, question.options)])
    return asked if template == "none" else f"{ROLE}\n\n{asked}\n\n{THINK if template == 'think' else DIRECT}"


def sft_target(question: Question, target: str) -> str:
    """What fine-tuning teaches, by `SFTConfig.target`: the answer alone, or the rationale as the thought before it."""
    answer = f"<answer>{LETTERS[question.answer]}</answer>"
    if target == "answer":
        return answer
    if not question.rationale:
        raise DataError(f"question {question.id}: it has no rationale to learn; take sft.target answer, or a set with rationales")
    if tag := next((tag for tag in TAGS if tag in question.rationale), None):
        raise DataError(f"question {question.id}: its rationale holds {tag}, which would break the format; take the tag out")
    return f"<think>{question.rationale}</think>\n{answer}"


# ---- the tokenizer ----


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A transformers tokenizer as this library uses it. Both encoders are copies that neither cut nor pad, whatever its files say."""

    hf: Any  # transformers' own: the chat template, the names of the special tokens, `save_pretrained`
    trusted: tokenizers.Tokenizer  # special tokens' strings become special tokens
    plain: tokenizers.Tokenizer  # they are spelled out like any other text
    pad_id: int
    stop_ids: tuple[int, ...]  # any of them ends a response; the first ends the targets of fine-tuning
    vocab_size: int  # the largest id + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text of a data set may become; `unk` is what unknown words become, so it is not one of them."""
        return frozenset(_specials(self.trusted)) - {self.hf.unk_token_id}

    @functools.cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before a text by itself: BOS, or nothing."""
        return [i for i in self.trusted.encode("").ids if i == self.hf.bos_token_id]

    @functools.cached_property
    def specials(self) -> re.Pattern[str]:
        """The name of any special token, the longer ones first."""
        names = sorted(_specials(self.trusted).values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")  # (?!): never matches

    def show(self, ids: Sequence[int]) -> str:
        """All the tokens as text, special ones by their names. Ids that the tokenizer does not know give no text."""
        return self.trusted.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(path: str) -> Tokenizer:
    """From a Hugging Face directory, a hub name, or `embedded`, the one in the package. No code from a repository is ever run."""
    from transformers import AutoTokenizer

    place = resolve(path)
    remedy = "model.path needs a tokenizer.json and its settings as transformers reads them; take those that came with the model"
    with files.reading(place, remedy):
        hf = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    stops: list[int] = []
    for file in (place / "generation_config.json", place / "config.json"):
        eos = files.read_json(file).get("eos_token_id") if file.is_file() else None
        stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return wrap(hf, stops, path)


def wrap(hf: Any, stops: Sequence[int] = (), path: str = "tokenizer") -> Tokenizer:
    """A transformers tokenizer as ours. It stops at its own end token, at `stops`, and where its chat template ends an assistant's turn."""
    if not getattr(hf, "is_fast", False):
        raise ConfigError(f"model.path: {path}: {type(hf).__name__} has no tokenizer.json; convert it with transformers and save it again")
    trusted, plain = (tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()) for _ in range(2))
    for backend in (trusted, plain):
        backend.no_truncation()
        backend.no_padding()
    plain.encode_special_tokens = True
    found = [hf.eos_token_id, *stops, _turn_end(hf, trusted)]
    stop_ids = tuple(dict.fromkeys(i for i in found if i is not None))
    if not stop_ids:
        raise ConfigError(f"model.path: {path}: no end token; set eos_token in tokenizer_config.json")
    pad_id = stop_ids[0] if hf.pad_token_id is None else hf.pad_token_id
    return Tokenizer(hf, trusted, plain, pad_id, stop_ids, max(trusted.get_vocab().values()) + 1)


def _turn_end(hf: Any, trusted: tokenizers.Tokenizer) -> int | None:
    """The special token right after an assistant's message: a base model's tokenizer may have another end token, as Qwen2.5's has."""
    if not hf.chat_template:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MESSAGE}]
    with files.reading(f"{hf.name_or_path}: chat_template", "mend the template, or take the tokenizer that came with the model"):
        _, there, rest = hf.apply_chat_template(turns, tokenize=False).rpartition(MESSAGE)
    first = trusted.encode(rest.lstrip(), add_special_tokens=False).ids[:1] if there else []
    return next((i for i in first if i in _specials(trusted)), None)


def _specials(backend: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b; 256 is `<pad>`, 257 `<eos>`. For tests and for models that learn from nothing: built in memory, no files."""
    from transformers import PreTrainedTokenizerFast

    # GPT-2's table: printable bytes are their own characters, the others, in order, those from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    vocab = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    backend.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<pad>", "<eos>"])
    return wrap(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"))


# ---- what stands around a question ----


class Frame(NamedTuple):
    """A prompt without its question: ids, plain text up to the user's text, plain text after it, ids.

    Text next to the question is encoded together with it, as its tokens may span the seam; special tokens never do.
    """

    head: list[int]
    before: str
    after: str
    tail: list[int]
    given: str  # the end of `after` and `tail` that lies in the assistant's turn: what the template itself begins the response with


def frame(tok: Tokenizer, config: PromptConfig, begun: bool = True) -> Frame:
    """What the chat template writes around a user's message, or what stands there without one. `begun` False: without `given`."""
    if not config.chat:
        return Frame(tok.prefix, "", "\n", [], "")
    _check_template(tok, config)
    parts = _converse(tok, config, "user").split(MESSAGE)
    if len(parts) != 2:
        raise ConfigError(f"prompt.chat: true, but the chat template holds a message {len(parts) - 1} times; set prompt.chat to false")
    before, after = parts
    if config.system and config.system.strip() not in before + after:
        raise ConfigError("prompt.system: the chat template leaves the system turn out; set prompt.system to null")
    given = _given(tok, config, after)
    if twice := next((tag for tag in TAGS if tag in given and tag in config.prefill), None):
        same = f"the chat template itself begins a response with {given!r}, so that there would be two {twice}"
        raise ConfigError(f"prompt.prefill: {config.prefill!r}: {same}; set prompt.prefill to ''")
    if not begun:
        after, given = after[: len(after) - len(given)], ""
    start = max((m.end() for m in tok.specials.finditer(before)), default=0)
    end = min((m.start() for m in tok.specials.finditer(after)), default=len(after))
    head, tail = (tok.trusted.encode(part, add_special_tokens=False).ids for part in (before[:start], after[end:]))
    return Frame(head, before[start:], after[:end], tail, given)


def begins(tok: Tokenizer, config: PromptConfig) -> str:
    """How every response begins: given in the prompt, judged and taught as part of the response. By the template, then by `prefill`."""
    return frame(tok, config).given + config.prefill


def _check_template(tok: Tokenizer, config: PromptConfig) -> None:
    if not tok.hf.chat_template:
        raise ConfigError("prompt.chat: true, but the tokenizer has no chat template; set prompt.chat to false")
    template = tok.hf.get_chat_template()
    for name in config.template_args:  # jinja would pass over a name that it does not know
        if name in ("messages", "add_generation_prompt") or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(f"prompt.template_args.{name}: the chat template has no such variable to set; take it out, or mend its name")


def _converse(tok: Tokenizer, config: PromptConfig, *roles: str) -> str:
    """A conversation in which each of `roles` says MESSAGE, rendered; a user who speaks last is to be answered."""
    turns = [{"role": role, "content": MESSAGE} for role in roles]
    if config.system is not None:
        turns.insert(0, {"role": "system", "content": config.system})
    answer = len(roles) == 1
    with_system = "" if config.system is None else f" of a conversation with prompt.system {config.system[:40]!r}"
    remedy = "set prompt.chat to false" if config.system is None else "set prompt.system to null"
    with files.reading(f"{tok.hf.name_or_path}: chat_template{with_system}", remedy):
        return tok.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer, **config.template_args)


def _given(tok: Tokenizer, config: PromptConfig, after: str) -> str:
    """The end of `after`, a prompt from the user's message on, that lies in the assistant's turn.

    It begins where the template goes on otherwise than before an answer that was given, though not within the names of roles, and at
    the latest where a thought is opened, or opened and closed, at the very end.
    """
    try:
        past = _converse(tok, config, "user", "assistant", "user").split(MESSAGE)
    except ConfigError:  # no turns of the past are rendered by this template, so they tell nothing
        past = []
    header = past[1] if len(past) == 4 else after
    roles = max((m.end() for m in tok.specials.finditer(after) if m[0] not in TAGS), default=0)
    thought = re.search(r"(?:<think>\s*)?(?:</think>\s*)?\Z", after)
    parting = next((i for i, (a, b) in enumerate(zip(after, header, strict=False)) if a != b), min(len(after), len(header)))
    start = max(parting, roles)
    return after[min(start, thought.start() if thought else len(after)) :].lstrip()


def to_teach(tok: Tokenizer, targets: list[str], config: PromptConfig) -> list[str]:
    """What is left to learn of targets whose prompts hold `begins` already; white space after that need not be the target's own.

    After an empty thought that the prompt closes comes a target without a thought.
    """
    begun = begins(tok, config)
    if closed := EMPTY_THOUGHT.match(begun):
        begun = begun if any(TAGS[0] in target for target in targets) else begun[closed.end() :]
    start = begun.strip()
    if odd := next((t for t in targets if not t.startswith(start)), None):
        remedy = "mend either"
        if begun != config.prefill:
            switch = "set prompt.template_args={enable_thinking: …} where it has that"
            remedy = f"the chat template writes it: take another sft.target, or {switch}"
        raise ConfigError(f"prompt.prefill: {begun!r} is not how the target begins: {odd[:40]!r}; {remedy}")
    return [target[len(start) :] for target in targets]


# ---- encoding and decoding ----


def encode_texts(tok: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as they stand, each after the tokenizer's own BOS if it has one."""
    return [tok.prefix + ids for ids in spell(tok, texts)]


def encode_prompt(tok: Tokenizer, question: Question, config: PromptConfig) -> list[int]:
    return encode_questions(tok, [question], config)[0]


def encode_prompts(tok: Tokenizer, questions: list[Question], config: PromptConfig) -> tuple[list[list[int]], list[int]]:
    """(tokens of the prompts that fit `max_tokens`, indices of the questions that do not)."""
    rows = encode_questions(tok, questions, config)
    dropped = [i for i, row in enumerate(rows) if len(row) > config.max_tokens]
    return [row for row in rows if len(row) <= config.max_tokens], dropped


def encode_targets(tok: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Responses to learn, each with the stop token that ends it."""
    return [[*ids, tok.stop_ids[0]] for ids in spell(tok, texts)]


def encode_questions(tok: Tokenizer, questions: list[Question], config: PromptConfig, begun: bool = True) -> list[list[int]]:
    """Without a chat template a prompt ends with a line break, so that a response begins on a line of its own.

    `begun` False: without what is given of the response, by the template or by `prefill`.
    """
    f = frame(tok, config, begun)
    rendered = [render(question, config.template) for question in questions]
    # A template may end the user's turn by plain text, as "[/INST]": no token tells it from the same text in a question.
    after = f.after.removesuffix(f.given)
    if config.chat and (end := next(filter(None, map(str.strip, after.splitlines())), "")):
        if bad := next((q for q, content in zip(questions, rendered, strict=True) if end in content), None):
            raise DataError(f"question {bad.id}: it spells {end!r}, which ends the user's turn in this chat template; take it out")
    tail = f.tail + (spell(tok, [config.prefill])[0] if begun else [])
    return [f.head + ids + tail for ids in spell(tok, [f.before + content + f.after for content in rendered])]


def spell(tok: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts that are not to be trusted, as tokens; no special one can be among them."""
    rows = [encoding.ids for encoding in tok.plain.encode_batch(texts, add_special_tokens=False)]
    for text, ids in zip(texts, rows, strict=True):
        if bad := tok.special_ids.intersection(ids):  # only where the vocabulary itself holds special tokens as words
            names = ", ".join(map(_specials(tok.trusted).__getitem__, bad))
            raise DataError(f"text {text[:60]!r} …: it spells {names}, which this tokenizer cannot keep apart from text; take it out")
    return rows


def pad_prompts(rows: list[list[int]], ids: np.ndarray, width: int, pad_id: int) -> Prompts:
    """Rows, left-padded to one width; they are never cut."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if not 0 < len(row) <= width:
            raise ValueError(f"prompt {i} has {len(row)} tokens, and 1 to {width} fit; encode_prompts drops the longer ones")
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return Prompts(tokens, mask, np.asarray(ids, np.uint32))


def decode(tok: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Responses [N, R] as text: the masked tokens without the stop token at the end. Any other special token is shown by its name, so
    that the reward sees it; bytes that are not UTF-8 become U+FFFD."""
    rows = [row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(mask), strict=True)]
    return tok.trusted.decode_batch([r[:-1] if r and r[-1] in tok.stop_ids else r for r in rows], skip_special_tokens=False)


# ---- what a user should know of a tokenizer ----


def check_fits(tok: Tokenizer, vocab_size: int, path: str) -> None:
    """Ids beyond the embedding table would silently read its last row."""
    if tok.vocab_size > vocab_size:
        raise ConfigError(
            f"model.path: {path}: the tokenizer has ids up to {tok.vocab_size - 1}, the model's vocabulary ends at {vocab_size - 1}; "
            "take the tokenizer that came with the model, or enlarge the model's embedding"
        )


def tokenizer_traps(tok: Tokenizer, vocab_size: int, config: PromptConfig | None = None) -> list[str]:
    """What is unusual about this tokenizer and what is done about it, a line each, for `medrlvr doctor`.

    `config` holds the system prompt and the variables with which the chat template is looked at, whether prompts are to use it or not.
    """
    name, hf, out = tok.trusted.id_to_token, tok.hf, []
    if hf.pad_token_id is None:
        out.append(f"no pad token: padding is {name(tok.pad_id)}; harmless, masks decide what counts")
    elif tok.pad_id in tok.stop_ids:
        out.append(f"the pad token {name(tok.pad_id)} is a stop token too; harmless, masks decide what counts")
    if hf.eos_token_id is None:
        out.append(f"no eos_token: targets end with {name(tok.stop_ids[0])}, from the model's own configuration")
    if len(tok.stop_ids) > 1:
        out.append(f"stop tokens {', '.join(map(str, map(name, tok.stop_ids)))}: any ends a response, the first ends targets")
    if tok.vocab_size > vocab_size:
        out.append(f"the tokenizer has {tok.vocab_size} ids, the model {vocab_size}: training will refuse this pair")
    elif tok.vocab_size < vocab_size:
        out.append(
            f"{vocab_size - tok.vocab_size} of the model's {vocab_size} ids stand for no token (padding); sampled, they give no text"
        )
    if tok.prefix:
        out.append(f"prompts begin with {name(tok.prefix[0])}, which the tokenizer adds; responses do not")
    if hf.backend_tokenizer.truncation or hf.backend_tokenizer.padding:
        out.append("tokenizer.json asks for cutting or padding; ignored, prompts are never cut")
    counts = ", ".join(f"{tag} {len(tok.plain.encode(tag, add_special_tokens=False).ids)}" for tag in TAGS)
    out.append(f"tokens of each tag: {counts}")
    if special := [tag for tag in TAGS if tok.trusted.token_to_id(tag) in tok.special_ids]:
        out.append(f"{', '.join(special)}: special tokens here, but spelled out in prompts and targets, as all text from data is")
    if loose := [t.content for t in tok.trusted.get_added_tokens_decoder().values() if not t.special and t.content not in TAGS]:
        out.append(f"added tokens not marked special, so that a question can spell them: {', '.join(loose[:8])}{' …' * (len(loose) > 8)}")
    sample = "<think>a</think>\n<answer>C</answer>"
    if (back := tok.show(tok.plain.encode(sample, add_special_tokens=False).ids)) != sample:
        out.append(f"text does not survive: {sample!r} comes back as {back!r}, so a right answer may not be recognised")
    if (file := Path(hf.name_or_path) / "tokenizer.json").is_file():
        sample = "A 62-year-old man's BP is 136/86 mm Hg.\n\nA. 2.3 mg/dL\n  B. β-Blocker, 1:1,000\n"
        written, read = (b.encode(sample, add_special_tokens=False).ids for b in (tokenizers.Tokenizer.from_file(str(file)), tok.trusted))
        if written != read:  # transformers 5 rebuilds the tokenizers of some model types, qwen2's among them, by its own rules
            out.append("transformers cuts text otherwise than tokenizer.json says (the model_type in config.json decides); its cut is used")
    return out + _chat_traps(tok, dataclasses.replace(config or PromptConfig(), chat=True))


def _chat_traps(tok: Tokenizer, config: PromptConfig) -> list[str]:
    if not tok.hf.chat_template:
        return ["no chat template: prompt.chat must be false"]
    try:
        f = frame(tok, config)
    except ConfigError as e:
        return [f"with prompt.chat, this would be refused: {e}"]
    usual = tok.trusted.encode(_converse(tok, config, "user").replace(MESSAGE, "Which?"), add_special_tokens=False).ids
    out = [f"with prompt.chat, before the user's text stands {tok.show(f.head) + f.before!r}"]
    if f.given:
        does = "closes an empty thought" if EMPTY_THOUGHT.match(f.given) else "opens the thought" if TAGS[0] in f.given else "writes"
        what = "is given in the prompt, and judged and taught as part of the response"
        out.append(f"with prompt.chat, the chat template itself {does} in the assistant's turn: {f.given!r} {what}")
    if f.head + spell(tok, [f.before + "Which?" + f.after])[0] + f.tail != usual:
        out.append("with prompt.chat, a prompt's tokens differ from apply_chat_template's at the seam between the template and the text")
    return out

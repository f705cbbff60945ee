"""What is unusual about a tokenizer and its chat template, and what is done about it: for the doctor."""

import dataclasses
from pathlib import Path

import tokenizers

from medrlvr_jax.config.schema import PromptConfig
from medrlvr_jax.data import prompts
from medrlvr_jax.data.question import EMPTY_THOUGHT, TAGS
from medrlvr_jax.data.tokenizer import MESSAGE, Tokenizer
from medrlvr_jax.host.errors import ConfigError

REPLY = "<think>a</think>\n<answer>C</answer>"
STEM = "A 62-year-old man's BP is 136/86 mm Hg.\n\nA. 2.3 mg/dL\n  B. β-Blocker, 1:1,000\n"


def tokenizer_traps(tok: Tokenizer, vocab_size: int, config: PromptConfig | None = None) -> list[str]:
    """A line for each trap; `config` has the chat template's system prompt and variables."""
    chat = dataclasses.replace(config or PromptConfig(), chat=True)
    return [*_ids(tok, vocab_size), *_texts(tok), *_chat_template(tok, chat)]


def _ids(tok: Tokenizer, vocab_size: int) -> list[str]:
    name, lines = tok.trusted.id_to_token, []
    if tok.hf.pad_token_id is None:
        lines.append(f"no pad token: padding is {name(tok.pad_id)}; harmless, masks decide what counts")
    elif tok.pad_id in tok.stop_ids:
        lines.append(f"the pad token {name(tok.pad_id)} is a stop token too; harmless, masks decide")
    if tok.hf.eos_token_id is None:
        lines.append(f"no eos_token: targets end with {name(tok.stop_ids[0])}, by the model's configuration")
    if len(tok.stop_ids) > 1:
        names = ", ".join(map(str, map(name, tok.stop_ids)))
        lines.append(f"stop tokens {names}: any ends a response, the first ends targets")
    if tok.vocab_size > vocab_size:
        sizes = f"the tokenizer has {tok.vocab_size} ids, the model {vocab_size}"
        lines.append(f"{sizes}: training will refuse this pair")
    elif tok.vocab_size < vocab_size:
        unused = f"{vocab_size - tok.vocab_size} of the model's {vocab_size} ids"
        lines.append(f"{unused} stand for no token (padding); sampled, they give no text")
    if tok.prefix:
        lines.append(f"prompts begin with {name(tok.prefix[0])}, which the tokenizer adds; responses do not")
    return lines


def _texts(tok: Tokenizer) -> list[str]:
    lines = []
    if tok.hf.backend_tokenizer.truncation or tok.hf.backend_tokenizer.padding:
        lines.append("tokenizer.json asks for truncation or padding; ignored, prompts are never truncated")
    sizes = [len(tok.plain.encode(tag, add_special_tokens=False).ids) for tag in TAGS]
    counts = ", ".join(f"{tag} {size}" for tag, size in zip(TAGS, sizes, strict=True))
    lines.append(f"tokens of each tag: {counts}")
    if special := [tag for tag in TAGS if tok.trusted.token_to_id(tag) in tok.special_ids]:
        spelled = "special tokens here, but spelled out in prompts and targets, as all text from data is"
        lines.append(f"{', '.join(special)}: {spelled}")
    added = tok.trusted.get_added_tokens_decoder().values()
    if loose := [token.content for token in added if not token.special and token.content not in TAGS]:
        names = ", ".join(loose[:8]) + " …" * (len(loose) > 8)
        lines.append(f"added tokens not marked special, so that a question can spell them: {names}")
    if (back := tok.show(tok.plain.encode(REPLY, add_special_tokens=False).ids)) != REPLY:
        effect = "so a right answer may not be recognised"
        lines.append(f"text does not survive: {REPLY!r} comes back as {back!r}, {effect}")
    if (file := Path(tok.hf.name_or_path) / "tokenizer.json").is_file():
        original = tokenizers.Tokenizer.from_file(str(file))
        if original.encode(STEM, add_special_tokens=False).ids != tok.encode_trusted(STEM):
            # transformers 5 rebuilds the tokenizers of some model types, such as qwen2's, by its own rules.
            cause = "since the model_type in config.json decides; its split is used"
            lines.append(f"transformers splits text otherwise than tokenizer.json says, {cause}")
    return lines


def _chat_template(tok: Tokenizer, config: PromptConfig) -> list[str]:
    if not tok.hf.chat_template:
        return ["no chat template: prompt.chat must be false"]
    try:
        f = prompts.frame(tok, config)
    except ConfigError as e:
        return [f"with prompt.chat, this would be refused: {e}"]
    lines = [f"with prompt.chat, before the user's text stands {tok.show(f.head) + f.before!r}"]
    if f.given:
        closes, opens = EMPTY_THOUGHT.match(f.given), TAGS[0] in f.given
        does = "closes an empty thought" if closes else "opens the thought" if opens else "writes"
        what = f"{f.given!r} is given in the prompt, and judged and taught as part of the response"
        lines.append(f"with prompt.chat, the chat template itself {does} in the assistant's turn: {what}")
    rendered = prompts.converse(tok, config, "user").replace(MESSAGE, "Which?")
    if f.head + tok.spell([f.before + "Which?" + f.after])[0] + f.tail != tok.encode_trusted(rendered):
        seam = "at the seam between the template and the text"
        lines.append(f"with prompt.chat, a prompt's tokens differ from apply_chat_template's {seam}")
    return lines

"""Unusual properties of a tokenizer and its chat template, and how they are handled: for the doctor."""

import dataclasses
from pathlib import Path

import tokenizers

from medrlvr_jax.config.schema import PromptConfig
from medrlvr_jax.data import prompts
from medrlvr_jax.data.question import EMPTY_THOUGHT, TAGS
from medrlvr_jax.data.tokenizer import MESSAGE, Tokenizer
from medrlvr_jax.host.errors import ConfigError

RESPONSE = "<think>a</think>\n<answer>C</answer>"
STEM = "A 62-year-old man's BP is 136/86 mm Hg.\n\nA. 2.3 mg/dL\n  B. β-Blocker, 1:1,000\n"


def tokenizer_traps(tok: Tokenizer, vocab_size: int, config: PromptConfig | None = None) -> list[str]:
    """Return a line for each trap. `config` has the system prompt and the variables of the chat template."""
    chat = dataclasses.replace(config or PromptConfig(), chat=True)
    return [*_id_traps(tok, vocab_size), *_text_traps(tok), *_template_traps(tok, chat)]


def _id_traps(tok: Tokenizer, vocab_size: int) -> list[str]:
    name, lines = tok.trusted.id_to_token, []
    if tok.pad_id in tok.stop_ids:
        lines.append(f"padding is {name(tok.pad_id)}, a stop token; harmless, since padding is masked")
    if tok.hf.eos_token_id is None:
        lines.append(f"no eos_token: targets end with {name(tok.stop_ids[0])}, by the model's configuration")
    if len(tok.stop_ids) > 1:
        names = ", ".join(map(str, map(name, tok.stop_ids)))
        lines.append(f"stop tokens {names}: each ends a response, the first ends targets")
    if tok.vocab_size > vocab_size:
        sizes = f"the tokenizer has {tok.vocab_size} ids, the model {vocab_size}"
        refused = "training will refuse this pair"
        harmless = "harmless, since no text becomes the others"
        lines.append(f"{sizes}: {refused if tok.ids_in_use_from(vocab_size) else harmless}")
    elif tok.vocab_size < vocab_size:
        unused = f"{vocab_size - tok.vocab_size} of the model's {vocab_size} ids"
        lines.append(f"{unused} belong to no token (padding); if sampled, they give no text")
    if tok.bos_ids:
        lines.append(f"prompts begin with {name(tok.bos_ids[0])}, which the tokenizer adds; responses do not")
    return lines


def _text_traps(tok: Tokenizer) -> list[str]:
    lines = []
    if tok.hf.backend_tokenizer.truncation or tok.hf.backend_tokenizer.padding:
        lines.append("tokenizer.json sets truncation or padding; ignored, since prompts are never truncated")
    sizes = [len(tok.plain.encode(tag, add_special_tokens=False).ids) for tag in TAGS]
    counts = ", ".join(f"{tag} {size}" for tag, size in zip(TAGS, sizes, strict=True))
    lines.append(f"tokens of each tag: {counts}")
    if special := [tag for tag in TAGS if tok.trusted.token_to_id(tag) in tok.special_ids]:
        handled = "encoded as plain text in prompts and targets, as all text from data is"
        lines.append(f"{', '.join(special)}: special tokens of this tokenizer, but {handled}")
    added = tok.trusted.get_added_tokens_decoder().values()
    if loose := [token.content for token in added if not token.special and token.content not in TAGS]:
        names = ", ".join(loose[:8]) + " …" * (len(loose) > 8)
        lines.append(f"added tokens that are not marked special, so questions can contain them: {names}")
    if (decoded := tok.show(tok.plain.encode(RESPONSE, add_special_tokens=False).ids)) != RESPONSE:
        effect = "so a right answer may not be recognised"
        lines.append(f"text changes when encoded and decoded: {RESPONSE!r} becomes {decoded!r}, {effect}")
    if (file := Path(tok.hf.name_or_path) / "tokenizer.json").is_file():
        original = tokenizers.Tokenizer.from_file(str(file))
        if original.encode(STEM, add_special_tokens=False).ids != tok.encode_trusted(STEM):
            # transformers 5 rebuilds the tokenizers of some model types, such as qwen2's, by its own rules.
            cause = "because of the model_type in config.json; transformers' splitting is used"
            lines.append(f"transformers splits text differently from tokenizer.json, {cause}")
    return lines


def _template_traps(tok: Tokenizer, config: PromptConfig) -> list[str]:
    if not tok.hf.chat_template:
        return ["no chat template: prompt.chat must be false"]
    try:
        f = prompts.make_frame(tok, config)
    except ConfigError as e:
        return [f"with prompt.chat, this would be refused: {e}"]
    lines = [f"with prompt.chat, the text before the user's is {tok.show(f.head) + f.before!r}"]
    if f.prefix:
        closes, opens = EMPTY_THOUGHT.match(f.prefix), TAGS[0] in f.prefix
        action = "closes an empty thought" if closes else "opens the thought" if opens else "writes"
        effect = f"{f.prefix!r} is part of the prompt, and graded and learned as part of the response"
        lines.append(f"with prompt.chat, the template itself {action} in the assistant's turn: {effect}")
    rendered = prompts.render_conversation(tok, config, "user").replace(MESSAGE, "Which?")
    [text] = tok.encode_untrusted([f.before + "Which?" + f.after])
    if f.head + text + f.tail != tok.encode_trusted(rendered):
        where = "at the boundary between the template and the text"
        lines.append(f"with prompt.chat, a prompt's tokens differ from apply_chat_template's {where}")
    return lines

"""The tokenizer: loading, the tokens that end a response, and text to tokens and back.

Text from data never becomes a special token: `<|im_end|>` in a question is spelled out as plain text.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from medrlvr_jax.data.question import DataError
from medrlvr_jax.host import files
from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.model.families import resolve

MESSAGE = (
    "\ue000message\ue000"  # the user's text while a chat template is rendered; private-use, so in no template
)

PART = 1024  # texts that are encoded at a time, by all cores; an encoding is far larger than its ids
Progress = Callable[[int, int], None]  # called with how much is done, and of how much


def quiet(done: int, n: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A transformers tokenizer and two encoders made of it, which never truncate or pad."""

    hf: Any  # transformers' own: the chat template, the names of the special tokens, `save_pretrained`
    trusted: tokenizers.Tokenizer  # special tokens in a text become special tokens: for chat templates
    plain: tokenizers.Tokenizer  # special tokens in a text are spelled out: for data
    pad_id: int
    stop_ids: tuple[int, ...]  # each ends a response; the first ends the targets of fine-tuning
    vocab_size: int  # the largest id + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text from data may become. `unk` is not one: unknown words become it."""
        return frozenset(_special_tokens(self.trusted)) - {self.hf.unk_token_id}

    @functools.cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer itself puts before a text: BOS, or nothing."""
        return [i for i in self.trusted.encode("").ids if i == self.hf.bos_token_id]

    @functools.cached_property
    def specials(self) -> re.Pattern[str]:
        """Matches the name of any special token, the longer ones first."""
        names = sorted(_special_tokens(self.trusted).values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")  # (?!) never matches

    def spell(self, texts: list[str], progress: Progress = quiet) -> list[list[int]]:
        """Untrusted texts as tokens, none of them special; `DataError` where that cannot be."""
        rows: list[list[int]] = []
        for first in range(0, len(texts), PART):
            progress(first, len(texts))
            part = self.spell_with_offsets(texts[first : first + PART])
            rows += [[self._ids[i] for i in encoding.ids] for encoding in part]
        return rows

    @functools.cached_property
    def _ids(self) -> list[int]:
        """Each id once: rows that share them take a quarter of the memory."""
        return list(range(self.vocab_size))

    def spell_with_offsets(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """`spell`, with the characters of each token: `ids` and `offsets` of each text."""
        rows = self.plain.encode_batch(texts, add_special_tokens=False)
        for text, row in zip(texts, rows, strict=True):
            # only where the vocabulary holds special tokens as words
            if bad := self.special_ids.intersection(row.ids):
                names = ", ".join(self.trusted.id_to_token(i) or str(i) for i in sorted(bad))
                problem = f"it spells {names}, which this tokenizer cannot keep apart from text"
                raise DataError(f"text {text[:60]!r} …: {problem}; take it out")
        return rows

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Untrusted texts as prompts, each after BOS if the tokenizer has one."""
        return [self.prefix + ids for ids in self.spell(texts)]

    def encode_targets(self, texts: list[str], progress: Progress = quiet) -> list[list[int]]:
        """Untrusted texts as responses to learn, each with the stop token that ends it."""
        return [[*ids, self.stop_ids[0]] for ids in self.spell(texts, progress)]

    def encode_trusted(self, text: str) -> list[int]:
        """A text whose special tokens are meant, without what the tokenizer itself puts around it."""
        return self.trusted.encode(text, add_special_tokens=False).ids

    def show(self, ids: Sequence[int]) -> str:
        """All tokens as text, special ones by their names; unknown ids give no text."""
        return self.trusted.decode(list(ids), skip_special_tokens=False)

    def decode(self, tokens: Int32[np.ndarray, "N R"], mask: Bool[np.ndarray, "N R"]) -> list[str]:
        """Responses as text, without the stop token at the end.

        Other special tokens appear by their names, so that the reward sees them; what is not UTF-8, as
        U+FFFD.
        """
        rows = [row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(mask), strict=True)]
        rows = [row[:-1] if row and row[-1] in self.stop_ids else row for row in rows]
        return self.trusted.decode_batch(rows, skip_special_tokens=False)

    def check_fits(self, vocab_size: int, path: str, field: str = "model.path") -> None:
        """Ids beyond the embedding table would silently read its last row."""
        if self.vocab_size > vocab_size:
            ends = f"the model's vocabulary ends at {vocab_size - 1}"
            problem = f"the tokenizer has ids up to {self.vocab_size - 1}, {ends}"
            remedy = "take the tokenizer that came with the model, or enlarge the model's embedding"
            raise ConfigError(f"{field}: {path}: {problem}; {remedy}")


def load_tokenizer(path: str, field: str = "model.path") -> Tokenizer:
    """From a Hugging Face directory, a hub name, or `embedded`. Code from a repository is never run. `field`:
    the setting that names it, for `ConfigError`s.
    """
    from transformers import AutoTokenizer

    folder = resolve(path, field)
    needed = f"{field} needs a tokenizer.json and its settings as transformers reads them"
    with files.reading(folder, f"{needed}; take those that came with the model"):
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    stops: list[int] = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        eos = files.read_json(file).get("eos_token_id") if file.is_file() else None
        stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return wrap(hf, stops, f"{field}: {path}")


def wrap(hf: Any, stops: Sequence[int] = (), source: str = "tokenizer") -> Tokenizer:
    """The `Tokenizer` of `hf`, in errors named `source`. It stops at its end token, at `stops`, and where its
    template ends a turn.
    """
    if not getattr(hf, "is_fast", False):
        remedy = "convert it with transformers and save it again"
        raise ConfigError(f"{source}: {type(hf).__name__} has no tokenizer.json; {remedy}")
    trusted, plain = (tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()) for _ in range(2))
    for encoder in (trusted, plain):
        encoder.no_truncation()
        encoder.no_padding()
    plain.encode_special_tokens = True
    ends = [hf.eos_token_id, *stops, _turn_end(hf, trusted)]
    stop_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    if not stop_ids:
        raise ConfigError(f"{source}: no end token; set eos_token in tokenizer_config.json")
    pad_id = stop_ids[0] if hf.pad_token_id is None else hf.pad_token_id
    return Tokenizer(hf, trusted, plain, pad_id, stop_ids, max(trusted.get_vocab().values()) + 1)


def _turn_end(hf: Any, trusted: tokenizers.Tokenizer) -> int | None:
    """The special token right after an assistant's message: not Qwen2.5's end token, for one."""
    if not hf.chat_template:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MESSAGE}]
    remedy = "correct the template, or take the tokenizer that came with the model"
    with files.reading(f"{hf.name_or_path}: chat_template", remedy):
        _, message, rest = hf.apply_chat_template(turns, tokenize=False).rpartition(MESSAGE)
    first = trusted.encode(rest.lstrip(), add_special_tokens=False).ids[:1] if message else []
    return next((i for i in first if i in _special_tokens(trusted)), None)


def _special_tokens(encoder: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in encoder.get_added_tokens_decoder().items() if token.special}

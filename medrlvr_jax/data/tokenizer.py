"""The tokenizer: loading it, the tokens that end a response, encoding and decoding.

Text from data is untrusted: it never becomes a special token. `<|im_end|>` in a question is encoded as plain
text.
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

# The user's text while a chat template is rendered. Its private-use characters occur in no template.
MESSAGE = "\ue000message\ue000"
CHUNK = 1024  # texts that are encoded at a time, by all cores; an encoding is far larger than its ids
Progress = Callable[[int, int], None]  # called with the number of items done, and of all items


def no_progress(done: int, n: int) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A transformers tokenizer, and two encoders made from it, which never truncate or pad."""

    hf: Any  # for the chat template, the names of special tokens, `save_pretrained`
    trusted: tokenizers.Tokenizer  # encodes special tokens in a text as such: for chat templates
    plain: tokenizers.Tokenizer  # encodes special tokens in a text as plain text: for data
    pad_id: int
    stop_ids: tuple[int, ...]  # each ends a response; the first is appended to targets of fine-tuning
    vocab_size: int  # the largest id + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that text from data must not become. Unknown words become `unk`, so it is not among them."""
        return frozenset(_special_tokens(self.trusted)) - {self.hf.unk_token_id}

    @functools.cached_property
    def bos_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text: the id of BOS, or nothing."""
        return [i for i in self.trusted.encode("").ids if i == self.hf.bos_token_id]

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the name of any special token, the longer ones first."""
        names = sorted(_special_tokens(self.trusted).values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")  # (?!) never matches

    def encode_untrusted(self, texts: list[str], progress: Progress = no_progress) -> list[list[int]]:
        """Encode texts to tokens of which none is special. Raises `DataError` if that is impossible."""
        rows: list[list[int]] = []
        for first in range(0, len(texts), CHUNK):
            progress(first, len(texts))
            encodings = self.encode_with_offsets(texts[first : first + CHUNK])
            rows += [[self._ids[i] for i in encoding.ids] for encoding in encodings]
        return rows

    @functools.cached_property
    def _ids(self) -> list[int]:
        """One int object for each id: rows that share them take a quarter of the memory."""
        return list(range(self.vocab_size))

    def encode_with_offsets(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """`encode_untrusted` with the `offsets` of each token's characters beside the `ids`."""
        rows = self.plain.encode_batch(texts, add_special_tokens=False)
        for text, row in zip(texts, rows, strict=True):
            # This happens only if the vocabulary has special tokens as words.
            if bad := self.special_ids.intersection(row.ids):
                names = ", ".join(self.trusted.id_to_token(i) or str(i) for i in sorted(bad))
                problem = f"it contains {names}, which this tokenizer cannot encode as plain text"
                raise DataError(f"text {text[:60]!r} …: {problem}; remove it")
        return rows

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Encode untrusted texts as prompts, each after BOS if the tokenizer has one."""
        return [self.bos_ids + ids for ids in self.encode_untrusted(texts)]

    def encode_targets(self, texts: list[str], progress: Progress = no_progress) -> list[list[int]]:
        """Encode untrusted texts as responses to learn, each followed by a stop token."""
        return [[*ids, self.stop_ids[0]] for ids in self.encode_untrusted(texts, progress)]

    def encode_trusted(self, text: str) -> list[int]:
        """Encode a text with its special tokens as such, and without any that the tokenizer itself adds."""
        return self.trusted.encode(text, add_special_tokens=False).ids

    def show(self, ids: Sequence[int]) -> str:
        """Decode all tokens, special ones to their names, unknown ids to nothing."""
        return self.trusted.decode(list(ids), skip_special_tokens=False)

    def decode(self, tokens: Int32[np.ndarray, "N R"], mask: Bool[np.ndarray, "N R"]) -> list[str]:
        """Decode responses, without the stop token at the end.

        Other special tokens become their names, so that the reward sees them. Invalid UTF-8 becomes U+FFFD.
        """
        rows = [row[keep].tolist() for row, keep in zip(np.asarray(tokens), np.asarray(mask), strict=True)]
        rows = [row[:-1] if row and row[-1] in self.stop_ids else row for row in rows]
        return self.trusted.decode_batch(rows, skip_special_tokens=False)

    def ids_in_use_from(self, start: int) -> list[int]:
        """Ids from `start` on, without special tokens that neither the chat template names nor a response or
        padding ends with. Gemma 3's text model of 1B has such a token for images, one id beyond its table.
        """
        template = str(self.hf.chat_template or "")
        return [
            i
            for name, i in self.trusted.get_vocab().items()
            if i >= start
            and (i not in self.special_ids or i in (*self.stop_ids, self.pad_id) or name in template)
        ]

    def check_fits(self, vocab_size: int, path: str, field: str = "model.path") -> None:
        """Raise `ConfigError` for ids beyond the embedding table, which prompts or responses may hold."""
        if self.ids_in_use_from(vocab_size):
            ids = f"the tokenizer has ids up to {self.vocab_size - 1}"
            problem = f"{ids}, and the model's vocabulary ends at {vocab_size - 1}"
            remedy = "use the tokenizer that came with the model, or enlarge the model's embedding"
            raise ConfigError(f"{field}: {path}: {problem}; {remedy}")


def load_tokenizer(path: str, field: str = "model.path") -> Tokenizer:
    """Load a tokenizer from a Hugging Face directory, a hub name, or `embedded`.

    Code from a repository is never run. `field` is the setting that names the path, for `ConfigError`s.
    """
    from transformers import AutoTokenizer

    folder = resolve(path, field)
    needed = f"{field} needs a tokenizer.json and settings that transformers can read"
    with files.reading(folder, f"{needed}; use those that came with the model"):
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    stops: list[int] = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        eos = files.read_json(file).get("eos_token_id") if file.is_file() else None
        stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return wrap(hf, stops, f"{field}: {path}")


def wrap(hf: Any, stops: Sequence[int] = (), source: str = "tokenizer") -> Tokenizer:
    """Wrap a transformers tokenizer. Errors name it as `source`.

    Its stop tokens are its end token, those in `stops`, and the one with which its template ends a turn.
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
        raise ConfigError(f"{source}: it has no end token; set eos_token in tokenizer_config.json")
    pad_id = stop_ids[0] if hf.pad_token_id is None else hf.pad_token_id
    return Tokenizer(hf, trusted, plain, pad_id, stop_ids, max(trusted.get_vocab().values()) + 1)


def _turn_end(hf: Any, trusted: tokenizers.Tokenizer) -> int | None:
    """Return the special token after an assistant's message. Qwen2.5's, for example, is not its end token."""
    if not hf.chat_template:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MESSAGE}]
    remedy = "correct the template, or use the tokenizer that came with the model"
    with files.reading(f"{hf.name_or_path}: chat_template", remedy):
        _, message, rest = hf.apply_chat_template(turns, tokenize=False).rpartition(MESSAGE)
    first = trusted.encode(rest.lstrip(), add_special_tokens=False).ids[:1] if message else []
    return next((i for i in first if i in _special_tokens(trusted)), None)


def _special_tokens(encoder: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in encoder.get_added_tokens_decoder().items() if token.special}

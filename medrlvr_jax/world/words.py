"""Build the tokenizers of the embedded models: about one token per word, and bytes for other text.

Each is a byte-level BPE without merges. Its vocabulary has the 256 bytes, the four tags and the world's
words, each with the space before it. With `ignore_merges` (as in Llama 3's tokenizer) a piece of text is one
token if it is in the vocabulary, and one token per byte otherwise. So decoding returns any text exactly. The
pattern `PIECES` alone decides how text is split:

    <think> …      A tag is one ordinary token: the model has to learn to write it.
    "C."           An option's letter and its point are one token. It stands right before the option's name
                   in "\\nC. drug" and right after it in the reasoning's "drug C.", so that attention can
                   match the two.
    " drug"        A word includes the space or hyphen before it ("-year-old").
    " 34"          A number of up to two digits includes the space before it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from medrlvr_jax.host import files
from medrlvr_jax.world import corpus, radiograph, world
from medrlvr_jax.world import open as open_questions

FOLDER, VERIFIER, VISION = (Path(__file__).parent / name for name in ("embedded", "verifier", "vision"))
PAD, EOS = "<pad>", "<eos>"
IMAGE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")  # special tokens of a prompt with an image
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PIECES = (
    r"</?(?:think|answer)>| ?(?<!\p{L})[A-J]\.(?=[ <]|\z)"  # an option's letter and its point
    r"|[ -]?\p{L}[\p{L}\p{N}]*(?:-[\p{L}\p{N}]+)+|[ -]?\p{L}[\p{L}\p{N}]+|[ -]\p{L}| ?\p{N}{1,2}|\X"
)
SAMPLE = 12_000  # examples of the corpus that are searched for words; they contain all


def corpus_texts() -> list[str]:
    """Return texts that contain every word of the embedded model's tokenizer."""
    texts = [part for example in corpus.corpus(SAMPLE) for part in (example.prompt, example.response)]
    return texts + [question.question for split in world.SIZES for question in world.questions(split)]


def build(texts: Iterable[str], special: Iterable[str] = ()) -> Tokenizer:
    """Build the tokenizer with the words of `texts`. `special`: additional special tokens."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), as_bytes])
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    fixed = [PAD, EOS, *special, *TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # Sorted by the alphabet and not by frequency, so that other shares in the corpus change no token.
    words = sorted(pieces - set(fixed))
    vocab = {token: i for i, token in enumerate(fixed + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    names = (PAD, EOS, *special)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
    return tokenizer


def vision_texts() -> list[str]:
    """Return texts that contain every word of the embedded vision-language model's tokenizer."""
    texts = [q.question for split in radiograph.SIZES for q in radiograph.questions(split)]
    texts += [e.prompt + e.response for e in radiograph.corpus(n=2000)]
    return [*texts, *corpus.GUESSES]


# Each model's texts and additional special tokens.
MODELS: dict[Path, tuple[Callable[[], Iterable[str]], tuple[str, ...]]] = {
    FOLDER: (corpus_texts, ()),
    VERIFIER: (open_questions.texts, ()),
    VISION: (vision_texts, IMAGE),
}


def write(model: Path, folder: Path) -> None:
    """Write a model's tokenizer.json, and its config.json with the size of the vocabulary, into a folder.

    The other fields of config.json are edited by hand: the ids of PAD, EOS and the other special tokens do
    not depend on the words. `model_type` is qwen3 or qwen2_5_vl, not qwen2: for qwen2, transformers 5
    ignores tokenizer_class and splits text by Qwen2's own rules.
    """
    texts, special = MODELS[model]
    tokenizer = build(texts(), special)
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    # A multiple of 64. The unused ids are never targets, so the model learns not to sample them.
    config = files.read_json(model / "config.json") | {"vocab_size": -(-size // 64) * 64}
    files.write_json(folder / "config.json", config)
    print(f"{size} tokens, written to {folder}")

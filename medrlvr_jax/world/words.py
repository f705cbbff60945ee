"""The tokenizers of the embedded models: about one token a word of the world, bytes for all other text.

A byte-level BPE without merges. Its vocabulary is the 256 bytes, the four tags and the world's words, each
with the space before it. `ignore_merges` takes a piece of text as one token if it is in the vocabulary (as
Llama 3's tokenizer does), else byte by byte. So decoding gives back any text exactly, and where a piece ends
is decided by `PIECES` alone:

    <think> …      a tag is one token, an ordinary one: the model has to learn to write it
    "C."           an option's letter and its point are one token, right before the option's name in "\\nC.
                   drug" and right after it in the reasoning's "drug C.", so that attention can match the two
    " drug"        a word brings the space before it, a hyphen too ("-year-old")
    " 34"          so do numbers of two digits
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
SAMPLE = 12_000  # examples of the corpus from which the words are taken: all come up


def corpus_texts() -> list[str]:
    """The texts of which the embedded model's tokenizer has each word."""
    texts = [part for example in corpus.corpus(SAMPLE) for part in (example.prompt, example.response)]
    return texts + [question.question for split in world.SIZES for question in world.questions(split)]


def build(texts: Iterable[str], special: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer with the words of `texts`: the same on every machine. `special`: more special tokens."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), as_bytes])
    seen = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    fixed = [PAD, EOS, *special, *TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # by the alphabet, not by how often: a change of the mixture then changes no token
    words = sorted(seen - set(fixed))
    vocab = {token: i for i, token in enumerate(fixed + words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    names = (PAD, EOS, *special)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
    return tokenizer


def vision_texts() -> list[str]:
    """Those of which the embedded vision-language model's tokenizer has each word."""
    asked = [q for split in radiograph.SIZES for q in radiograph.questions(split)]
    texts = [q.question for q in asked] + [e.prompt + e.response for e in radiograph.corpus(n=2000)]
    return [*texts, *corpus.GUESSES]


MODELS: dict[Path, tuple[Callable[[], Iterable[str]], tuple[str, ...]]] = {  # texts, more special tokens
    FOLDER: (corpus_texts, ()),
    VERIFIER: (open_questions.texts, ()),
    VISION: (vision_texts, IMAGE),
}


def write(model: Path, folder: Path) -> None:
    """Write a model's tokenizer.json, and its config.json with the vocabulary's size, into a folder.

    All else in the model's settings is written by hand: PAD, EOS and the other special tokens have the same
    numbers whatever the words are. `model_type` is qwen3 or qwen2_5_vl, and not qwen2: there transformers 5
    ignores tokenizer_class and splits text by Qwen2's own rules.
    """
    texts, special = MODELS[model]
    tokenizer = build(texts(), special)
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    # a round size; the rest is never a target, so the model learns not to sample it
    config = files.read_json(model / "config.json") | {"vocab_size": -(-size // 64) * 64}
    files.write_json(folder / "config.json", config)
    print(f"{size} tokens, written to {folder}")

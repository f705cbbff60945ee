"""The embedded model's tokenizer and config.json: about one token a word of the world, bytes for all other
text.

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

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from medrlvr_jax.host import files
from medrlvr_jax.world import corpus, radiograph, world
from medrlvr_jax.world import open as open_questions

FOLDER, VERIFIER, VISION = (Path(__file__).parent / name for name in ("embedded", "verifier", "vision"))
PAD, EOS = "<pad>", "<eos>"
IMAGE = {  # the special tokens of a prompt with an image, by their names in config.json
    "vision_start_token_id": "<|vision_start|>",
    "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>",
}
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PIECES = (
    r"</?(?:think|answer)>| ?(?<!\p{L})[A-J]\.(?=[ <]|\z)"  # an option's letter and its point
    r"|[ -]?\p{L}[\p{L}\p{N}]*(?:-[\p{L}\p{N}]+)+|[ -]?\p{L}[\p{L}\p{N}]+|[ -]\p{L}| ?\p{N}{1,2}|\X"
)
SAMPLE = 12_000  # examples of the corpus from which the words are taken: all come up
CONTEXT = 512


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


def write(
    folder: Path = FOLDER, texts: Iterable[str] | None = None, special: Iterable[str] = (), **settings: Any
) -> None:
    """Write tokenizer.json, tokenizer_config.json, config.json and generation_config.json for transformers.

    `texts`: those of which each word is a token, by default the embedded model's; `special`: more special
    tokens; `settings` replace the embedded model's own.
    """
    tokenizer = build(corpus_texts() if texts is None else texts, special)
    ids = {"eos_token_id": tokenizer.token_to_id(EOS), "pad_token_id": tokenizer.token_to_id(PAD)}
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    side = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    config = {
        # Not qwen2: there transformers 5 ignores tokenizer_class and splits text by Qwen2's own rules.
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        # a round size; the rest is never a target, so the model learns not to sample it
        "vocab_size": -(-size // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **ids,
    } | settings
    for name, tree in (("tokenizer_config", side), ("config", config), ("generation_config", ids)):
        files.write_json(folder / f"{name}.json", tree)
    print(f"{size} tokens, written to {folder}")


def write_verifier(folder: Path = VERIFIER) -> None:
    """The same for the embedded verifier, a model of two layers with words of its own."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "head_dim": 16,
        "num_hidden_layers": 2,
    }
    write(folder, open_questions.texts(), **sizes)


def write_vision(folder: Path = VISION) -> None:
    """The same for the embedded vision-language model, Qwen2.5-VL in small: a film is one window of 8 × 8
    patches, and 16 tokens.
    """
    asked = [q for split in radiograph.SIZES for q in radiograph.questions(split)]
    texts = [q.question for q in asked] + [e.prompt + e.response for e in radiograph.corpus(n=2000)]
    texts += corpus.GUESSES
    places: dict[str, Any] = {name: 2 + i for i, name in enumerate(IMAGE)}  # after PAD and EOS
    tower = {
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 344,
        "out_hidden_size": 128,
        "patch_size": 7,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
    }
    settings = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "vision_config": tower,
    }
    write(folder, texts, IMAGE.values(), **settings, **places)
    sizes = {"patch_size": 7, "min_pixels": 56 * 56, "max_pixels": 56 * 56}
    kind = {"image_processor_type": "Qwen2VLImageProcessor"}
    files.write_json(folder / "preprocessor_config.json", kind | sizes)

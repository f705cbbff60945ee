"""`medrlvr data CONFIG`: show how each set is read, the first prompts, and the number of dropped prompts."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from medrlvr_jax.build import limit_pixels
from medrlvr_jax.config.schema import Config
from medrlvr_jax.data import load as data
from medrlvr_jax.data import prompts as text
from medrlvr_jax.data.patches import measure_images
from medrlvr_jax.data.question import Question
from medrlvr_jax.data.tokenizer import Tokenizer, load_tokenizer
from medrlvr_jax.model.families import read_config

REPEATED = re.compile(r"(<\|\w+\|>)\1{3,}")  # the tokens of an image


def show_data(config: Config, prompts: int) -> str:
    """Return the text to print: the training set, then the evaluation sets, each with its first `prompts`."""
    tokenizer = load_tokenizer(config.model.path)
    lines, trained_on = [], set()
    for name, spec in config.question_sets.items():
        if config.sft.target == "text" and name == "data":
            examples, how_read = data.read_text(spec)
            rows, limit = tokenizer.encode_texts([example.prompt for example in examples]), None
        else:
            questions, how_read = data.read(spec)
            tokens_per_image, limit = image_tokens(questions, config), config.prompt.max_tokens
            rows = text.encode_questions(tokenizer, questions, config.prompt, images=tokens_per_image)
            stems = {q.question for q in questions}
            if name == "data":
                trained_on = stems
            elif both := len(stems & trained_on):
                remedy = "`medrlvr contamination CONFIG` lists them and finds near duplicates"
                how_read += f"\n  also in data: {both:,} of {len(stems):,} question texts; {remedy}"
        lines += [
            f"{name}: {spec.path}: {how_read}",
            *describe_lengths(rows, limit),
            *format_prompts(tokenizer, rows[:prompts]),
            "",
        ]
    return "\n".join(lines).rstrip()


def image_tokens(questions: list[Question], config: Config) -> list[list[list[int]]] | None:
    """Return the placeholder tokens of each question's images; None if the model or the set has no images."""
    if not any(question.images for question in questions):
        return None
    vision = limit_pixels(read_config(config.model.path), config)
    images = measure_images(questions, vision) if vision else None
    return images.prompt_tokens() if images else None


def describe_lengths(rows: list[Any], limit: int | None) -> Iterator[str]:
    """Yield lines on the prompts' lengths in tokens and on the number that is longer than `limit`."""
    tokens = np.array([len(row) for row in rows])
    low, middle, high = np.percentile(tokens, [0, 50, 95])
    yield f"  prompt tokens: {low:.0f} to {tokens.max()}, median {middle:.0f}, 95 % up to {high:.0f}"
    if limit is not None:
        dropped = int((tokens > limit).sum())
        remedy = "; raise it" if dropped else ""
        yield f"  dropped: {dropped:,}, longer than prompt.max_tokens = {limit}{remedy}"


def format_prompts(tokenizer: Tokenizer, rows: list[list[int]]) -> Iterator[str]:
    """Yield the prompts' text as the model reads it, with special tokens."""
    for number, row in enumerate(rows, 1):
        yield f"  prompt {number}, {len(row)} tokens:"
        prompt = REPEATED.sub(lambda m: f"{m[1]} × {len(m[0]) // len(m[1])}", tokenizer.show(row))
        yield from (f"  | {line}" for line in prompt.split("\n"))

"""Prepare images for a vision tower: resize them, cut them into patches, and place them in prompts.

Pixels and positions equal those of transformers' `Qwen2VLImageProcessorPil` bit for bit. (With torchvision
installed, transformers prefers another resizing, whose pixels differ a little.)

Terms: a *patch* is a square of `cfg.patch` pixels a side. An *image token* is a square of `cfg.merge` patches
a side. A *window* is a square of image tokens, `cfg.window` patches a side, within which the tower attends.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from medrlvr_jax.data.images import Source, describe_source, read_image
from medrlvr_jax.data.question import DataError, Question
from medrlvr_jax.model.architecture import VisionConfig
from medrlvr_jax.types import Images, Vision

PREFETCHER = ThreadPoolExecutor(1)  # prepares the next batch, whose images are read in further threads
MAX_ASPECT = 200  # the longer side over the shorter


class Grid(NamedTuple):
    """An image's size in image tokens."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


Patches = tuple[UInt8[np.ndarray, "T square D"], Grid]  # see `cut_patches`


# ---- sizes and patches ----


def target_size(height: int, width: int, cfg: VisionConfig) -> tuple[int, int]:
    """Return height and width after resizing: whole image tokens, about the same proportions, and between
    `min_pixels` and `max_pixels` if that is possible.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(f"{width} × {height} pixels: one side is over {MAX_ASPECT} times the other; crop it")
    factor, area, sides = cfg.factor, height * width, (height, width)
    rows, columns = (round(side / factor) * factor for side in sides)
    if rows * columns > cfg.max_pixels:
        shrink = math.sqrt(area / cfg.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in sides)
    elif rows * columns < cfg.min_pixels:
        enlarge = math.sqrt(cfg.min_pixels / area)
        rows, columns = (math.ceil(side * enlarge / factor) * factor for side in sides)
    return rows, columns


def grid_of(source: Source, cfg: VisionConfig) -> Grid:
    """Count an image's tokens. It is read completely, so that a damaged file is refused here."""
    image = read_image(source)
    try:
        height, width = target_size(image.height, image.width, cfg)
    except DataError as e:
        raise DataError(f"{describe_source(source)}: {e}") from None
    return Grid(height // cfg.factor, width // cfg.factor)


def cut_patches(image: Image.Image, cfg: VisionConfig) -> Patches:
    """Resize an image and cut it into patches, by image token in rows from the top.

    Each token has merge² patches, and each patch D = 3 · patch² values: channel, row, column.
    """
    height, width = target_size(image.height, image.width, cfg)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    grid = Grid(height // cfg.factor, width // cfg.factor)
    cut = pixels.reshape(grid.rows, cfg.merge, cfg.patch, grid.columns, cfg.merge, cfg.patch, 3)
    cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # row, column of tokens; row, column of patches; channel; y, x
    return cut.reshape(grid.tokens, cfg.merge**2, 3 * cfg.patch**2), grid


# ---- windows ----


@lru_cache(maxsize=4096)
def window_layout(grid: Grid, side: int) -> Int32[np.ndarray, "W side*side"]:
    """Return the indices of the image tokens in each window of side × side tokens, from the top left.

    Windows at the right and the lower edge may have fewer tokens; -1 fills the rest.
    """
    index = np.arange(grid.tokens, dtype=np.int32).reshape(grid)
    out = []
    for row in range(0, grid.rows, side):
        for column in range(0, grid.columns, side):
            tokens = index[row : row + side, column : column + side].ravel()
            out.append(np.pad(tokens, (0, side * side - len(tokens)), constant_values=-1))
    return np.stack(out)


def window_count(grids: tuple[Grid, ...], cfg: VisionConfig) -> int:
    """Return the number of windows to allocate for a question's images.

    It is rounded up to one of four numbers between a power of two and the next (1 … 8, 10, 12, 14, 16, 20,
    …), so that few shapes are compiled.
    """
    side = cfg.window // cfg.merge
    needed = sum(math.ceil(grid.rows / side) * math.ceil(grid.columns / side) for grid in grids)
    step = 2 ** max(0, (needed - 1).bit_length() - 3)
    return -(-needed // step) * step


def arrange_windows(images: list[list[Patches]], windows: int, cfg: VisionConfig) -> Images:
    """Arrange the images of each question in `windows` windows, as the tower's input."""
    side, square, depth = cfg.window // cfg.merge, cfg.merge**2, 3 * cfg.patch**2
    pixels = np.zeros((len(images), windows, side * side, square, depth), np.uint8)
    slots = np.zeros((*pixels.shape[:-1], 5), np.int32)
    slots[..., 0] = -1
    inner = np.stack(np.divmod(np.arange(square), cfg.merge), -1)  # row and column of a patch in its token
    for q, of_question in enumerate(images):
        start = 0
        for number, (cut, grid) in enumerate(of_question):
            layout = window_layout(grid, side)
            part, filled = slice(start, start + len(layout)), layout >= 0
            pixels[q, part][filled] = cut[layout[filled]]
            token = np.stack(np.divmod(layout[filled], grid.columns), -1)
            patch = token[:, None] * cfg.merge + inner
            slots[q, part][filled, :, 0], slots[q, part][filled, :, 1:3] = number, patch
            slots[q, part][filled, :, 3:] = np.array(grid) * cfg.merge
            start += len(layout)
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    return Images(flat(pixels), flat(slots))


def token_slots(grids: tuple[Grid, ...], cfg: VisionConfig) -> Int32[np.ndarray, " T"]:
    """Return, for each image token of a question in order, its index among the tower's outputs."""
    side, start, out = cfg.window // cfg.merge, 0, []
    for grid in grids:
        layout = window_layout(grid, side).ravel()
        slots = np.empty(grid.tokens, np.int32)
        slots[layout[layout >= 0]] = start + np.flatnonzero(layout >= 0)
        out.append(slots)
        start += len(layout)
    return np.concatenate(out) if out else np.zeros(0, np.int32)


# ---- prompts ----


def mrope_positions(
    tokens: list[int], grids: tuple[Grid, ...], image_token: int
) -> tuple[Int32[np.ndarray, "P 3"], int]:
    """Return each token's M-RoPE position (time, row, column), and the position after the prompt.

    Text advances all three by 1 per token. An image's tokens share one time; the text after it goes on
    behind the larger of its sides.
    """
    out, start, column = np.zeros((len(tokens), 3), np.int32), 0, 0
    remaining = iter(grids)
    while column < len(tokens):
        if tokens[column] != image_token:
            out[column] = start
            column, start = column + 1, start + 1
            continue
        grid = next(remaining)
        places = np.divmod(np.arange(grid.tokens), grid.columns)
        out[column : column + grid.tokens] = start + np.stack([np.zeros_like(places[0]), *places], -1)
        column, start = column + grid.tokens, start + max(grid)
    return out, start


def vision_inputs(
    rows: list[list[int]], grids: list[tuple[Grid, ...]], features: Any, width: int, cfg: VisionConfig
) -> Vision:
    """Return the decoder's inputs for the images of left-padded prompts.

    `rows` are the prompts' tokens, `grids` their images' sizes, `features` the tower's outputs.
    """
    slots, places = np.full((len(rows), width), -1, np.int32), np.zeros((len(rows), width, 3), np.int32)
    next_position = np.zeros(len(rows), np.int32)
    for q, (tokens, of_question) in enumerate(zip(rows, grids, strict=True)):
        start = width - len(tokens)
        slots[q, start:][np.array(tokens) == cfg.image_token] = token_slots(of_question, cfg)
        places[q, start:], next_position[q] = mrope_positions(tokens, of_question, cfg.image_token)
    return Vision(features, slots, places, next_position)


# ---- a set of questions ----


@dataclass(frozen=True)
class ImageSet:
    """The images of a set of questions: their sizes, and their batches as the tower's inputs."""

    cfg: VisionConfig
    grids: list[tuple[Grid, ...]]  # for each question, the sizes of its images
    windows: int  # the most windows that a question of the set needs
    # Batches that a thread prepares while the device works, by the indices of their questions.
    prefetched: dict[tuple[int, ...], Future[Images]] = field(default_factory=dict, compare=False)

    def prompt_tokens(self) -> list[list[list[int]]]:
        """Return, for each image of each question, the tokens that represent it in the prompt."""
        cfg = self.cfg
        of_image = lambda grid: [cfg.image_start, *[cfg.image_token] * grid.tokens, cfg.image_end]
        return [[of_image(grid) for grid in grids] for grids in self.grids]

    def subset(self, index: Sequence[int] | np.ndarray) -> "ImageSet":
        """Return the images of the questions at `index`."""
        return replace(self, grids=[self.grids[i] for i in index], prefetched={})

    def prepare(self, questions: list[Question], index: Sequence[int]) -> Images:
        """Return the tower's input for the questions at `index`, prefetched or not."""
        future = self.prefetched.pop(tuple(index), None)
        return future.result() if future else self._prepare([questions[i] for i in index])

    def prefetch(self, questions: list[Question], index: Sequence[int]) -> None:
        """Start to prepare the images of the questions at `index`, the next batch, in a thread."""
        self.prefetched[tuple(index)] = PREFETCHER.submit(self._prepare, [questions[i] for i in index])

    def _prepare(self, questions: list[Question]) -> Images:
        sources = [image for question in questions for image in question.images]
        with ThreadPoolExecutor() as pool:
            cut = pool.map(lambda source: cut_patches(read_image(source), self.cfg), sources)
            images = [[next(cut) for _ in question.images] for question in questions]
        return arrange_windows(images, self.windows, self.cfg)


def measure_images(questions: list[Question], cfg: VisionConfig) -> ImageSet | None:
    """Read every image, in threads, for its size; None if no question has images.

    Raises `DataError` with the first ten questions whose images cannot be used.
    """

    def grids_of(question: Question) -> tuple[Grid, ...] | str:
        try:
            return tuple(grid_of(image, cfg) for image in question.images)
        except DataError as e:
            return f"question {question.id}: {e}"

    if not any(question.images for question in questions):
        return None
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(grids_of, questions))
    if errors := [result for result in results if isinstance(result, str)]:
        more = [f"(and {len(errors) - 10} more)"] if len(errors) > 10 else []
        raise DataError("\n".join(errors[:10] + more))
    grids = [result for result in results if not isinstance(result, str)]
    return ImageSet(cfg, grids, max(window_count(of_question, cfg) for of_question in grids))

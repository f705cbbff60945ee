"""Images: reading them, and cutting them into the patches that a vision tower takes.

Everything is numpy and Pillow, and equals transformers' `Qwen2VLImageProcessorPil` bit for bit. (With
torchvision installed, transformers prefers another resizing, whose pixels differ a little.) An image is read
upright (by its EXIF orientation), on white where it is transparent, and 16-bit grey at its whole range. What
cannot be read, and what has several frames, is refused by name.

DICOM files need the extra `dicom`. Stored values become grey by the first window of the file or, where it has
none, from the least value to the largest; MONOCHROME1 is inverted.
"""

import math
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image, ImageOps

from medrlvr_jax.data.question import DataError, Question
from medrlvr_jax.host import files
from medrlvr_jax.model.architecture import VisionConfig
from medrlvr_jax.types import Images, Vision

Source = str | bytes  # a file's path, or what such a file holds
BEHIND = ThreadPoolExecutor(1)  # where the next batch is prepared; its images are read in more threads
GREY = (122, 116, 104)  # the mean of the images that the towers were made for: about 0 once normalised
MAX_PIXELS = 89_478_485  # beyond it, a small file may ask for more memory than there is; Pillow's own limit
SIDE = 160  # pixels of a thumbnail's longer side
ASPECT = 200  # of the longer side to the shorter, at most


class Grid(NamedTuple):
    """An image's size in image tokens."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


Cut = tuple[UInt8[np.ndarray, "T square D"], Grid]  # see `patches`


# ---- reading ----


def name_of(source: Source) -> str:
    return source if isinstance(source, str) else f"image of {len(source):,} bytes"


def read_image(source: Source) -> Image.Image:
    """The upright RGB image. `DataError` names the image, what is wrong with it, and the remedy."""
    name = name_of(source)
    if isinstance(source, str) and not Path(source).expanduser().is_file():
        raise DataError(f"{name}: no such image; a path is relative to its data file's folder")
    with files.reading(name, "it may be damaged or of an unknown kind: save it again as PNG", DataError):
        data = Path(source).expanduser().read_bytes() if isinstance(source, str) else source
        if data[128:132] == b"DICM":
            return _dicom(data, name)
        image = Image.open(BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} × {image.height} pixels, where {MAX_PIXELS:,} fit"
            raise DataError(f"{name}: it has {size}; make it smaller, or cut out what matters")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a camera's JPEG with previews: the first is the image
            raise DataError(f"{name}: it has {frames} frames; save the one that matters as an image")
        image.load()
        if image.mode.startswith("I;16"):
            return Image.fromarray(_to_bytes(np.asarray(image) / 65535)).convert("RGB")
        if image.mode in ("I", "F"):
            problem = f"its pixels are {image.mode} (32 bits), which have no agreed range"
            raise DataError(f"{name}: {problem}; save it as 8 or 16 bits")
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def thumbnail(source: Source) -> str:
    """The image for people, as a data URI of a few kilobytes: at most `SIDE` pixels a side."""
    image, out = read_image(source), BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(out, "JPEG")
    return f"data:image/jpeg;base64,{b64encode(out.getvalue()).decode()}"


def with_thumbnails(rows: list[dict[str, Any]], questions: list[Question]) -> list[dict[str, Any]]:
    """Rows about questions, which they name by `id`; those whose question has images have `images`."""
    images = {question.id: question.images for question in questions}
    with ThreadPoolExecutor() as pool:
        small = pool.map(lambda row: list(map(thumbnail, images[row["id"]])), rows)
        return [row | ({"images": x} if x else {}) for row, x in zip(rows, small, strict=True)]


def _to_bytes(shares: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """0 … 1 as 0 … 255, rounded."""
    return np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)


def _dicom(data: bytes, name: str) -> Image.Image:
    """One frame of a DICOM file, by DICOM PS3.3 C.11.1 (rescaling) and C.11.2.1.2 (windows)."""
    try:
        import pydicom  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise DataError(f"{name}: reading DICOM needs pydicom; pip install 'medrlvr-jax[dicom]'") from None
    from pydicom.pixels import (  # pyright: ignore[reportMissingImports]
        apply_modality_lut,
        pixel_array,
    )

    record = pydicom.dcmread(BytesIO(data))
    if (frames := int(record.get("NumberOfFrames") or 1)) > 1:
        raise DataError(f"{name}: it has {frames} frames; save the one that matters as an image")
    values = pixel_array(record)
    if values.ndim == 3:
        return Image.fromarray(_to_bytes(values / (2 ** int(record.BitsStored) - 1))).convert("RGB")
    values = np.asarray(apply_modality_lut(values, record), np.float64)
    centre, width, function = (
        record.get(field) for field in ("WindowCenter", "WindowWidth", "VOILUTFunction")
    )
    if centre is None or width is None:
        least, largest = values.min(), values.max()
        shares = (values - least) / max(largest - least, 1e-9)
    else:
        centre, width = (float(np.atleast_1d(np.array(value, float))[0]) for value in (centre, width))
        if function == "SIGMOID":
            shares = 1 / (1 + np.exp(-4 * (values - centre) / width))
        elif function == "LINEAR_EXACT":
            shares = (values - centre) / width + 0.5
        else:
            shares = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    grey = _to_bytes(shares)
    return Image.fromarray(255 - grey if record.PhotometricInterpretation == "MONOCHROME1" else grey).convert(
        "RGB"
    )


# ---- sizes and patches ----


def target_size(height: int, width: int, cfg: VisionConfig) -> tuple[int, int]:
    """Height and width after resizing: whole image tokens, between `min_pixels` and `max_pixels` where that
    can be, of about the same proportions.
    """
    if max(height, width) > ASPECT * min(height, width):
        raise DataError(f"{width} × {height} pixels: one side is over {ASPECT} times the other; crop it")
    factor, area, sides = cfg.factor, height * width, (height, width)
    down, across = (round(side / factor) * factor for side in sides)
    if down * across > cfg.max_pixels:
        shrink = math.sqrt(area / cfg.max_pixels)
        down, across = (max(factor, math.floor(side / shrink / factor) * factor) for side in sides)
    elif down * across < cfg.min_pixels:
        enlarge = math.sqrt(cfg.min_pixels / area)
        down, across = (math.ceil(side * enlarge / factor) * factor for side in sides)
    return down, across


def grid_of(source: Source, cfg: VisionConfig) -> Grid:
    """Read the image whole, so that a broken one is refused here, and count its image tokens."""
    image = read_image(source)
    try:
        height, width = target_size(image.height, image.width, cfg)
    except DataError as e:
        raise DataError(f"{name_of(source)}: {e}") from None
    return Grid(height // cfg.factor, width // cfg.factor)


def patches(image: Image.Image, cfg: VisionConfig) -> Cut:
    """The resized image by image token, in rows from the top; of each token its merge² patches, and of each
    patch D = 3 · patch² values: channel, row, column.
    """
    height, width = target_size(image.height, image.width, cfg)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    grid = Grid(height // cfg.factor, width // cfg.factor)
    cut = pixels.reshape(grid.rows, cfg.merge, cfg.patch, grid.columns, cfg.merge, cfg.patch, 3)
    cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # row, column of tokens; row, column of patches; channel; y, x
    return cut.reshape(grid.tokens, cfg.merge**2, 3 * cfg.patch**2), grid


# ---- windows ----


@lru_cache(maxsize=4096)
def layout(grid: Grid, side: int) -> Int32[np.ndarray, "W side*side"]:
    """For each window of side × side image tokens, from the top left, the numbers of its tokens in the image
    (in rows from the top), densely; -1 in the rest of a window at the right or the lower edge.
    """
    number = np.arange(grid.tokens, dtype=np.int32).reshape(grid)
    out = []
    for row in range(0, grid.rows, side):
        for column in range(0, grid.columns, side):
            held = number[row : row + side, column : column + side].ravel()
            out.append(np.pad(held, (0, side * side - len(held)), constant_values=-1))
    return np.stack(out)


def windows_of(grids: tuple[Grid, ...], cfg: VisionConfig) -> int:
    """Windows that a question's images have room in: those that they take, rounded up to one of four numbers
    between a power of two and the next (1 … 8, 10, 12, 14, 16, 20, …), so that few shapes are compiled.
    """
    side = cfg.window // cfg.merge
    taken = sum(math.ceil(grid.rows / side) * math.ceil(grid.columns / side) for grid in grids)
    step = 2 ** max(0, (taken - 1).bit_length() - 3)
    return -(-taken // step) * step


def arrange(images: list[list[Cut]], windows: int, cfg: VisionConfig) -> Images:
    """The images of each question in `windows` windows, as the tower takes them."""
    side, square, depth = cfg.window // cfg.merge, cfg.merge**2, 3 * cfg.patch**2
    pixels = np.zeros((len(images), windows, side * side, square, depth), np.uint8)
    slots = np.zeros((*pixels.shape[:-1], 5), np.int32)
    slots[..., 0] = -1
    inner = np.stack(np.divmod(np.arange(square), cfg.merge), -1)  # row and column of a patch in its token
    for q, of_question in enumerate(images):
        start = 0
        for number, (cut, grid) in enumerate(of_question):
            held = layout(grid, side)
            part, filled = slice(start, start + len(held)), held >= 0
            pixels[q, part][filled] = cut[held[filled]]
            token = np.stack(np.divmod(held[filled], grid.columns), -1)
            places = token[:, None] * cfg.merge + inner
            slots[q, part][filled, :, 0], slots[q, part][filled, :, 1:3] = number, places
            slots[q, part][filled, :, 3:] = np.array(grid) * cfg.merge
            start += len(held)
    flat = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    return Images(flat(pixels), flat(slots))


def token_slots(grids: tuple[Grid, ...], cfg: VisionConfig) -> Int32[np.ndarray, " T"]:
    """Where each image token of a question, image after image, lies among those that the tower returns."""
    side, start, out = cfg.window // cfg.merge, 0, []
    for grid in grids:
        held = layout(grid, side).ravel()
        place = np.empty(grid.tokens, np.int32)
        place[held[held >= 0]] = start + np.flatnonzero(held >= 0)
        out.append(place)
        start += len(held)
    return np.concatenate(out) if out else np.zeros(0, np.int32)


# ---- prompts ----


def positions(
    tokens: list[int], grids: tuple[Grid, ...], image_token: int
) -> tuple[Int32[np.ndarray, "P 3"], int]:
    """Each token's position in time, by row and by column, and that of the token after the prompt (M-RoPE).

    Text counts on along all axes. An image's tokens share one time; after it, text goes on behind the larger
    of its sides.
    """
    out, start, column = np.zeros((len(tokens), 3), np.int32), 0, 0
    waiting = iter(grids)
    while column < len(tokens):
        if tokens[column] != image_token:
            out[column] = start
            column, start = column + 1, start + 1
            continue
        grid = next(waiting)
        places = np.divmod(np.arange(grid.tokens), grid.columns)
        out[column : column + grid.tokens] = start + np.stack([np.zeros_like(places[0]), *places], -1)
        column, start = column + grid.tokens, start + max(grid)
    return out, start


def place(
    rows: list[list[int]], grids: list[tuple[Grid, ...]], features: Any, width: int, cfg: VisionConfig
) -> Vision:
    """What the decoder reads of the images of left-padded prompts: `rows` are their tokens, `grids` their
    images' sizes, `features` what the tower gives of them.
    """
    slots, places = np.full((len(rows), width), -1, np.int32), np.zeros((len(rows), width, 3), np.int32)
    after = np.zeros(len(rows), np.int32)
    for q, (tokens, of_question) in enumerate(zip(rows, grids, strict=True)):
        start = width - len(tokens)
        slots[q, start:][np.array(tokens) == cfg.image_token] = token_slots(of_question, cfg)
        places[q, start:], after[q] = positions(tokens, of_question, cfg.image_token)
    return Vision(features, slots, places, after)


# ---- a set of questions ----


@dataclass(frozen=True)
class ImageSet:
    """The images of a set of questions: their sizes, and what a batch of them needs."""

    cfg: VisionConfig
    grids: list[tuple[Grid, ...]]  # of each question's images
    windows: int  # of a question's images together, at most
    # batches that a thread prepares while the device works, by the places of their questions
    ahead: dict[tuple[int, ...], Future[Images]] = field(default_factory=dict, compare=False, repr=False)

    def pads(self) -> list[list[list[int]]]:
        """The tokens that stand in the prompt for each image of each question."""
        cfg = self.cfg
        of_image = lambda grid: [cfg.image_start, *[cfg.image_token] * grid.tokens, cfg.image_end]
        return [[of_image(grid) for grid in grids] for grids in self.grids]

    def taking(self, index: Sequence[int] | np.ndarray) -> "ImageSet":
        """The same of some of the questions."""
        return replace(self, grids=[self.grids[i] for i in index], ahead={})

    def prepare(self, questions: list[Question], index: Sequence[int]) -> Images:
        """The images of the questions at `index` as the tower takes them; they may have been begun."""
        ahead = self.ahead.pop(tuple(index), None)
        return ahead.result() if ahead else self._prepare([questions[i] for i in index])

    def begin(self, questions: list[Question], index: Sequence[int]) -> None:
        """Prepare the images of the questions at `index`, which come next, in a thread."""
        self.ahead[tuple(index)] = BEHIND.submit(self._prepare, [questions[i] for i in index])

    def _prepare(self, questions: list[Question]) -> Images:
        return arrange(cut_images(questions, self.cfg), self.windows, self.cfg)


def measure(questions: list[Question], cfg: VisionConfig) -> ImageSet | None:
    """Read every image, in threads, and refuse those that cannot be used; None without images."""

    def one(question: Question) -> tuple[Grid, ...] | str:
        try:
            return tuple(grid_of(image, cfg) for image in question.images)
        except DataError as e:
            return f"question {question.id}: {e}"

    if not any(question.images for question in questions):
        return None
    with ThreadPoolExecutor() as pool:
        grids = list(pool.map(one, questions))
    if wrong := [grid for grid in grids if isinstance(grid, str)]:
        more = [f"(and {len(wrong) - 10} more)"] if len(wrong) > 10 else []
        raise DataError("\n".join(wrong[:10] + more))
    sizes = [grid for grid in grids if not isinstance(grid, str)]
    return ImageSet(cfg, sizes, max(windows_of(grids, cfg) for grids in sizes))


def cut_images(questions: list[Question], cfg: VisionConfig) -> list[list[Cut]]:
    """The images of some questions in patches, read in threads."""
    sources = [image for question in questions for image in question.images]
    with ThreadPoolExecutor() as pool:
        cuts = iter(list(pool.map(lambda source: patches(read_image(source), cfg), sources)))
    return [[next(cuts) for _ in question.images] for question in questions]

"""Read image files: photographs, scans, DICOM; as upright RGB images of 8 bits.

Images are turned upright by their EXIF orientation, transparent ones are put on white, and 16-bit grey keeps
its whole range. Files that cannot be read, and files with several frames, are refused by name.

DICOM files need the extra `dicom`. Their stored values become grey by the first window of the file, or by
their own range if the file has no window; MONOCHROME1 is inverted.
"""

from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from medrlvr_jax.data.question import DataError, Question
from medrlvr_jax.host import files

Source = str | bytes  # the path of an image file, or its content
GREY = (122, 116, 104)  # the mean of the images that the towers were pretrained on: about 0 once normalised
MAX_PIXELS = 89_478_485  # Pillow's own limit: a small file may decode to more than the memory
THUMBNAIL_SIDE = 160  # pixels


def describe_source(source: Source) -> str:
    return source if isinstance(source, str) else f"image of {len(source):,} bytes"


def read_image(source: Source) -> Image.Image:
    """Return the upright RGB image. Raises `DataError` that names the image, the problem and the remedy."""
    name = describe_source(source)
    if isinstance(source, str) and not Path(source).expanduser().is_file():
        raise DataError(f"{name}: no such image; a path is relative to its data file's folder")
    with files.reading(name, "it may be damaged or of an unknown type; save it again as PNG", DataError):
        data = Path(source).expanduser().read_bytes() if isinstance(source, str) else source
        if data[128:132] == b"DICM":
            return _read_dicom(data, name)
        image = Image.open(BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}"
            raise DataError(f"{name}: it has {size}; make it smaller, or crop it")
        if image.format != "MPO":  # a camera's JPEG with previews, of which the first frame is the image
            _refuse_frames(getattr(image, "n_frames", 1), name)
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


def _refuse_frames(frames: int, name: str) -> None:
    if frames > 1:
        raise DataError(f"{name}: it has {frames} frames; save the one that matters as an image")


def _to_bytes(grey: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Map 0 … 1 to 0 … 255, rounded; values outside are clipped."""
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)


def _read_dicom(data: bytes, name: str) -> Image.Image:
    """Read one frame of a DICOM file by DICOM PS3.3 C.11.1 (rescaling) and C.11.2.1.2 (windows)."""
    try:
        import pydicom  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise DataError(f"{name}: reading DICOM needs pydicom; pip install 'medrlvr-jax[dicom]'") from None
    from pydicom.pixels import apply_modality_lut, pixel_array  # pyright: ignore[reportMissingImports]

    record = pydicom.dcmread(BytesIO(data))
    _refuse_frames(int(record.get("NumberOfFrames") or 1), name)
    values = pixel_array(record)
    if values.ndim == 3:
        return Image.fromarray(_to_bytes(values / (2 ** int(record.BitsStored) - 1))).convert("RGB")
    values = np.asarray(apply_modality_lut(values, record), np.float64)
    centre, width = record.get("WindowCenter"), record.get("WindowWidth")
    if centre is None or width is None:
        grey = (values - values.min()) / max(np.ptp(values), 1e-9)
    else:
        centre, width = (float(np.atleast_1d(np.array(value, float))[0]) for value in (centre, width))
        match record.get("VOILUTFunction"):
            case "SIGMOID":
                grey = 1 / (1 + np.exp(-4 * (values - centre) / width))
            case "LINEAR_EXACT":
                grey = (values - centre) / width + 0.5
            case _:
                grey = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    grey = _to_bytes(grey)
    inverted = record.PhotometricInterpretation == "MONOCHROME1"
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")


# ---- thumbnails, for logs and reports ----


def thumbnail(source: Source) -> str:
    """Return the image as a data URI of a few kilobytes, at most `THUMBNAIL_SIDE` pixels a side."""
    image, out = read_image(source), BytesIO()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(out, "JPEG")
    return f"data:image/jpeg;base64,{b64encode(out.getvalue()).decode()}"


def with_thumbnails(rows: list[dict[str, Any]], questions: list[Question]) -> list[dict[str, Any]]:
    """Add the field `images` to rows whose question, named by the row's `id`, has images."""
    images = {question.id: question.images for question in questions}
    with ThreadPoolExecutor() as pool:
        small = pool.map(lambda row: list(map(thumbnail, images[row["id"]])), rows)
        return [row | ({"images": x} if x else {}) for row, x in zip(rows, small, strict=True)]

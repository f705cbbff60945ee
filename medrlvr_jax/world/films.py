"""Draw chest films of 56 × 56 grey pixels.

Every machine draws the same films: IEEE 754 defines the rounding of all operations used here, and random
numbers come from `random.Random` and SHAKE-256. The files are BMP, which has no compression that could
differ.
"""

import hashlib
from io import BytesIO
from random import Random
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Plane = Float[np.ndarray, "56 56"]
SIDE = 56  # pixels
ACROSS, DOWN = np.meshgrid(*[(np.arange(SIDE) + 0.5) / SIDE] * 2)  # coordinates of each pixel, 0 to 1
# Standard deviations of the noise, usual and with the cause `noise`; white is 1.
NOISE, NOISY = 0.045, 0.1
# Sizes of findings: usually 1 ± SCALE, with the cause `size` one of SCALES.
SCALE, SCALES = 0.15, (0.7, 1.35)


class Film(NamedTuple):
    finding: str
    side: str  # the patient's left or right; "" for a finding without a side
    zone: str  # upper or lower; "" for a finding without a zone

    def __str__(self) -> str:
        return " ".join(filter(None, (self.side, self.zone, self.finding)))


def draw(rng: Random, film: Film, causes: tuple[str, ...] = ()) -> bytes:
    """Draw the film as a BMP file, with the changes named in `causes` (`radiograph.CAUSES`)."""
    scale = SCALES[rng.random() < 0.5] if "size" in causes else _between(rng, 1 - SCALE, 1 + SCALE)
    chest = _draw_chest(rng, film, scale)
    seed = str(rng.random()).encode()
    draws = np.frombuffer(hashlib.shake_256(seed).digest(4 * SIDE**2), np.uint8).reshape(SIDE, SIDE, 4)
    noise = (draws.sum(-1, dtype=np.int64) - 510) / 147.8  # approximately standard normal
    grey = chest + (NOISY if "noise" in causes else NOISE) * noise
    return as_bmp(1 - grey if "negative" in causes else grey)


def as_bmp(grey: Plane) -> bytes:
    """Encode grey values from 0 to 1 as a BMP file."""
    file = BytesIO()
    Image.fromarray(np.clip(np.floor(255 * grey + 0.5), 0, 255).astype(np.uint8)).save(file, "BMP")
    return file.getvalue()


def _between(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _ramp(distance: Plane, softness: float) -> Plane:
    """Return a smooth step: 0 where `distance` is negative, 1 where positive, over a width of `softness`."""
    t = np.clip(0.5 + distance / softness, 0, 1)
    return t * t * (3 - 2 * t)


def _ellipse(x: float, y: float, wide: float, high: float, softness: float = 0.03) -> Plane:
    inside = 1 - np.sqrt(((ACROSS - x) / wide) ** 2 + ((DOWN - y) / high) ** 2)
    return _ramp(inside * min(wide, high), softness)


def _blend(grey: Plane, mask: Plane, tone: float | Plane, strength: float = 1.0) -> Plane:
    return grey + strength * mask * (tone - grey)


def _draw_chest(rng: Random, film: Film, scale: float) -> Plane:
    """Draw the film without noise; `scale`: the size of the finding."""
    large, wide_heart = film.finding == "hyperinflation", film.finding == "cardiomegaly"
    middle, top = 0.5 + _between(rng, -0.03, 0.03), 0.42 + _between(rng, -0.03, 0.03) + 0.05 * large
    wide = _between(rng, 0.14, 0.165) + 0.04 * scale * large
    high = _between(rng, 0.27, 0.31) + 0.1 * scale * large
    gap = _between(rng, 0.17, 0.19) + 0.02 * large
    floor = top + high * (0.9 if large else 0.78)
    centres = {"right": middle - gap, "left": middle + gap}  # the patient's sides
    air = {
        side: _ellipse(x, top, wide, high, 0.06) * _ramp(floor - DOWN, 0.05) for side, x in centres.items()
    }
    lungs = np.maximum(air["left"], air["right"])

    grey = _between(rng, 0.54, 0.64) + 0.1 * _ramp(_between(rng, 0.05, 0.065) - abs(ACROSS - middle), 0.04)
    waves = DOWN * _between(rng, 9, 11) + 12 * (ACROSS - middle) ** 2 + rng.random()
    ribs = np.clip(2 * abs(2 * (waves % 1) - 1) - 1, 0, 1)
    grey = _blend(grey, lungs, _between(rng, 0.3, 0.38) + 0.07 * ribs)
    heart = _between(rng, 0.1, 0.12) * (1 + 0.75 * scale * wide_heart - 0.25 * large)
    heart = _ellipse(middle + 0.05 - 0.03 * wide_heart, floor - 0.06, heart, _between(rng, 0.11, 0.13), 0.05)
    grey = _blend(grey, heart, _between(rng, 0.66, 0.72), 0.9)
    if film.finding == "miliary":
        for i in range(70):
            x = centres[("left", "right")[i % 2]] + 0.8 * wide * _between(rng, -1, 1)
            y, radius = top + high * _between(rng, -0.8, 0.75), 0.004 + 0.014 * scale
            grain = _ellipse(x, y, radius, radius, 0.02)
            grey = _blend(grey, grain * lungs, 0.75, 0.8)
    if not film.side:
        return grey
    lung = centres[film.side], top, wide, high, floor
    return _draw_finding(rng, film, scale, grey, air[film.side], lung)


def _draw_finding(
    rng: Random, film: Film, scale: float, grey: Plane, air: Plane, lung: tuple[float, ...]
) -> Plane:
    """Draw a finding of one side. `air`: the mask of its lung; `lung`: the centre, half axes and floor."""
    x, top, wide, high, floor = lung
    outward = 1 if film.side == "left" else -1
    white = _between(rng, 0.7, 0.8)
    y = top + (_between(rng, -0.17, -0.1) if film.zone == "upper" else _between(rng, 0.06, 0.12))
    x += outward * 0.03 * (film.zone == "lower")  # beside the heart
    if film.finding == "consolidation":
        shadow = _ellipse(x + _between(rng, -0.02, 0.02), y, 0.11 * scale, 0.1 * scale, 0.1)
        return _blend(grey, shadow, white, 0.75)
    if film.finding == "effusion":
        level = floor - _between(rng, 0.13, 0.17) * scale - 0.03 * _ramp(outward * (ACROSS - x), 0.3)
        fluid = _ellipse(x + outward * 0.01, top, wide + 0.02, high + 0.05) * _ramp(DOWN - level, 0.03)
        return _blend(grey, fluid, white)
    if film.finding == "pneumothorax":
        rim = _between(rng, 0.07, 0.09) * scale
        inner, deep, across = x - outward * 0.8 * rim, top + 0.03, wide - 0.4 * rim
        lung_left = _ellipse(inner, deep, across, high - 0.02)
        line = lung_left * (1 - _ellipse(inner, deep, across - 0.025, high - 0.045))
        return _blend(_blend(grey, air * (1 - lung_left), 0.16), air * line, white, 0.8)
    if film.finding == "nodules":
        for i in range(5):
            at = x + _between(rng, -0.07, 0.07), top + high * (0.3 * i - 0.6 + _between(rng, -0.08, 0.08))
            grey = _blend(grey, _ellipse(*at, 0.036 * scale, 0.036 * scale), white)
        return grey
    if film.finding == "cavity":
        at, radius = (x + _between(rng, -0.02, 0.02), y), _between(rng, 0.085, 0.1) * scale
        ring = _blend(grey, _ellipse(*at, radius, radius), white)
        return _blend(ring, _ellipse(*at, radius - 0.04, radius - 0.04), 0.2)
    return _blend(grey, _ellipse(x + _between(rng, -0.05, 0.05), y, 0.05 * scale, 0.05 * scale), white)


def pixels(bmp: bytes) -> UInt8[np.ndarray, "56 56"]:
    """Return the grey values of a film from `draw`."""
    return np.asarray(Image.open(BytesIO(bmp)))

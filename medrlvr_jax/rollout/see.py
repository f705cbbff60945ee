"""The images of a batch of prompts, as the frozen vision tower sees them: once a batch, shared by the samples
of each prompt and by every pass over it.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts, abstract_tower
from medrlvr_jax.data.images import GREY
from medrlvr_jax.model import vision
from medrlvr_jax.model.spec import VisionConfig
from medrlvr_jax.model.vision import Images
from medrlvr_jax.rollout.program import Program, array
from medrlvr_jax.types import Array, Params, Prompts

SCORES = 2**28  # attention scores of whole images that a device holds at a time: 1 GiB of float32


@partial(jax.jit, static_argnames=("cfg", "dtype", "at_once"))
def see(params: Params, images: Images, *, cfg: VisionConfig, dtype: Any, at_once: int) -> Array:
    """The image tokens [Q, T, E] of each question by slot; `at_once` questions at a time."""
    tower = partial(vision.tower, params, cfg, dtype=dtype)
    return sharding.map_rows(tower, images, at_once)


def settings(parts: Parts, questions: int, windows: int) -> dict[str, Any]:
    """The static arguments of `see`."""
    cfg = parts.cfg.vision
    assert cfg is not None
    ways = math.prod(parts.mesh.shape[axis] for axis in sharding.BATCH)
    rows = questions // ways
    fit = max(1, SCORES // (cfg.heads * (windows * cfg.window**2) ** 2))
    at_once = ways * max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fit)
    return {"cfg": cfg, "dtype": parts.cfg.execution.dtype, "at_once": at_once}


@partial(jax.jit, static_argnames="patch")
def as_grey(images: Images, *, patch: int) -> Images:
    """Grey images of the same sizes."""
    pixels = jnp.repeat(jnp.array(GREY, jnp.uint8), patch**2)
    return replace(images, pixels=sharding.by_rows(jnp.broadcast_to(pixels, images.pixels.shape)))


def add_features(parts: Parts, prompts: Prompts, images: Images, blank: bool = False) -> Prompts:
    """The prompts with what the tower sees of their images; both lie over the mesh by rows. `blank`: also
    with what it would see of grey ones.
    """
    assert parts.tower is not None
    assert prompts.vision is not None
    questions, windows = images.pixels.shape[:2]
    static = settings(parts, questions, windows)
    look = partial(see, parts.tower.params, **static)
    features = {"features": look(images)}
    if blank:
        features["blank"] = look(as_grey(images, patch=static["cfg"].patch))
    return replace(prompts, vision=replace(prompts.vision, **features))


def see_program(parts: Parts, questions: int, windows: int, name: str) -> Program:
    """`see` as `add_features` calls it."""
    cfg = parts.cfg.vision
    assert cfg is not None
    patches = questions, windows, cfg.window**2
    pixels = array(parts, jnp.uint8, *patches, 3 * cfg.patch**2)
    images = Images(pixels, array(parts, jnp.int32, *patches, 5))
    return Program(name, see, (abstract_tower(parts), images), settings(parts, questions, windows))

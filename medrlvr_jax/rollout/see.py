"""The images of a batch of prompts, as the vision tower sees them: once a batch, for all samples of a prompt.

A frozen tower is computed only here, and what it sees is an input like tokens of every pass over the prompts.
A tower that is trained is computed here for the sampler and for all that is computed before learning; the
policy's learning computes it again, with its gradient (`scoring.hidden_states`). As for the others:

- The reference has the tower of the start, which is not today's: it sees by that.
- The critic reads what the policy's tower sees before learning, without a gradient. Its values before
  learning and its targets are of the same input, so nothing is inexact; a tower of its own would cost as much
  memory again, with its optimiser's state, and a pass over all images for each minibatch.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from medrlvr_jax.build import Parts, abstract_tower
from medrlvr_jax.data.images import GREY
from medrlvr_jax.model import vision
from medrlvr_jax.model.architecture import DecoderConfig
from medrlvr_jax.model.spec import VISION
from medrlvr_jax.rollout.program import Program, abstract_images
from medrlvr_jax.sharding import by_rows
from medrlvr_jax.types import Array, Images, Params, Prompts


@partial(jax.jit, static_argnames="cfg")
def see(params: Params, images: Images, *, cfg: DecoderConfig) -> Array:
    """`vision.see` by the tower `params`."""
    return vision.see({VISION: params}, cfg, images)


@partial(jax.jit, static_argnames="patch")
def as_grey(images: Images, *, patch: int) -> Images:
    """Grey images of the same sizes."""
    pixels = jnp.repeat(jnp.array(GREY, jnp.uint8), patch**2)
    return replace(images, pixels=by_rows(jnp.broadcast_to(pixels, images.pixels.shape)))


def add_features(
    parts: Parts, params: Params | None, prompts: Prompts, images: Images, blank: bool = False
) -> Prompts:
    """The prompts with what the tower sees of their images; both lie over the mesh by rows.

    `params`: the policy's, with its tower if that is trained. None: a trained tower is not asked now, and the
    prompts have the images alone. `blank`: also with what it would see of grey images.
    """
    assert parts.tower is not None and parts.cfg.vision is not None
    trained = parts.cfg.execution.tower != "freeze"
    if trained:
        prompts = prompts.with_vision(images=images)
        if params is None:
            return prompts
        tower = params[VISION]
    else:
        tower = parts.tower()
    look = partial(see, tower, cfg=parts.cfg)
    grey = look(as_grey(images, patch=parts.cfg.vision.patch)) if blank else None
    return prompts.with_vision(features=look(images), blank=grey)


def see_program(
    parts: Parts, questions: int, windows: int, name: str, tower: Params | None = None
) -> Program:
    """`see` as `add_features` calls it; `tower`: its parameters as shapes."""
    images, tower = abstract_images(parts, questions, windows), tower or abstract_tower(parts)
    return Program(name, see, (tower, images), {"cfg": parts.cfg})

"""The vision tower's features of a batch of prompts, computed once for all samples of a prompt.

A frozen tower runs only here, and its features are an input of every later pass over the prompts. A trained
tower runs here for the sampler and for everything before learning; learning computes its features again, with
gradients (`scoring.hidden_states`). The other models:

- The reference uses the tower with which the training began.
- The critic reads the features of the policy's tower before learning, without a gradient. Its old values and
  its targets use the same features, so this is exact. Its own tower would need as much memory again, with an
  optimiser state, and a pass over all images in each minibatch.
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
    """Return `vision.see`, the features of the images, with the tower's `params`."""
    return vision.see({VISION: params}, cfg, images)


@partial(jax.jit, static_argnames="patch")
def as_grey(images: Images, *, patch: int) -> Images:
    """Return grey images of the same sizes."""
    pixels = jnp.repeat(jnp.array(GREY, jnp.uint8), patch**2)
    return replace(images, pixels=by_rows(jnp.broadcast_to(pixels, images.pixels.shape)))


def add_features(
    parts: Parts, params: Params | None, prompts: Prompts, images: Images, blank: bool = False
) -> Prompts:
    """Return the prompts with the tower's features of their images. Both are sharded over the mesh by rows.

    `params`: the policy's, with its tower if that is trained. None: the prompts get no features from a
    trained tower, only the images. `blank`: add the features of grey images, too.
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
    features_of = partial(see, tower, cfg=parts.cfg)
    grey = features_of(as_grey(images, patch=parts.cfg.vision.patch)) if blank else None
    return prompts.with_vision(features=features_of(images), blank=grey)


def see_program(
    parts: Parts, questions: int, windows: int, name: str, tower: Params | None = None
) -> Program:
    """Return the program `see` with the arguments of `add_features`. `tower`: its parameters as shapes."""
    images, tower = abstract_images(parts, questions, windows), tower or abstract_tower(parts)
    return Program(name, see, (tower, images), {"cfg": parts.cfg})

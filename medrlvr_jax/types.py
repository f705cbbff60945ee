"""The pytrees that the stages exchange. Column t of every response array is about response token t.

Q questions, P prompt columns (left-padded), G samples of each question, R response columns (right-padded).
Absence is `None`: no reference model, no critic, nothing truncated.

Types contain shapes, as in `Float32[Array, "Q G R"]` (jaxtyping). They are for readers and the type checker;
nothing is checked at run time.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
from jaxtyping import Bool, Float, Float32, Int32, UInt8, UInt32

Array = jax.Array
Leaf = Any  # of a pytree: an Array; on the host NumPy's; in a plan a ShapeDtypeStruct
Params = Any


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are all children. It checks nothing: JAX unflattens often."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


class Mean(NamedTuple):
    """A mean before the division. Totals and counts are summed over micro-batches and devices first."""

    total: Leaf
    count: Leaf

    def value(self):
        return self.total / jax.numpy.maximum(self.count, 1e-9)


@pytree
class Images:
    """The images of each question, in consecutive windows of patches."""

    pixels: UInt8[Leaf, "Q W S D"]  # of each patch: channel, row, column, flattened
    # of each patch: the number of its image within the question, or -1 in an empty slot; its row and column;
    # the image's rows and columns of patches
    slots: Int32[Leaf, "Q W S 5"]


@pytree
class Vision:
    """The decoder's view of the images in a batch of prompts."""

    # The vision tower's image tokens: E numbers for the embedding, then E for each of the first layers
    # (`VisionConfig.deepstack`). None: they are computed from `images` by the tower of the parameters that
    # read the prompts (`scoring.hidden_states`).
    features: Float[Leaf, "Q T F"] | None
    slots: Int32[Leaf, "Q P"]  # which of the features stands in a column; -1: the column holds text
    positions: Int32[Leaf, "Q P 3"]  # in time, by row and by column; 0 on padding
    next_position: Int32[Leaf, " Q"]
    # the same features of grey images of the same sizes; None where no component of the reward asks for them
    blank: Float[Leaf, "Q T F"] | None = None
    images: Images | None = None  # None where the tower is frozen: nothing asks for them again


@pytree
class Prompts:
    tokens: Int32[Leaf, "Q P"]  # left-padded
    mask: Bool[Leaf, "Q P"]  # False on padding
    ids: UInt32[Leaf, " Q"]  # the questions' own numbers: sampling noise is keyed by them
    vision: Vision | None = None  # None: no question has an image

    @property
    def positions(self) -> Int32[Leaf, "Q P *axes"]:
        """0, 1, … from the first token on; 0 on padding. With images, along three axes."""
        if self.vision is not None:
            return self.vision.positions
        return jax.numpy.maximum(jax.numpy.cumsum(self.mask, axis=1) - 1, 0)

    @property
    def next_position(self) -> Int32[Leaf, " Q"]:
        """Of a response's first token, along every axis."""
        if self.vision is not None:
            return self.vision.next_position
        return self.mask.sum(1)

    def with_vision(self, **changes: Any) -> "Prompts":
        """The same with other fields of `vision`, if there are images."""
        return replace(self, vision=replace(self.vision, **changes)) if self.vision else self

    @property
    def unseen(self) -> "Prompts":
        """The same for parameters with a tower of their own: without the features, if it can see again."""
        return self.with_vision(features=None) if self.vision and self.vision.images else self


@pytree
class Rollout:
    tokens: Int32[Leaf, "Q G R"]  # pad after the end
    mask: Bool[Leaf, "Q G R"]  # True up to and including the stop token
    logprobs: Float32[Leaf, "Q G R"]  # under the distribution each token was drawn from
    # under the untruncated policy; None where that is the same
    policy_logprobs: Float32[Leaf, "Q G R"] | None
    # nats, the untruncated policy's at each token; None where it was not asked for
    entropy: Float32[Leaf, "Q G R"] | None = None


@pytree
class Assessment:
    logprobs: Float32[Leaf, "Q G R"]  # the policy before learning, as the trainer computes it
    entropy: Float32[Leaf, "Q G R"]  # nats
    ref_logprobs: Float32[Leaf, "Q G R"] | None
    values: Float32[Leaf, "Q G R"] | None  # of the state before token t


@pytree
class Experience:
    """All a learner needs; rows (the leading Q) are independent, so any split into minibatches is legal."""

    prompts: Prompts
    tokens: Int32[Leaf, "Q G R"]
    mask: Bool[Leaf, "Q G R"]  # the tokens that are learned from
    logprobs: Float32[Leaf, "Q G R"]  # before learning
    ref_logprobs: Float32[Leaf, "Q G R"] | None
    advantages: Float32[Leaf, "Q G R"]
    values: Float32[Leaf, "Q G R"] | None  # before learning
    returns: Float32[Leaf, "Q G R"] | None
    # of truncated importance sampling: see losses.policy_loss
    sampler_weights: Float32[Leaf, "Q G R"] | None = None


@pytree
class Learner:
    params: Params  # what is trained: all weights, or adapters (and a critic's value head)
    opt_state: Any


@pytree
class Frozen:
    """What a run reads and never changes, in no checkpoint. Parameters are `lora.join(base, trained)`."""

    base: Params  # {} where all weights are trained
    # the reference's part beside the base: all of it, or {} where it is the base; None: kl.coef is 0
    reference: Params | None


@pytree
class TrainState:
    policy: Learner
    critic: Learner | None
    kl_coef: Float32[Leaf, ""]

"""The architecture of a model, from its config.json, and how it is executed."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from medrlvr_jax.config.schema import LoRAConfig


class RopeScaling(NamedTuple):
    """Divides rotary frequencies by `factor`, so that rows can be longer than in pretraining: all frequencies
    (`linear`), or with all four numbers only the low ones (`llama3`).
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_length: int | None = None


class Window(NamedTuple):
    """The layers in which a token attends only to itself and to the `size` − 1 tokens before it."""

    size: int
    layers: tuple[int, ...]  # their numbers
    rope_theta: float  # their rotary base; their frequencies are not scaled


@dataclass(frozen=True)
class Execution:
    """How an architecture is computed. The run and the device decide it."""

    dtype: Any = jnp.float32  # of products; sums, norms and softmaxes are float32
    remat: str = "full"  # which results the backward pass computes again (`decoder.REMAT`)
    splash: bool = False  # attention by the TPU's kernel (splash.py)
    unroll: bool = True  # whether decoding unrolls the layers (`decode.Weights`)
    narrow: bool = True  # whether sampling drops rows that have stopped (loops.py)
    value_head: bool = False  # True for a critic: one value per token in place of logits
    lora: LoRAConfig | None = None  # adapters beside the matrices: `<name>_a` and `<name>_b`
    int8: bool = False  # int8 matrices with a `<name>_scale` for each output channel (`decoder.quantize`)
    # The trained part of the vision tower. With freeze, the tower is not in the parameter tree.
    tower: Literal["freeze", "merger", "train"] = "freeze"


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower, from `vision_config` in config.json and from preprocessor_config.json."""

    kind: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    layers: int
    embed: int
    heads: int
    ffn: int
    out: int  # the decoder's width
    image_token: int  # the token of the vocabulary at which a prompt holds image features
    image_start: int
    image_end: int
    patch: int = 14  # side of a patch in pixels
    merge: int = 2  # side of an image token in patches
    frames: int = 2  # a still image is repeated as this many frames
    window: int = 8  # side of a window in patches
    full_layers: tuple[int, ...] = ()  # layers that attend within the whole image
    positions: int = 0  # side of the square table of learned positions; 0 if there is none
    # Layers whose output is merged to further features, which the decoder adds after its first layers.
    deepstack: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = 56 * 56  # smaller images are scaled up
    max_pixels: int = 28 * 28 * 1280  # larger images are scaled down

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def features(self) -> int:
        """The size of an image token: `out` for the embedding and `out` for each layer of `deepstack`."""
        return self.out * (1 + len(self.deepstack))

    @property
    def factor(self) -> int:
        """The side of an image token in pixels."""
        return self.patch * self.merge

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of logical axes. `square` is the patches of an image token, `merged` their joined states."""
        of_patch = {"channels": 3, "frames": self.frames, "rows": self.patch, "columns": self.patch}
        of_layer = {"embed": self.embed, "width": self.embed, "three": 3, "heads": self.heads}
        merged = self.merge**2 * self.embed
        merger = {"square": self.merge**2, "merged": merged, "merged_width": merged, "out": self.out}
        tables = {"head_dim": self.head_dim, "ffn": self.ffn, "places": self.positions**2}
        return of_patch | of_layer | merger | tables


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder, from config.json, and how it is executed."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float
    norm_eps: float
    tied: bool  # whether the output matrix is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # whether a norm is applied to the outputs of attention and MLP
    norm_offset: float = 0.0  # added to the weight of every norm
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"  # of the MLP's gate
    scaled_embedding: bool = False  # whether rows of the embedding are multiplied by √embed
    query_size: float | None = None  # attention scores are divided by its square root; None: by √head_dim
    rope_scaling: RopeScaling | None = None
    window: Window | None = None  # None: in all layers a token attends to all tokens before it
    max_positions: int | None = None  # the longest row that the model was made for; None if not known
    rope_axes: tuple[int, ...] | None = None  # with images: see `rope.rope_axes`
    vision: VisionConfig | None = None  # None for text models
    # Prefixes of tensor names that differ in published files: (this library's, the files').
    file_prefixes: tuple[tuple[str, str], ...] = ()
    # Prefixes of tensors that are not read, such as those of a vision tower. An export copies them.
    unread: tuple[str, ...] = ()
    execution: Execution = Execution()

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of logical axes. `width` is `embed` in parameters that are too small to be sharded."""
        lora = self.execution.lora
        names = ("vocab", "embed", "heads", "kv_heads", "head_dim", "ffn")
        also = {"width": self.embed, "width+1": self.embed + 1, "rank": lora.rank if lora else 0}
        return {name: getattr(self, name) for name in names} | also

    def run_with(self, **changes: Any) -> "DecoderConfig":
        """Return the same architecture with other fields of `Execution`."""
        return replace(self, execution=replace(self.execution, **changes))


Architecture = DecoderConfig | VisionConfig

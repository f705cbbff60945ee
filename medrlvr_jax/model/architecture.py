"""What a model is, as its config.json says with our names, and how it is executed."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from medrlvr_jax.config.schema import LoRAConfig


class RopeScaling(NamedTuple):
    """Division of the rotary frequencies by `factor`, for rows longer than those of pretraining: of all
    frequencies (`linear`), or of the low ones alone (Llama 3, with all four numbers).
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_length: int | None = None


class Window(NamedTuple):
    """Layers in which a token attends only to itself and to the `size` − 1 tokens before it."""

    size: int
    layers: tuple[int, ...]  # their numbers
    rope_theta: float  # their rotary base; their frequencies are not scaled


@dataclass(frozen=True)
class Execution:
    """How an architecture is computed: the run and the device choose it; most of it is in no checkpoint."""

    dtype: Any = jnp.float32  # of products; sums, norms and softmaxes are float32
    remat: str = "full"  # what the backward pass computes again: see `decoder.REMAT`
    splash: bool = False  # attention by the TPU's kernel: see splash.py
    unroll: bool = True  # decoding: see `decode.decode_step`
    narrow: bool = True  # sampling: rows that have stopped make room, see loops.py
    value_head: bool = False  # a critic: one number per token in place of the vocabulary
    lora: LoRAConfig | None = None  # adapters beside the matrices: `<name>_a` and `<name>_b`
    int8: bool = False  # int8 matrices, each output channel scaled by `<name>_scale`: see `decoder.quantize`
    # What of the vision tower is trained. freeze: nothing, and the parameter tree does not hold the tower.
    tower: Literal["freeze", "merger", "train"] = "freeze"


@dataclass(frozen=True)
class VisionConfig:
    """A tower as `vision_config` in config.json and preprocessor_config.json give it, with our names."""

    kind: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    layers: int
    embed: int
    heads: int
    ffn: int
    out: int  # the decoder's width
    image_token: int  # the token that stands in the prompt for each image token
    image_start: int
    image_end: int
    patch: int = 14  # pixels of a patch's side
    merge: int = 2  # patches of an image token's side
    frames: int = 2  # a still image is seen as this many equal frames
    window: int = 8  # patches of a window's side
    full_layers: tuple[int, ...] = ()  # layers that attend within the image
    positions: int = 0  # the side of the square table of learned positions; 0: there is none
    # Layers after which image tokens are taken as well: the decoder adds them after its first layers.
    deepstack: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, from 0 to 1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = 56 * 56  # smaller images are enlarged
    max_pixels: int = 28 * 28 * 1280  # larger images are reduced

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def features(self) -> int:
        """Numbers of an image token: `out` for the embedding, and `out` for each of `deepstack`."""
        return self.out * (1 + len(self.deepstack))

    @property
    def factor(self) -> int:
        """Pixels of an image token's side."""
        return self.patch * self.merge

    @property
    def sizes(self) -> dict[str, int]:
        """Logical axis → size. `square`: the patches of an image token; `merged`: their states, joined."""
        of_patch = {"channels": 3, "frames": self.frames, "rows": self.patch, "columns": self.patch}
        of_layer = {"embed": self.embed, "width": self.embed, "three": 3, "heads": self.heads}
        merged = self.merge**2 * self.embed
        merger = {"square": self.merge**2, "merged": merged, "merged_width": merged, "out": self.out}
        tables = {"head_dim": self.head_dim, "ffn": self.ffn, "places": self.positions**2}
        return of_patch | of_layer | merger | tables


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture as config.json gives it, with our names; and how it is executed."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the output matrix is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # attention and MLP end with a norm, before they are added to the states
    norm_offset: float = 0.0  # a norm multiplies by its weights plus this
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"  # of the MLP's gate
    scaled_embedding: bool = False  # the first states are the embedding's rows · √embed
    query_size: float | None = None  # attention scores are divided by its square root; None: by √head_dim
    rope_scaling: RopeScaling | None = None
    window: Window | None = None  # None: a token attends to all tokens before it, in all layers
    max_positions: int | None = None  # the longest row that the model was made for; None: not known
    # With images: the position that each rotary frequency follows: in time (0), by row (1), by column (2).
    rope_axes: tuple[int, ...] | None = None
    vision: VisionConfig | None = None  # None: the model sees no images
    # (our prefix, the prefix in published files) of tensor names
    file_prefixes: tuple[tuple[str, str], ...] = ()
    # Prefixes of tensors of parts that are not computed, such as a vision tower. An export copies them.
    unread: tuple[str, ...] = ()
    execution: Execution = Execution()

    @property
    def sizes(self) -> dict[str, int]:
        """Logical axis → size. `width` is `embed` in what is too small to be sharded."""
        lora = self.execution.lora
        names = ("vocab", "embed", "heads", "kv_heads", "head_dim", "ffn")
        also = {"width": self.embed, "width+1": self.embed + 1, "rank": lora.rank if lora else 0}
        return {name: getattr(self, name) for name in names} | also

    def run_with(self, **changes: Any) -> "DecoderConfig":
        """The same architecture with other fields of `Execution`."""
        return replace(self, execution=replace(self.execution, **changes))


Architecture = DecoderConfig | VisionConfig

"""The decoder's architecture, how it is executed, and the one table of its parameters.

A row of `PARAMETERS` holds all that the library knows of a parameter: shape and logical axes, which axes are
its input, start value, name in a Hugging Face file, which models have it. Initialisation, shardings, loading
and export, LoRA, weight decay, Muon and the sampler's copy read this table. A new parameter is one new row.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from medrlvr_jax.config.schema import LoRAConfig
from medrlvr_jax.types import Array, Params


class RopeScaling(NamedTuple):
    """Llama 3's stretching of the low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


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
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None  # the longest row that the model was made for; None: not known
    # With images: the position that each rotary frequency follows: in time (0), by row (1), by column (2).
    rope_axes: tuple[int, ...] | None = None
    vision: VisionConfig | None = None  # None: the model sees no images
    execution: Execution = Execution()

    def run_with(self, **changes: Any) -> "DecoderConfig":
        """The same architecture with other fields of `Execution`."""
        return replace(self, execution=replace(self.execution, **changes))


Kind = Literal["table", "matrix", "adapter", "scale", "norm", "bias", "value"]


class Parameter(NamedTuple):
    """One row of the table. Those of all layers are stacked along a leading axis `layers`, left out here."""

    kind: Kind
    axes: str  # logical axes: `sizes` gives their sizes, sharding.py their mesh axes
    inputs: str = ""  # those that a product with it sums over
    start: Literal["zeros", "ones", "normal", "residual"] = "zeros"  # see `initializer`
    tensor: str = ""  # its name in a Hugging Face file; for a layer's, what follows "model.layers.{i}."
    tensor_axes: str = ""  # the tensor's axes, as einops writes them: "(heads head_dim) embed" is a matrix
    stacked: bool = True  # each layer has one
    exists: Callable[[Any], Any] = lambda cfg: True  # of a configuration

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.kind not in ("norm", "bias", "value")

    @property
    def trained_with_lora(self) -> bool:
        """Whether it is trained where `model.lora` is set. All other parameters are frozen then."""
        return self.kind in ("adapter", "value")

    @property
    def keeps_dtype(self) -> bool:
        """Whether the sampler keeps its dtype: vectors that are applied in float32."""
        return self.kind in ("norm", "bias", "scale")

    @property
    def tensor_groups(self) -> list[list[str]]:
        """The tensor's axes, each as those that it joins: [["heads", "head_dim"], ["embed"]]."""
        groups = re.findall(r"\((.*?)\)|(\S+)", self.tensor_axes)
        return [(joined or single).split() for joined, single in groups]

    def shape(self, cfg: DecoderConfig) -> tuple[int, ...]:
        """One layer's shape."""
        size = sizes(cfg)
        return tuple(size[axis] for axis in self.axes.split())

    def initializer(self, cfg: DecoderConfig) -> Any:
        """`normal` has standard deviation inputs^-½, so that a product keeps its input's size. `residual`,
        for the matrices that end a residual branch, divides it by √(2·layers) (GPT-2).
        """
        if self.start in ("zeros", "ones"):
            return nn.initializers.zeros_init() if self.start == "zeros" else nn.initializers.ones_init()
        size = sizes(cfg)
        deviation = prod(size[axis] for axis in self.inputs.split()) ** -0.5
        scale = (2 * cfg.layers) ** -0.5 if self.start == "residual" else 1.0
        return nn.initializers.normal(scale * deviation)


def sizes(cfg: DecoderConfig) -> dict[str, int]:
    """Logical axis → size. `width` is `embed` in what is too small to be sharded."""
    lora = cfg.execution.lora
    names = ("vocab", "embed", "heads", "kv_heads", "head_dim", "ffn")
    also = {"width": cfg.embed, "width+1": cfg.embed + 1, "rank": lora.rank if lora else 0}
    return {name: getattr(cfg, name) for name in names} | also


def _with_companions(**rows: Parameter) -> dict[str, Parameter]:
    """The rows; after each layer's matrix, the scale of its int8 form and its adapter's factors A and B."""
    out: dict[str, Parameter] = {}
    for name, row in rows.items():
        out[name] = row
        if row.kind == "matrix":
            outputs, adapted = row.axes.removeprefix(row.inputs).strip(), partial(_adapts, name)
            out[f"{name}_scale"] = Parameter("scale", outputs, start="ones", exists=_quantized)
            factor_a = Parameter("adapter", f"{row.inputs} rank", row.inputs, "normal", exists=adapted)
            factor_b = Parameter("adapter", f"rank {outputs}", "rank", "zeros", exists=adapted)
            out |= {f"{name}_a": factor_a, f"{name}_b": factor_b}
    return out


def _adapts(name: str, cfg: DecoderConfig) -> bool:
    return cfg.execution.lora is not None and name in cfg.execution.lora.targets


def _table(axes: str, module: str, **more: Any) -> Parameter:
    return Parameter("table", axes, "embed", "normal", f"{module}.weight", "vocab embed", False, **more)


def _norm(axis: str, module: str, **more: Any) -> Parameter:
    return Parameter("norm", axis, "", "ones", f"{module}.weight", axis, **more)


def _bias(axes: str, module: str) -> Parameter:
    return Parameter("bias", axes, "", "zeros", f"{module}.bias", f"({axes})", exists=_has_qkv_bias)


def _matrix(axes: str, inputs: str, module: str, tensor_axes: str, start: Any = "normal") -> Parameter:
    return Parameter("matrix", axes, inputs, start, f"{module}.weight", tensor_axes)


_quantized = lambda cfg: cfg.execution.int8
_has_value = lambda cfg: cfg.execution.value_head
_has_head = lambda cfg: not (cfg.tied or cfg.execution.value_head)
_has_qk_norm = lambda cfg: cfg.qk_norm
_has_qkv_bias = lambda cfg: cfg.qkv_bias
# Start values depend on the order of the rows: see `init`. A new row goes to the end.
PARAMETERS = _with_companions(
    embed=_table("vocab embed", "model.embed_tokens"),
    value=Parameter("value", "width+1", stacked=False, exists=_has_value),
    head=_table("embed vocab", "lm_head", exists=_has_head),
    norm=_norm("width", "model.norm", stacked=False),
    attn_norm=_norm("width", "input_layernorm"),
    q=_matrix("embed heads head_dim", "embed", "self_attn.q_proj", "(heads head_dim) embed"),
    k=_matrix("embed kv_heads head_dim", "embed", "self_attn.k_proj", "(kv_heads head_dim) embed"),
    v=_matrix("embed kv_heads head_dim", "embed", "self_attn.v_proj", "(kv_heads head_dim) embed"),
    o=_matrix(
        "heads head_dim embed", "heads head_dim", "self_attn.o_proj", "embed (heads head_dim)", "residual"
    ),
    q_bias=_bias("heads head_dim", "self_attn.q_proj"),
    k_bias=_bias("kv_heads head_dim", "self_attn.k_proj"),
    v_bias=_bias("kv_heads head_dim", "self_attn.v_proj"),
    q_norm=_norm("head_dim", "self_attn.q_norm", exists=_has_qk_norm),
    k_norm=_norm("head_dim", "self_attn.k_norm", exists=_has_qk_norm),
    mlp_norm=_norm("width", "post_attention_layernorm"),
    gate=_matrix("embed ffn", "embed", "mlp.gate_proj", "ffn embed"),
    up=_matrix("embed ffn", "embed", "mlp.up_proj", "ffn embed"),
    down=_matrix("ffn embed", "ffn", "mlp.down_proj", "embed ffn", "residual"),
)
# → input axes
MATRICES = {name: len(row.inputs.split()) for name, row in PARAMETERS.items() if row.kind == "matrix"}


def path_of(name: str) -> tuple[str, ...]:
    """Where the parameter of a row lies in the tree."""
    return ("layers", name) if PARAMETERS[name].stacked else (name,)


def parameters(cfg: DecoderConfig) -> dict[tuple[str, ...], Parameter]:
    """The rows that a model has, by their paths in its parameter tree."""
    return {path_of(name): row for name, row in PARAMETERS.items() if row.exists(cfg)}


def abstract(cfg: DecoderConfig) -> Params:
    """The parameter tree: for each array its shape and logical axes, `nn.Partitioned(ShapeDtypeStruct)`."""

    def box(row: Parameter) -> nn.Partitioned:
        shape, axes = row.shape(cfg), tuple(row.axes.split())
        if row.stacked:
            shape, axes = (cfg.layers, *shape), ("layers", *axes)
        return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)

    return unflatten_dict({path: box(row) for path, row in parameters(cfg).items()})


def init(cfg: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters.

    A parameter's key is a hash of its number. The numbers are those that Flax Linen gave (it traced a layer
    twice and went on counting), so that a seed still gives the same weights.
    """
    rows, params = parameters(cfg), {}
    layer_keys = jax.random.split(key, cfg.layers)
    for stacked in (False, True):
        group = [path for path, row in rows.items() if row.stacked == stacked]
        for number, path in enumerate(group, 1 + stacked * len(group)):
            seed = hashlib.sha1(b"layers" * stacked + bytes([number])).digest()[:4]
            start = partial(_start, rows[path], cfg, int.from_bytes(seed, "big"))
            params[path] = jax.lax.map(start, layer_keys) if stacked else start(key)
    return unflatten_dict(params)


def _start(row: Parameter, cfg: DecoderConfig, seed: int, key: Array) -> Array:
    return row.initializer(cfg)(jax.random.fold_in(key, jnp.uint32(seed)), row.shape(cfg), jnp.float32)

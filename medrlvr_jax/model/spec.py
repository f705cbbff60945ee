"""The architecture of decoder and vision tower, how it is executed, and the one table of parameters of each.

A row of `PARAMETERS` (the decoder's) or `TOWER` holds all that the library knows of a parameter: shape and
logical axes, which axes are its input, start value, name in a Hugging Face file, which models have it.
Initialisation, shardings, loading and export, LoRA, weight decay, Muon and the sampler's copy read it. A new
parameter is one new row.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
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
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = None  # the longest row that the model was made for; None: not known
    # With images: the position that each rotary frequency follows: in time (0), by row (1), by column (2).
    rope_axes: tuple[int, ...] | None = None
    vision: VisionConfig | None = None  # None: the model sees no images
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

    def shape(self, cfg: Architecture) -> tuple[int, ...]:
        """One layer's shape."""
        size = cfg.sizes
        return tuple(size[axis] for axis in self.axes.split())

    def initializer(self, cfg: Architecture) -> Any:
        """`normal` has standard deviation inputs^-½, so that a product keeps its input's size. `residual`,
        for the matrices that end a residual branch, divides it by √(2·layers) (GPT-2).
        """
        if self.start in ("zeros", "ones"):
            return nn.initializers.zeros_init() if self.start == "zeros" else nn.initializers.ones_init()
        size = cfg.sizes
        deviation = prod(size[axis] for axis in self.inputs.split()) ** -0.5
        scale = (2 * cfg.layers) ** -0.5 if self.start == "residual" else 1.0
        return nn.initializers.normal(scale * deviation)


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


def _bias(axes: str, module: str, **more: Any) -> Parameter:
    return Parameter("bias", axes, "", "zeros", f"{module}.bias", f"({axes})", **more)


def _matrix(
    axes: str, inputs: str, module: str, tensor_axes: str, start: Any = "normal", **more: Any
) -> Parameter:
    return Parameter("matrix", axes, inputs, start, f"{module}.weight", tensor_axes, **more)


_quantized = lambda cfg: cfg.execution.int8
_has_value = lambda cfg: cfg.execution.value_head
_has_head = lambda cfg: not (cfg.tied or cfg.execution.value_head)
_has_bias = lambda cfg: cfg.qkv_bias
_has_qk_norm = lambda cfg: cfg.qk_norm
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
    q_bias=_bias("heads head_dim", "self_attn.q_proj", exists=_has_bias),
    k_bias=_bias("kv_heads head_dim", "self_attn.k_proj", exists=_has_bias),
    v_bias=_bias("kv_heads head_dim", "self_attn.v_proj", exists=_has_bias),
    q_norm=_norm("head_dim", "self_attn.q_norm", exists=_has_qk_norm),
    k_norm=_norm("head_dim", "self_attn.k_norm", exists=_has_qk_norm),
    mlp_norm=_norm("width", "post_attention_layernorm"),
    gate=_matrix("embed ffn", "embed", "mlp.gate_proj", "ffn embed"),
    up=_matrix("embed ffn", "embed", "mlp.up_proj", "ffn embed"),
    down=_matrix("ffn embed", "ffn", "mlp.down_proj", "embed ffn", "residual"),
)
# → input axes
MATRICES = {name: len(row.inputs.split()) for name, row in PARAMETERS.items() if row.kind == "matrix"}


_swiglu = lambda cfg: cfg.kind == "qwen2_5_vl"  # with RMSNorm; the others have LayerNorm and two matrices
_biased = lambda cfg: cfg.kind != "qwen2_5_vl"
_positions = lambda cfg: cfg.positions > 0
_deep = lambda cfg: len(cfg.deepstack) > 0
# The vision tower's. What begins with deep_ is stacked over Qwen3-VL's further mergers. weights.py has what
# stands before a tensor's name.
TOWER = {
    "patch": _matrix(
        "channels frames rows columns embed",
        "channels frames rows columns",
        "patch_embed.proj",
        "embed channels frames rows columns",
        stacked=False,
    ),
    "patch_bias": _bias("width", "patch_embed.proj", stacked=False, exists=_positions),
    "positions": Parameter(
        "table", "places width", "width", "normal", "pos_embed.weight", "places width", False, _positions
    ),
    "merge_norm": _norm("width", "merger.ln_q", stacked=False),
    "merge_norm_bias": _bias("width", "merger.ln_q", stacked=False, exists=_biased),
    "merge_in": _matrix(
        "square embed merged", "square embed", "merger.mlp.0", "merged (square embed)", stacked=False
    ),
    "merge_in_bias": _bias("merged", "merger.mlp.0", stacked=False),
    "merge_out": _matrix("merged out", "merged", "merger.mlp.2", "out merged", stacked=False),
    "merge_out_bias": _bias("out", "merger.mlp.2", stacked=False),
    "attn_norm": _norm("width", "norm1"),
    "attn_norm_bias": _bias("width", "norm1", exists=_biased),
    "qkv": _matrix("embed three heads head_dim", "embed", "attn.qkv", "(three heads head_dim) embed"),
    "qkv_bias": _bias("three heads head_dim", "attn.qkv"),
    "o": _matrix("heads head_dim embed", "heads head_dim", "attn.proj", "embed (heads head_dim)", "residual"),
    "o_bias": _bias("width", "attn.proj"),
    "mlp_norm": _norm("width", "norm2"),
    "mlp_norm_bias": _bias("width", "norm2", exists=_biased),
    "gate": _matrix("embed ffn", "embed", "mlp.gate_proj", "ffn embed", exists=_swiglu),
    "gate_bias": _bias("ffn", "mlp.gate_proj", exists=_swiglu),
    "up": _matrix("embed ffn", "embed", "mlp.up_proj", "ffn embed", exists=_swiglu),
    "up_bias": _bias("ffn", "mlp.up_proj", exists=_swiglu),
    "down": _matrix("ffn embed", "ffn", "mlp.down_proj", "embed ffn", "residual", exists=_swiglu),
    "down_bias": _bias("width", "mlp.down_proj", exists=_swiglu),
    "fc1": _matrix("embed ffn", "embed", "mlp.fc1", "ffn embed", exists=_biased),
    "fc1_bias": _bias("ffn", "mlp.fc1", exists=_biased),
    "fc2": _matrix("ffn embed", "ffn", "mlp.fc2", "embed ffn", "residual", exists=_biased),
    "fc2_bias": _bias("width", "mlp.fc2", exists=_biased),
    "deep_norm": _norm("merged_width", "norm", exists=_deep),
    "deep_norm_bias": _bias("merged_width", "norm", exists=_deep),
    "deep_in": _matrix(
        "square embed merged", "square embed", "linear_fc1", "merged (square embed)", exists=_deep
    ),
    "deep_in_bias": _bias("merged", "linear_fc1", exists=_deep),
    "deep_out": _matrix("merged out", "merged", "linear_fc2", "out merged", exists=_deep),
    "deep_out_bias": _bias("out", "linear_fc2", exists=_deep),
}
# What Qwen3-VL's files call otherwise.
RENAMED = {"ln_q.": "norm.", "mlp.0.": "linear_fc1.", "mlp.2.": "linear_fc2.", ".fc": ".linear_fc"}
VISION = "vision"  # where the tower lies in the tree of a model


def row_of(path: tuple[str, ...]) -> Parameter:
    """The row of the parameter at a path of the tree."""
    return (TOWER if path[0] == VISION else PARAMETERS)[path[-1]]


def is_trained(path: tuple[str, ...], cfg: DecoderConfig) -> bool:
    """Whether a run trains the parameter: of the decoder all, or with LoRA the adapters; of the tower what
    `Execution.tower` says.
    """
    if path[0] == VISION:
        return cfg.execution.tower == "train" or path[-1].startswith(("merge", "deep"))
    return cfg.execution.lora is None or row_of(path).trained_with_lora


def parameters(cfg: DecoderConfig) -> dict[tuple[str, ...], Parameter]:
    """The rows that a model has, by their paths in its parameter tree, with a tower only if it is trained."""
    rows = _rows(PARAMETERS, cfg)
    if cfg.vision and cfg.execution.tower != "freeze":
        rows |= {(VISION, *path): row for path, row in _rows(TOWER, cfg.vision).items()}
    return rows


def path_of(name: str, row: Parameter) -> tuple[str, ...]:
    """Where the parameter of a row lies in the tree of decoder or tower."""
    return ("deepstack" if name.startswith("deep_") else "layers", name) if row.stacked else (name,)


def _rows(table: dict[str, Parameter], cfg: Architecture) -> dict[tuple[str, ...], Parameter]:
    """A table's rows by path, with tensors' names of the family's files."""
    rows = {path_of(name, row): row for name, row in table.items() if row.exists(cfg)}
    if not (isinstance(cfg, VisionConfig) and cfg.kind == "qwen3_vl"):
        return rows
    renamed = lambda tensor: reduce(lambda name, pair: name.replace(*pair), RENAMED.items(), tensor)
    return {path: row._replace(tensor=renamed(row.tensor)) for path, row in rows.items()}


def _depth(path: tuple[str, ...], cfg: Architecture) -> int:
    """How many a stacked parameter holds."""
    if isinstance(cfg, VisionConfig) and path[-2] == "deepstack":
        return len(cfg.deepstack)
    return cfg.layers


def abstract(cfg: DecoderConfig) -> Params:
    """The parameter tree: for each array its shape and logical axes, `nn.Partitioned(ShapeDtypeStruct)`."""

    def box(path: tuple[str, ...], row: Parameter) -> nn.Partitioned:
        of = cfg.vision if path[0] == VISION and cfg.vision else cfg
        shape, axes = row.shape(of), tuple(row.axes.split())
        if row.stacked:
            shape, axes = (_depth(path, of), *shape), ("layers", *axes)
        return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)

    return unflatten_dict({path: box(path, row) for path, row in parameters(cfg).items()})


def init(cfg: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters.

    A parameter's key is a hash of its number. The numbers are those that Flax Linen gave (it traced a layer
    twice and went on counting), so that a seed still gives the same weights.
    """
    params = _init(PARAMETERS, cfg, key)
    if cfg.vision and cfg.execution.tower != "freeze":
        params[VISION] = _init(TOWER, cfg.vision, jax.random.fold_in(key, 2**31))
    return params


def _init(table: dict[str, Parameter], cfg: Architecture, key: Array) -> Params:
    rows, params = _rows(table, cfg), {}
    for stacked in (False, True):
        group = [path for path, row in rows.items() if row.stacked == stacked]
        for number, path in enumerate(group, 1 + stacked * len(group)):
            seed = hashlib.sha1(b"layers" * stacked + bytes([number])).digest()[:4]
            start = partial(_start, rows[path], cfg, int.from_bytes(seed, "big"))
            each = jax.random.split(key, _depth(path, cfg)) if stacked else None
            params[path] = start(key) if each is None else jax.lax.map(start, each)
    return unflatten_dict(params)


def _start(row: Parameter, cfg: Architecture, seed: int, key: Array) -> Array:
    return row.initializer(cfg)(jax.random.fold_in(key, jnp.uint32(seed)), row.shape(cfg), jnp.float32)

"""The table of all parameters of the decoder and the vision tower.

A row of `PARAMETERS` (decoder) or `TOWER` holds everything that the library knows about a parameter: shape
and logical axes, which of them are inputs, the initial value, the name in Hugging Face files, and which
models have it. Initialisation, shardings, loading, export, LoRA, weight decay, Muon and the sampler's copy
read it. A new parameter needs one new row.
"""

import hashlib
import re
from collections.abc import Callable
from functools import partial, reduce
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from medrlvr_jax.model.architecture import Architecture, DecoderConfig, VisionConfig
from medrlvr_jax.types import Array, Params

Kind = Literal["table", "matrix", "adapter", "scale", "norm", "bias", "value"]


class Parameter(NamedTuple):
    """One row of the table. Layers are stacked along a leading axis `layers`, which a row does not name."""

    kind: Kind
    axes: str  # logical axes: `sizes` gives their sizes, sharding.py their mesh axes
    inputs: str = ""  # the axes that a product sums over
    start: Literal["zeros", "ones", "normal", "residual"] = "zeros"  # see `_start`
    tensor: str = ""  # the name in Hugging Face files, with {} for the layer's number
    tensor_axes: str = ""  # the tensor's axes in the notation of einops: "(heads head_dim) embed" is a matrix
    stacked: bool = True  # whether each layer has one
    exists: Callable[[Any], Any] = lambda cfg: True  # whether a configuration has it

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.kind not in ("norm", "bias", "value")

    @property
    def trained_with_lora(self) -> bool:
        """Whether it is trained if `model.lora` is set. All other parameters are frozen then."""
        return self.kind in ("adapter", "value")

    @property
    def keeps_dtype(self) -> bool:
        """Whether the sampler keeps its dtype, because it is applied in float32."""
        return self.kind in ("norm", "bias", "scale")

    @property
    def outputs(self) -> str:
        """The axes that a product does not sum over."""
        return self.axes.removeprefix(self.inputs).strip()

    @property
    def tensor_groups(self) -> list[list[str]]:
        """For each axis of the tensor, the axes that it joins: [["heads", "head_dim"], ["embed"]]."""
        groups = re.findall(r"\((.*?)\)|(\S+)", self.tensor_axes)
        return [(joined or single).split() for joined, single in groups]


def _table(axes: str, tensor: str, **more: Any) -> Parameter:
    return Parameter("table", axes, "embed", "normal", tensor, "vocab embed", False, **more)


def _norm(axis: str, module: str, **more: Any) -> Parameter:
    return Parameter("norm", axis, "", "ones", f"{module}.weight", axis, "{}" in module, **more)


def _bias(axes: str, module: str, **more: Any) -> Parameter:
    return Parameter("bias", axes, "", "zeros", f"{module}.bias", f"({axes})", "{}" in module, **more)


def _matrix(inputs: str, outputs: str, module: str, start: Any = "normal", **more: Any) -> Parameter:
    """Return the row of a linear layer. Its tensor has the outputs first."""
    axes, tensor_axes = f"{inputs} {outputs}", f"({outputs}) ({inputs})"
    return Parameter("matrix", axes, inputs, start, f"{module}.weight", tensor_axes, "{}" in module, **more)


def _with_companions(**rows: Parameter) -> dict[str, Parameter]:
    """Add three rows after each matrix: the scale of its int8 form and its adapter's factors A and B."""
    out: dict[str, Parameter] = {}
    for name, row in rows.items():
        out[name] = row
        if row.kind == "matrix":
            adapted = partial(_adapts, name)
            out[f"{name}_scale"] = Parameter("scale", row.outputs, start="ones", exists=_quantized)
            factor_a = Parameter("adapter", f"{row.inputs} rank", row.inputs, "normal", exists=adapted)
            factor_b = Parameter("adapter", f"rank {row.outputs}", "rank", "zeros", exists=adapted)
            out |= {f"{name}_a": factor_a, f"{name}_b": factor_b}
    return out


def _adapts(name: str, cfg: DecoderConfig) -> bool:
    return cfg.execution.lora is not None and name in cfg.execution.lora.targets


def _with_biases(**rows: Parameter) -> dict[str, Parameter]:
    """Add the row of the bias after each matrix and norm."""
    out: dict[str, Parameter] = {}
    for name, row in rows.items():
        out[name] = row
        if row.kind in ("matrix", "norm"):
            axes, module = row.outputs.replace("embed", "width"), row.tensor.removesuffix(".weight")
            out[f"{name}_bias"] = _bias(axes, module, exists=partial(_is_biased, row))
    return out


def _is_biased(row: Parameter, cfg: VisionConfig) -> bool:
    return row.exists(cfg) and (row.kind == "matrix" or _layer_norm(cfg))


LAYER = "model.layers.{}"
_quantized = lambda cfg: cfg.execution.int8
_has_value = lambda cfg: cfg.execution.value_head
_has_head = lambda cfg: not (cfg.tied or cfg.execution.value_head)
_has_bias = lambda cfg: cfg.qkv_bias
_has_qk_norm = lambda cfg: cfg.qk_norm
_has_post_norms = lambda cfg: cfg.post_norms
# Initial values depend on the order of the rows (see `init`), so new rows are added at the end.
PARAMETERS = _with_companions(
    embed=_table("vocab embed", "model.embed_tokens.weight"),
    value=Parameter("value", "width+1", stacked=False, exists=_has_value),
    head=_table("embed vocab", "lm_head.weight", exists=_has_head),
    norm=_norm("width", "model.norm"),
    attn_norm=_norm("width", f"{LAYER}.input_layernorm"),
    q=_matrix("embed", "heads head_dim", f"{LAYER}.self_attn.q_proj"),
    k=_matrix("embed", "kv_heads head_dim", f"{LAYER}.self_attn.k_proj"),
    v=_matrix("embed", "kv_heads head_dim", f"{LAYER}.self_attn.v_proj"),
    o=_matrix("heads head_dim", "embed", f"{LAYER}.self_attn.o_proj", "residual"),
    q_bias=_bias("heads head_dim", f"{LAYER}.self_attn.q_proj", exists=_has_bias),
    k_bias=_bias("kv_heads head_dim", f"{LAYER}.self_attn.k_proj", exists=_has_bias),
    v_bias=_bias("kv_heads head_dim", f"{LAYER}.self_attn.v_proj", exists=_has_bias),
    q_norm=_norm("head_dim", f"{LAYER}.self_attn.q_norm", exists=_has_qk_norm),
    k_norm=_norm("head_dim", f"{LAYER}.self_attn.k_norm", exists=_has_qk_norm),
    mlp_norm=_norm("width", f"{LAYER}.pre_feedforward_layernorm"),
    gate=_matrix("embed", "ffn", f"{LAYER}.mlp.gate_proj"),
    up=_matrix("embed", "ffn", f"{LAYER}.mlp.up_proj"),
    down=_matrix("ffn", "embed", f"{LAYER}.mlp.down_proj", "residual"),
    attn_post_norm=_norm("width", f"{LAYER}.post_attention_layernorm", exists=_has_post_norms),
    mlp_post_norm=_norm("width", f"{LAYER}.post_feedforward_layernorm", exists=_has_post_norms),
)
# Tensor names that differ in models without post-norms.
NO_POST_NORMS = {"pre_feedforward_layernorm": "post_attention_layernorm"}
# The number of input axes of each matrix.
MATRICES = {name: len(row.inputs.split()) for name, row in PARAMETERS.items() if row.kind == "matrix"}


MERGER, BLOCK, DEEP = "visual.merger", "visual.blocks.{}", "visual.deepstack_merger_list.{}"
_swiglu = lambda cfg: cfg.kind == "qwen2_5_vl"  # and RMSNorm; other towers have LayerNorm and two matrices
_layer_norm = lambda cfg: not _swiglu(cfg)
_positions = lambda cfg: cfg.positions > 0
_deep = lambda cfg: len(cfg.deepstack) > 0
# Parameters of the vision tower. Those that begin with deep_ are stacked over Qwen3-VL's further mergers.
TOWER = _with_biases(
    patch=_matrix("channels frames rows columns", "embed", "visual.patch_embed.proj"),
    positions=Parameter(
        "table",
        "places width",
        "width",
        "normal",
        "visual.pos_embed.weight",
        "places width",
        False,
        _positions,
    ),
    merge_norm=_norm("width", f"{MERGER}.ln_q"),
    merge_in=_matrix("square embed", "merged", f"{MERGER}.mlp.0"),
    merge_out=_matrix("merged", "out", f"{MERGER}.mlp.2"),
    attn_norm=_norm("width", f"{BLOCK}.norm1"),
    qkv=_matrix("embed", "three heads head_dim", f"{BLOCK}.attn.qkv"),
    o=_matrix("heads head_dim", "embed", f"{BLOCK}.attn.proj", "residual"),
    mlp_norm=_norm("width", f"{BLOCK}.norm2"),
    gate=_matrix("embed", "ffn", f"{BLOCK}.mlp.gate_proj", exists=_swiglu),
    up=_matrix("embed", "ffn", f"{BLOCK}.mlp.up_proj", exists=_swiglu),
    down=_matrix("ffn", "embed", f"{BLOCK}.mlp.down_proj", "residual", exists=_swiglu),
    fc1=_matrix("embed", "ffn", f"{BLOCK}.mlp.fc1", exists=_layer_norm),
    fc2=_matrix("ffn", "embed", f"{BLOCK}.mlp.fc2", "residual", exists=_layer_norm),
    deep_norm=_norm("merged_width", f"{DEEP}.norm", exists=_deep),
    deep_in=_matrix("square embed", "merged", f"{DEEP}.linear_fc1", exists=_deep),
    deep_out=_matrix("merged", "out", f"{DEEP}.linear_fc2", exists=_deep),
)
# The tensor of this convolution joins no axes, and only Qwen3-VL has its bias.
TOWER["patch"] = TOWER["patch"]._replace(tensor_axes="embed channels frames rows columns")
TOWER["patch_bias"] = TOWER["patch_bias"]._replace(exists=_positions)
# Tensor names that differ in Qwen3-VL.
QWEN3_VL = {"ln_q.": "norm.", "mlp.0.": "linear_fc1.", "mlp.2.": "linear_fc2.", ".fc": ".linear_fc"}
VISION = "vision"  # the key of the tower in a model's tree


def row_of(path: tuple[str, ...]) -> Parameter:
    """Return the row of the parameter at a path of the tree."""
    return (TOWER if path[0] == VISION else PARAMETERS)[path[-1]]


def is_trained(path: tuple[str, ...], cfg: DecoderConfig) -> bool:
    """Return whether a run trains the parameter. `Execution.lora` and `Execution.tower` decide it."""
    if path[0] == VISION:
        return cfg.execution.tower == "train" or path[-1].startswith(("merge", "deep"))
    return cfg.execution.lora is None or row_of(path).trained_with_lora


def parameters(cfg: DecoderConfig) -> dict[tuple[str, ...], Parameter]:
    """Return a model's rows by path in its parameter tree, which has the tower only if it is trained."""
    rows = _rows(PARAMETERS, cfg)
    if cfg.vision and cfg.execution.tower != "freeze":
        rows |= {(VISION, *path): row for path, row in _rows(TOWER, cfg.vision).items()}
    return rows


def path_of(name: str, row: Parameter) -> tuple[str, ...]:
    """Return the path of a row's parameter in the tree of decoder or tower."""
    return ("deepstack" if name.startswith("deep_") else "layers", name) if row.stacked else (name,)


def _rows(table: dict[str, Parameter], cfg: Architecture) -> dict[tuple[str, ...], Parameter]:
    """Return a table's rows by path, with the tensor names of the family's files."""
    rows = {path_of(name, row): row for name, row in table.items() if row.exists(cfg)}
    if isinstance(cfg, VisionConfig):
        renames = QWEN3_VL if cfg.kind == "qwen3_vl" else {}
    else:
        renames = {} if cfg.post_norms else NO_POST_NORMS
    renamed = lambda tensor: reduce(lambda name, pair: name.replace(*pair), renames.items(), tensor)
    return {path: row._replace(tensor=renamed(row.tensor)) for path, row in rows.items()}


def _depth(path: tuple[str, ...], cfg: Architecture) -> int:
    """Return the size of a stacked parameter's leading axis."""
    if isinstance(cfg, VisionConfig) and path[-2] == "deepstack":
        return len(cfg.deepstack)
    return cfg.layers


def _shape(row: Parameter, cfg: Architecture) -> tuple[int, ...]:
    return tuple(cfg.sizes[axis] for axis in row.axes.split())


def abstract(cfg: DecoderConfig) -> Params:
    """Return the parameter tree with `nn.Partitioned(ShapeDtypeStruct, logical axes)` for each array."""

    def box(path: tuple[str, ...], row: Parameter) -> nn.Partitioned:
        of = cfg.vision if path[0] == VISION and cfg.vision else cfg
        shape, axes = _shape(row, of), tuple(row.axes.split())
        if row.stacked:
            shape, axes = (_depth(path, of), *shape), ("layers", *axes)
        return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)

    return unflatten_dict({path: box(path, row) for path, row in parameters(cfg).items()})


def init(cfg: DecoderConfig, key: Array) -> Params:
    """Draw random float32 parameters.

    The key of a parameter is a hash of its number. The numbers equal those of Flax Linen, which counted
    layers twice, so that a seed still gives the weights that it gave with Linen.
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
    """Return one layer's initial values. The standard deviation of `normal` is inputs^-½, so that products
    have the magnitude of their inputs. `residual`, for matrices at the end of a residual branch, divides it
    by √(2·layers), as GPT-2 does.
    """
    shape, size = _shape(row, cfg), cfg.sizes
    if row.start in ("zeros", "ones"):
        offset = cfg.norm_offset if row.kind == "norm" and isinstance(cfg, DecoderConfig) else 0.0
        return jnp.full(shape, float(row.start == "ones") - offset)
    deviation = prod(size[axis] for axis in row.inputs.split()) ** -0.5
    scale = (2 * cfg.layers) ** -0.5 if row.start == "residual" else 1.0
    key = jax.random.fold_in(key, jnp.uint32(seed))
    return nn.initializers.normal(scale * deviation)(key, shape, jnp.float32)

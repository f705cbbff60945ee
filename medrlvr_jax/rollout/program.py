"""Programs that are not compiled yet: jitted functions with the shapes of their arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medrlvr_jax import sharding
from medrlvr_jax.build import Parts
from medrlvr_jax.config.schema import SampleConfig
from medrlvr_jax.rollout.generate import draw_settings, generate
from medrlvr_jax.rollout.sync import WeightSync, abstract_decode
from medrlvr_jax.types import Images, Prompts, Vision


class Program(NamedTuple):
    """A jitted function with its arguments as shapes."""

    name: str
    function: Any
    args: tuple
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    others: tuple = ()  # shapes of arrays that are in memory while it runs and are not its arguments
    calls: int = 1  # per step, if all rows have their full length; 0: it is only compiled


class Recorder:
    """Replaces jitted functions by stand-ins that are called with shapes (ShapeDtypeStructs with shardings).

    A call is recorded as a `Program`. The function is traced and not compiled, and the results are shapes.
    Their shardings are the function's `out_shardings` or, without these, by rows (`sharding.by_rows`), as all
    results of a rollout are.
    """

    def __init__(self, mesh: jax.sharding.Mesh, on_device: Any = ()):
        """`on_device`: trees of shapes that are in memory during every call."""
        self.programs: list[Program] = []
        self._mesh, self._on_device = mesh, jax.tree.leaves(on_device)

    def of(self, name: str, function: Any) -> Callable[..., Any]:
        """Return the stand-in for a function."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.add(Program(name, function, args, kwargs))
            return jax.tree.map(self._placed, function.trace(*args, **kwargs).out_info)

        return call

    def add(self, program: Program) -> None:
        """Record a program with what else is in memory."""
        arguments = {id(leaf) for leaf in jax.tree.leaves((program.args, program.kwargs))}
        others = tuple(leaf for leaf in self._on_device if id(leaf) not in arguments)
        self.programs.append(program._replace(others=others))

    def _placed(self, out: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        default = sharding.rows(self._mesh) if out.ndim else sharding.replicated(self._mesh)
        return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=out.sharding or default)


def array(parts: Parts, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Return the shape of an array of rows, sharded over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(parts.mesh))


def a_key(parts: Parts) -> jax.ShapeDtypeStruct:
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(parts.mesh))


def abstract_prompts(
    parts: Parts, questions: int, width: int, windows: int = 0, blank: bool = False
) -> Prompts:
    """Return prompts of `width` columns as shapes, with `windows` windows of images, and grey ones if
    `blank`.
    """
    tokens, mask = (array(parts, dtype, questions, width) for dtype in (jnp.int32, jnp.bool_))
    ids, cfg, vision = array(parts, jnp.uint32, questions), parts.cfg, None
    if windows and cfg.vision:
        size = questions, windows * (cfg.vision.window // cfg.vision.merge) ** 2, cfg.vision.features
        features = array(parts, cfg.execution.dtype, *size)
        shapes = ((questions, width), (questions, width, 3), (questions,))
        slots, positions, after = (array(parts, jnp.int32, *shape) for shape in shapes)
        trained = cfg.execution.tower != "freeze"
        images = abstract_images(parts, questions, windows) if trained else None
        vision = Vision(features, slots, positions, after, features if blank else None, images)
    return Prompts(tokens, mask, ids, vision)


def abstract_images(parts: Parts, questions: int, windows: int) -> Images:
    """Return the images of a batch as shapes."""
    cfg = parts.cfg.vision
    assert cfg is not None
    patches = questions, windows, cfg.window**2
    pixels = array(parts, jnp.uint8, *patches, 3 * cfg.patch**2)
    return Images(pixels, array(parts, jnp.int32, *patches, 5))


def draw_program(parts: Parts, sample: SampleConfig, width: int, name: str, windows: int = 0) -> Program:
    """Return the program `generate` with the arguments of `rollout.sample_and_score`."""
    params = abstract_decode(parts, parts.cfg)
    prompts = abstract_prompts(parts, sample.questions, width, windows)
    settings = draw_settings(parts, parts.cfg, sample)
    return Program(name, generate, (params, prompts, a_key(parts), settings))


def sync_program(sync_weights: WeightSync) -> list[Program]:
    """Return the copy to the sampling layout, or [] if nothing has to be copied."""
    moved = sync_weights.moved
    return [Program("sync_weights", sync_weights.program, (moved,))] if moved else []

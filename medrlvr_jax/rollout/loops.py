"""The loops over a rollout's columns: a chain of `while_loop`s until every row has stopped.

Attention reads the whole allocated cache, so the caches begin with room for about an eighth of the tokens and
grow from loop to loop (`segment_ends`).

On CPU the time of a step is proportional to its rows. With `Execution.narrow`, when half of the rows have
stopped, the others continue in a loop of half the width, and so on. They return to the full width when the
caches grow. A row that moves takes its own copy of the prompt's cache, which its group shared before. On TPU
and GPU the time of a step is that of reading the weights, and each loop has to be compiled, so there it is
off.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int

from medrlvr_jax.rollout.decode import Caches
from medrlvr_jax.sharding import constrain
from medrlvr_jax.types import Array, Prompts, Rollout

SEGMENT = 128  # Caches of less than twice this many tokens are allocated at once.
NARROWEST = 4  # Rows per device of the narrowest loop. Below it, reading the weights takes most of the time.
HALVINGS = 3  # How often the width is halved. Each is another loop to compile.


class Rows(NamedTuple):
    """The state of the rows, which changes from column to column."""

    drawn: Rollout
    running: Bool[Array, "Q G"]  # no stop token yet
    caches: Caches  # of the samples


class State(NamedTuple):
    """The state before column t is drawn. In a narrower loop Q counts rows, and G is 1."""

    t: Int[Array, ""]
    rows: Rows
    uniforms: Float32[Array, "Q G R"]  # the noise behind each token
    limits: Int[Array, "Q G"]  # the largest length of each row
    prompts: Prompts
    prompt_caches: Caches


def segment_ends(length: int) -> list[int]:
    """Return the number of tokens that the caches hold in each loop: …, length / 4, length / 2, length."""
    ends = [length]
    while ends[0] >= 2 * SEGMENT:
        ends.insert(0, -(-ends[0] // 2))
    return ends


def columns_of_loops(length: int) -> list[tuple[int, int]]:
    """Return the columns that each loop draws, as (from, to). Column 0 is drawn before the loops.

    The keys of a token are stored when the next one is drawn, so caches for `end` tokens are enough to draw
    column `end`.
    """
    ends = [1, *(min(end + 1, length) for end in segment_ends(length))]
    return list(pairwise(ends))


def run_loop(
    body: Callable[[State], State], state: State, columns: tuple[int, int], shards: int, halvings: int
) -> State:
    """Draw the columns from the first, some of which may be drawn already, to below the second, or until all
    rows have stopped.

    `body` draws one column. `shards`: the number of devices over which the rows are split. `halvings`: how
    often the width may still be halved.
    """
    begin, end = columns
    width = state.rows.running.size // shards
    narrower = width // 2 if halvings and width % 2 == 0 and width // 2 >= NARROWEST else 0
    busy = lambda s: s.rows.running.reshape(shards, -1).sum(1).max()
    # written such that the planner can read the trip count from the condition (hlo.py)
    rounds = end - begin
    state = jax.lax.while_loop(lambda s: (s.t - begin < rounds) & (busy(s) > narrower), body, state)
    if not narrower:
        return state
    place = jnp.argsort(~state.rows.running.reshape(shards, -1), axis=1, stable=True)[:, :narrower]
    return put_rows(state, place, run_loop(body, take_rows(state, place), columns, shards, halvings - 1))


def take_rows(state: State, place: Array) -> State:
    """Return the rows at `place` [shards, n], their numbers within a shard: arrays of rows become
    [shards·n, 1, …], arrays of questions [shards·n, …].
    """
    groups = state.rows.running.shape[1]

    def take(x, place):
        split = constrain(x.reshape(place.shape[0], -1, *x.shape[1:]), "batch", *[None] * x.ndim)
        return jax.vmap(lambda x, i: x[i])(split, place).reshape(-1, *x.shape[1:])

    def of_row(x):
        return take(x.reshape(-1, *x.shape[2:]), place)[:, None]

    rows, uniforms, limits = jax.tree.map(of_row, (state.rows, state.uniforms, state.limits))
    of_questions = jax.tree.map(lambda x: take(x, place // groups), (state.prompts, state.prompt_caches))
    return State(state.t, rows, uniforms, limits, *of_questions)


def put_rows(state: State, place: Array, narrow: State) -> State:
    """Return `state` with its rows at `place` [shards, n] replaced by those of the `narrow` state."""

    def put(x, new):
        split = constrain(x.reshape(place.shape[0], -1, *x.shape[2:]), "batch", *[None] * (x.ndim - 1))
        new = new.reshape(*place.shape, *x.shape[2:])
        return jax.vmap(lambda x, i, new: x.at[i].set(new))(split, place, new).reshape(x.shape)

    return state._replace(t=narrow.t, rows=jax.tree.map(put, state.rows, narrow.rows))

"""The loops over a rollout's columns: a short chain of `while_loop`s until every row has stopped.

Attention reads the room that the samples' caches have, so they begin with room for about an eighth of the
budget and grow from loop to loop (`segment_ends`).

On CPU a step costs what its rows cost. So there rows that have stopped make room (`Execution.narrow`): when
half of them have, the others move together into a loop of half the width, and so on down a short ladder;
where the caches grow they come back. A row that moves takes along its own copy of its prompt's cache, which
its group shares before. On TPU and GPU a step costs reading the weights, and each loop is one more to
compile.
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

SEGMENT = 128  # tokens: a budget below twice this has room for all from the start
NARROWEST = 4  # rows a device: below, reading the weights is all there is to a step
HALVINGS = 3  # each is another loop to compile


class Rows(NamedTuple):
    """What changes from column to column."""

    drawn: Rollout
    running: Bool[Array, "Q G"]  # no stop token yet
    caches: Caches  # of the samples


class State(NamedTuple):
    """Before column t is drawn; those below are final. After the first narrowing Q is rows, and G is 1."""

    t: Int[Array, ""]
    rows: Rows
    uniforms: Float32[Array, "Q G R"]  # the noise behind each token
    limits: Int[Array, "Q G"]  # tokens that a row may have
    prompts: Prompts
    prompt_caches: Caches


def segment_ends(length: int) -> list[int]:
    """Tokens for which the caches have room, loop by loop: …, a quarter, half of the budget, the budget."""
    ends = [length]
    while ends[0] >= 2 * SEGMENT:
        ends.insert(0, -(-ends[0] // 2))
    return ends


def columns_of_loops(length: int) -> list[tuple[int, int]]:
    """The columns that each loop draws, from and to; the first of all is drawn before them.

    A token's keys are stored when the one after it is drawn: with room for `end`, column `end` can still be.
    """
    ends = [1, *(min(end + 1, length) for end in segment_ends(length))]
    return list(pairwise(ends))


def run_loop(
    body: Callable[[State], State], state: State, columns: tuple[int, int], shards: int, halvings: int
) -> State:
    """Draw the columns from the first (some may be drawn already) to below the second, or until no row runs.

    `body` draws one. `shards`: over how many devices the rows are split. `halvings`: how often half of the
    rows may be left behind.
    """
    begin, end = columns
    width = state.rows.running.size // shards
    narrower = width // 2 if halvings and width % 2 == 0 and width // 2 >= NARROWEST else 0
    busy = lambda s: s.rows.running.reshape(shards, -1).sum(1).max()
    # so written because it is what a plan may read from the condition: see flops.py and hlo.py
    rounds = end - begin
    state = jax.lax.while_loop(lambda s: (s.t - begin < rounds) & (busy(s) > narrower), body, state)
    if not narrower:
        return state
    place = jnp.argsort(~state.rows.running.reshape(shards, -1), axis=1, stable=True)[:, :narrower]
    return put_rows(state, place, run_loop(body, take_rows(state, place), columns, shards, halvings - 1))


def take_rows(state: State, place: Array) -> State:
    """The rows at `place` [shards, n], places among a shard's rows: [shards·n, 1, …] of what is a row's,
    [shards·n, …] of a question's.
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
    """`state` after its rows at `place` [shards, n] went on in the narrow one, as [shards·n, 1, …]."""

    def put(x, new):
        split = constrain(x.reshape(place.shape[0], -1, *x.shape[2:]), "batch", *[None] * (x.ndim - 1))
        new = new.reshape(*place.shape, *x.shape[2:])
        return jax.vmap(lambda x, i, new: x.at[i].set(new))(split, place, new).reshape(x.shape)

    return state._replace(t=narrow.t, rows=jax.tree.map(put, state.rows, narrow.rows))

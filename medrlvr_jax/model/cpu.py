"""A workaround for XLA:CPU."""

import jax
import jax.numpy as jnp

from medrlvr_jax.types import Array


@jax.custom_vjp
def linear(x: Array, w: Array) -> Array:
    """Return x [..., E] @ w [E, F]. Its gradient is autodiff's, but computes xᵀ·g for the weight.

    Autodiff computes gᵀ·x and transposes it. XLA:CPU then recomputes g in a strided loop, and the backward
    pass of an MLP takes twice as long.
    """
    return x @ w


def _linear_forward(x, w):
    return x @ w, (x, w)


def _linear_backward(saved, g):
    x, w = saved
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return (flat_g @ w.T).reshape(x.shape), jnp.einsum("ne,nf->ef", flat_x, flat_g)


linear.defvjp(_linear_forward, _linear_backward)

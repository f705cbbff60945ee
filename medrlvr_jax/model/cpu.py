"""What only XLA:CPU needs."""

import jax
import jax.numpy as jnp

from medrlvr_jax.types import Array


@jax.custom_vjp
def linear(x: Array, w: Array) -> Array:
    """x [..., E] @ w [E, F]; the same gradient as autodiff's, with the weight's taken as xᵀ·g.

    Autodiff asks for gᵀ·x and a transpose, for which XLA:CPU recomputes g in a strided loop: an MLP's
    backward pass took twice as long.
    """
    return x @ w


def _linear_forward(x, w):
    return x @ w, (x, w)


def _linear_backward(saved, g):
    x, w = saved
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return (flat_g @ w.T).reshape(x.shape), jnp.einsum("ne,nf->ef", flat_x, flat_g)


linear.defvjp(_linear_forward, _linear_backward)

"""Norms of the transformer with gradients of their own: float32 inside, each of them in one pass over their input.

What JAX derives keeps intermediate arrays and sums over them one by one. Written out, the gradient of a norm needs its
input, two numbers a token and the slope.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Float

from avd_jax.shapes import Array, Heads, Tokens


def layer_norm(
    x: Tokens, *, factor: Float[Array, "batch dim"], shift: Float[Array, "batch dim"], eps: float, dtype
) -> Tokens:
    """Return `(x - mean) / deviation * factor + shift`, over the channels of x [B N D], in `dtype`."""
    return _layer_norm(eps, jnp.dtype(dtype), x, factor, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _layer_norm(eps, dtype, x, factor, shift):
    mean, inverse = _moments(x, eps)
    return ((x - mean) * inverse * factor[:, None] + shift[:, None]).astype(dtype)


def _moments(x, eps):
    # Both in one pass over x; in float32 the difference of squares is exact enough for a residual stream.
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean), 0)
    return mean, jax.lax.rsqrt(variance + eps)


def _layer_norm_jvp(eps, dtype, primals, tangents):
    x, factor, _ = primals
    mean, inverse = _moments(x, eps)

    def change(kept, tangents):
        (x, factor, mean, inverse), (x_tangent, factor_tangent, shift_tangent) = kept, tangents
        normed, centred = (x - mean) * inverse, x_tangent - jnp.mean(x_tangent, axis=-1, keepdims=True)
        along = (centred - normed * jnp.mean(normed * centred, axis=-1, keepdims=True)) * inverse
        return (along * factor[:, None] + normed * factor_tangent[:, None] + shift_tangent[:, None]).astype(dtype)

    def gradients(kept, slope):
        x, factor, mean, inverse = kept
        # Else its sums become part of the product that makes the slope, and slow that down by half on a TPU.
        slope = jax.lax.optimization_barrier(slope).astype(jnp.float32)
        normed, weighted = (x - mean) * inverse, slope * factor[:, None]
        first = jnp.mean(weighted, axis=-1, keepdims=True)
        second = jnp.mean(weighted * normed, axis=-1, keepdims=True)
        return (weighted - first - normed * second) * inverse, jnp.sum(slope * normed, axis=1), jnp.sum(slope, axis=1)

    return _layer_norm(eps, dtype, *primals), _of_moving(change, gradients, (x, factor, mean, inverse), tangents)


_layer_norm.defjvp(_layer_norm_jvp, symbolic_zeros=True)


def rms_norm(x: Heads, *, scale: Float[Array, "heads head_dim"], eps: float) -> Heads:
    """Return x [B H N K] over its root mean square over H and K, times `scale`, in x's dtype.

    A mean of squares over 1536 bfloat16 values would lose its digits, so all is float32 inside.
    """
    return _rms_norm(eps, x, scale)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rms_norm(eps, x, scale):
    return (x.astype(jnp.float32) * _inverse(x, eps) * scale[:, None, :]).astype(x.dtype)


def _inverse(x, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(1, 3), keepdims=True) + eps)


def _rms_norm_jvp(eps, primals, tangents):
    x, scale = primals

    def change(kept, tangents):
        (x, scale, inverse), (x_tangent, scale_tangent) = kept, tangents
        normed, x_tangent = x.astype(jnp.float32) * inverse, x_tangent.astype(jnp.float32)
        along = (x_tangent - normed * jnp.mean(normed * x_tangent, axis=(1, 3), keepdims=True)) * inverse
        return (along * scale[:, None, :] + normed * scale_tangent[:, None, :]).astype(x.dtype)

    def gradients(kept, slope):
        x, scale, inverse = kept
        slope = slope.astype(jnp.float32)
        normed, weighted = x.astype(jnp.float32) * inverse, slope * scale[:, None, :]
        second = jnp.mean(weighted * normed, axis=(1, 3), keepdims=True)
        return ((weighted - normed * second) * inverse).astype(x.dtype), jnp.sum(slope * normed, axis=(0, 2))

    return _rms_norm(eps, x, scale), _of_moving(change, gradients, (x, scale, _inverse(x, eps)), tangents)


_rms_norm.defjvp(_rms_norm_jvp, symbolic_zeros=True)


def _of_moving(change, gradients, kept, tangents):
    """Return `change(kept, tangents)`, with `gradients` of those inputs that move; weights may be frozen."""
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not SymbolicZero]

    def of_some(kept, some):
        given = dict(zip(moving, some, strict=True))
        return change(kept, [given.get(i, jnp.zeros(t.shape, t.dtype)) for i, t in enumerate(tangents)])

    def back(kept, slope):
        found = gradients(kept, slope)
        return tuple(found[i] for i in moving)

    return linear_call(of_some, back, kept, tuple(tangents[i] for i in moving))

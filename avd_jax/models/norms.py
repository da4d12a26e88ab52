"""Norms of the transformer with gradients of their own: float32 inside, each of them in one pass over their input.

What JAX derives keeps intermediate arrays and sums over them one by one. Written out, the gradient of a norm needs its
input, two numbers a token and the slope.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Float

from avd_jax.shapes import Array, Heads, Tokens

MOMENTS_NAME = "layer_norm_moments"  # two numbers a token, for a policy to keep


def layer_norm(
    x: Tokens, *, factor: Float[Array, "batch dim"], shift: Float[Array, "batch dim"], eps: float, dtype
) -> Tokens:
    """Return `(x - mean) / deviation * factor + shift`, over the channels of x [B N D], in `dtype`."""
    return _layer_norm(eps, jnp.dtype(dtype), x, factor, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _layer_norm(eps, dtype, x, factor, shift):
    return _scaled(dtype, x, factor, shift, *_moments(x, eps))


def _scaled(dtype, x, factor, shift, mean, inverse):
    normed = (x - mean[..., None]) * inverse[..., None]
    return (normed * factor[:, None] + shift[:, None]).astype(dtype)


def _moments(x, eps):
    # Both in one pass over x; in float32 the difference of squares is exact enough for a residual stream.
    mean = jnp.mean(x, axis=-1)
    variance = jnp.maximum(jnp.mean(jnp.square(x), axis=-1) - jnp.square(mean), 0)
    return checkpoint_name(mean, MOMENTS_NAME), checkpoint_name(jax.lax.rsqrt(variance + eps), MOMENTS_NAME)


def _layer_norm_jvp(eps, dtype, primals, tangents):
    x, factor, shift = primals
    mean, inverse = _moments(x, eps)

    def change(kept, tangents):
        (x, factor, mean, inverse), (x_tangent, factor_tangent, shift_tangent) = kept, tangents
        mean, inverse = mean[..., None], inverse[..., None]
        normed, centred = (x - mean) * inverse, x_tangent - jnp.mean(x_tangent, axis=-1, keepdims=True)
        along = (centred - normed * jnp.mean(normed * centred, axis=-1, keepdims=True)) * inverse
        return (along * factor[:, None] + normed * factor_tangent[:, None] + shift_tangent[:, None]).astype(dtype)

    def gradients(kept, slope):
        x, factor, mean, inverse = kept
        mean, inverse = mean[..., None], inverse[..., None]
        slope = slope.astype(jnp.float32)
        normed, weighted = (x - mean) * inverse, slope * factor[:, None]
        first = jnp.mean(weighted, axis=-1, keepdims=True)
        second = jnp.mean(weighted * normed, axis=-1, keepdims=True)
        return (weighted - first - normed * second) * inverse, jnp.sum(slope * normed, axis=1), jnp.sum(slope, axis=1)

    kept = x, factor, mean, inverse
    return _scaled(dtype, x, factor, shift, mean, inverse), _of_moving(change, gradients, kept, tangents)


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

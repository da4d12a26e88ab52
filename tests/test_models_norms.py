"""The norms' gradients and tangents, which are written out, against those that JAX derives in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models.norms import layer_norm, rms_norm

EPS = 1e-6


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape) + 0.5, jnp.float32) for shape in shapes]


def plain_layer_norm(x, factor, shift):
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS)
    return normed * factor[:, None] + shift[:, None]


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=(1, 3), keepdims=True) + EPS) * scale[:, None]


CASES = {
    "layer": (
        lambda x, factor, shift: layer_norm(x, factor=factor, shift=shift, eps=EPS, dtype=x.dtype),
        plain_layer_norm,
        ((2, 5, 6), (2, 6), (2, 6)),
    ),
    "rms": (lambda x, scale: rms_norm(x, scale=scale, eps=EPS), plain_rms_norm, ((2, 3, 5, 4), (3, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_tangents(name):
    ours, plain, shapes = CASES[name]
    given = arrays(*shapes)
    *moved, slope = arrays(*shapes, shapes[0])
    moved = [leaf**2 - 0.3 for leaf in moved]
    with jax.enable_x64(True):
        wide = lambda leaves: [np.asarray(leaf, np.float64) for leaf in leaves]  # noqa: E731
        expected, change = jax.jvp(plain, wide(given), wide(moved))
        gradients = jax.vjp(plain, *wide(given))[1](np.asarray(slope, np.float64))
    found, found_change = jax.jit(lambda given, moved: jax.jvp(ours, given, moved))(given, moved)
    found_gradients = jax.jit(lambda given, slope: jax.vjp(ours, *given)[1](slope))(given, slope)
    for one, other in zip((found, found_change, *found_gradients), (expected, change, *gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_float32_inside(name):
    """Results and gradients are those of float32, rounded once."""
    ours, _, shapes = CASES[name]
    x, *weights = arrays(*shapes)
    x, slope = x.astype(jnp.bfloat16), arrays(shapes[0])[0].astype(jnp.bfloat16)
    if name == "layer":  # its input is the float32 stream
        x = x.astype(jnp.float32)
        rounded = lambda x, *w: layer_norm(x, factor=w[0], shift=w[1], eps=EPS, dtype=jnp.bfloat16)  # noqa: E731
    else:
        rounded = ours
    found, back = jax.vjp(rounded, x, *weights)
    expected, exact = jax.vjp(lambda x, *w: ours(x.astype(jnp.float32), *w), x, *weights)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    for one, other in zip(back(slope), exact(slope.astype(jnp.float32)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=1e-2, atol=1e-5)

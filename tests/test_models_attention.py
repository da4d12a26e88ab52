"""Attention against a float64 softmax written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models.attention import attention


def reference(query, key, value):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.empty((*query.shape[:3], value.shape[-1]))
    for b, h, i in np.ndindex(query.shape[:3]):
        scores = key[b, h] @ query[b, h, i] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        output[b, h, i] = weights / weights.sum() @ value[b, h]
    return output


def inputs(tokens, context, *, size=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (2, 3, tokens, 6), (2, 3, context, 6), (2, 3, context, 6)
    return [(size * rng.standard_normal(shape)).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(("tokens", "context"), [(7, 7), (7, 3), (1, 9)])
def test_softmax(tokens, context):
    query, key, value = inputs(tokens, context)
    np.testing.assert_allclose(attention(query, key, value), reference(query, key, value), rtol=2e-5, atol=1e-6)


def test_large_scores_do_not_overflow():
    query, key, value = inputs(5, 5, size=100.0)
    np.testing.assert_allclose(attention(query, key, value), reference(query, key, value), rtol=1e-3, atol=1e-2)


def test_many_keys_of_equal_score_average_in_half_precision():
    query = np.zeros((1, 1, 1, 4), jnp.bfloat16)
    value = np.random.default_rng(0).standard_normal((1, 1, 4096, 4)).astype(jnp.bfloat16) + jnp.bfloat16(1)
    output = attention(query, np.zeros_like(value), value)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(output[0, 0, 0], np.float64), np.asarray(value, np.float64).mean((0, 1, 2)), rtol=2**-7
    )


def test_half_precision_is_close():
    query, key, value = inputs(8, 8, dtype=jnp.bfloat16)
    expected = reference(query, key, value)
    error = np.asarray(attention(query, key, value), np.float64) - expected
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 1e-2


def test_gradient_is_that_of_the_formula():
    query, key, value = inputs(4, 5)
    gradients = jax.grad(lambda *args: jnp.sum(attention(*args) ** 2), argnums=(0, 1, 2))(query, key, value)
    step = 1e-6
    for argument, gradient in enumerate(gradients):
        arrays = [x.astype(np.float64) for x in (query, key, value)]
        for index in [(0, 0, 0, 0), (1, 2, 3, 4)]:
            losses = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[argument][index] += sign * step
                losses.append(np.sum(reference(*moved) ** 2))
            assert gradient[index] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3, abs=1e-5)

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.losses.temporal import temporal_loss, temporal_variance

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses_golden.npz")
X = jnp.asarray(GOLDEN["x0"], jnp.float32)


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 2e-6), (True, 1e-14)])
def test_golden(x64, tolerance):
    with jax.enable_x64(x64):
        x = jnp.asarray(GOLDEN["x0"])
        variance, loss = temporal_variance(x), temporal_loss(x, clip=-np.inf)
    np.testing.assert_allclose(variance, GOLDEN["temporal_variance"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(loss, GOLDEN["temporal_loss"], rtol=0, atol=tolerance)


def test_a_still_video_has_the_largest_loss_and_a_finite_gradient():
    still = jnp.broadcast_to(X[:, :1], X.shape)
    loss, gradient = jax.value_and_grad(temporal_loss)(still)
    np.testing.assert_allclose(loss, -np.log(1e-6), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_one_frame_moved_by_a_known_amount():
    # Frames 0 and d: population variance (d / 2)^2, everywhere.
    x = jnp.zeros((2, 2, 3, 3, 4)).at[:, 1].set(0.5)
    np.testing.assert_allclose(temporal_variance(x), [0.0625, 0.0625], rtol=1e-6)
    np.testing.assert_allclose(temporal_loss(x, eps=0.0), np.log(16), rtol=1e-6)


def test_above_the_clip_the_gradient_is_that_of_the_formula():
    loss = float(temporal_loss(X, clip=-np.inf))
    clipped = jax.grad(temporal_loss)(X, clip=loss - 1e-3)
    mean_variance = np.exp(-GOLDEN["temporal_loss"]) - 1e-6
    frames, size = X.shape[1], X.size
    centred = np.asarray(X) - np.asarray(X).mean(axis=1, keepdims=True)
    expected = -(2 / frames) * centred / (size / frames) / (mean_variance + 1e-6)
    np.testing.assert_allclose(clipped, expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(clipped, jax.grad(temporal_loss)(X, clip=-np.inf))


@pytest.mark.parametrize("margin", [0.0, 1e-3, 10.0])
def test_at_and_below_the_clip_there_is_a_value_and_no_gradient(margin):
    loss = temporal_loss(X, clip=-np.inf)
    value, gradient = jax.value_and_grad(temporal_loss)(X, clip=float(loss) + margin)
    assert value == loss
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


def test_the_clip_decides_for_the_batch_as_a_whole():
    # The first example alone is below the clip, the batch is not: it gets a gradient like the rest.
    x = jnp.concatenate([X[:1], 0.1 * X[1:]])
    assert temporal_loss(x[:1]) < 0.6 < temporal_loss(x)
    gradient = jax.grad(temporal_loss)(x)
    assert np.all(np.abs(gradient).max(axis=(1, 2, 3, 4)) > 0)


def test_bf16_latents_are_measured_in_float32():
    x = X.astype(jnp.bfloat16)
    loss = temporal_loss(x)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, temporal_loss(x.astype(jnp.float32)), rtol=1e-6)

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion.guidance import guide
from avd_jax.losses.distribution_matching import (
    distribution_matching_gradient,
    distribution_matching_loss,
    flow_matching_loss,
)

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses_golden.npz")


def golden_inputs(dtype=None):
    x0, fake_x0, cond, uncond = (jnp.asarray(GOLDEN[k], dtype) for k in ("x0", "fake_x0", "cond_x0", "uncond_x0"))
    return {"x0": x0, "fake_x0": fake_x0, "real_x0": guide(cond=cond, uncond=uncond, scale=5.0)}


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 2e-6), (True, 1e-14)])
def test_golden(x64, tolerance):
    with jax.enable_x64(x64):
        inputs = golden_inputs()
        gradient, loss = distribution_matching_gradient(**inputs), distribution_matching_loss(**inputs)
    np.testing.assert_allclose(gradient, GOLDEN["dmd_gradient"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(loss, GOLDEN["dmd_loss"], rtol=0, atol=tolerance)


def test_derivative_of_the_loss_is_the_gradient_over_its_size():
    inputs = golden_inputs(jnp.float32)
    x0 = inputs.pop("x0")
    derivative = jax.grad(lambda x: distribution_matching_loss(x0=x, **inputs).sum())(x0)
    gradient = distribution_matching_gradient(x0=x0, **inputs)
    np.testing.assert_allclose(derivative * x0[0].size, gradient, rtol=0, atol=2e-6)


def test_networks_get_no_gradient():
    inputs = golden_inputs(jnp.float32)
    x0 = inputs.pop("x0")
    gradients = jax.grad(lambda kw: distribution_matching_loss(x0=x0, **kw).sum())(inputs)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_an_example_where_the_teacher_wants_it_gets_no_gradient():
    inputs = golden_inputs(jnp.float32)
    inputs["x0"] = inputs["x0"].at[1].set(inputs["real_x0"][1])
    gradient, loss = distribution_matching_gradient(**inputs), distribution_matching_loss(**inputs)
    np.testing.assert_array_equal(gradient[1], np.zeros_like(gradient[1]))
    assert loss[1] == 0
    np.testing.assert_allclose(gradient[0], GOLDEN["dmd_gradient"][0], atol=2e-6)


def test_a_diverged_run_shows():
    inputs = golden_inputs(jnp.float32)
    inputs["fake_x0"] = inputs["fake_x0"].at[2, 0, 0, 0, 0].set(jnp.nan)
    loss = distribution_matching_loss(**inputs)
    assert np.isnan(loss[2])
    assert np.all(np.isfinite(loss[:2]))


def test_scaling_the_space_leaves_the_gradient():
    inputs = golden_inputs(jnp.float32)
    scaled = {name: 4 * x for name, x in inputs.items()}
    np.testing.assert_allclose(
        distribution_matching_gradient(**scaled), distribution_matching_gradient(**inputs), rtol=1e-6
    )


def test_flow_matching_loss():
    x0, noise, velocity = jax.random.normal(jax.random.key(0), (3, 2, 3, 2, 2, 4))
    np.testing.assert_array_equal(flow_matching_loss(velocity=noise - x0, x0=x0, noise=noise), np.zeros(2))
    loss = flow_matching_loss(velocity=velocity, x0=x0, noise=noise)
    expected = [np.mean((np.asarray(velocity) - (noise - x0))[b] ** 2) for b in range(2)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    to_student = jax.grad(lambda x: flow_matching_loss(velocity=velocity, x0=x, noise=noise).sum())(x0)
    np.testing.assert_array_equal(to_student, np.zeros_like(x0))

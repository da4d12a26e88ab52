import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.diffusion.flow import x0_from_velocity
from avd_jax.diffusion.guidance import guide

COND, UNCOND, XT = jax.random.normal(jax.random.key(0), (3, 2, 2, 2, 3, 4))


def test_scale_counts_from_the_unconditional_prediction():
    np.testing.assert_array_equal(guide(cond=COND, uncond=UNCOND, scale=0), UNCOND)
    np.testing.assert_allclose(guide(cond=COND, uncond=UNCOND, scale=1.0), COND, atol=1e-6)
    np.testing.assert_allclose(guide(cond=COND, uncond=UNCOND, scale=5.0), 5 * COND - 4 * UNCOND, atol=1e-5)


def test_the_authors_formula_is_a_scale_one_higher():
    np.testing.assert_allclose(guide(cond=COND, uncond=UNCOND, scale=6.0), COND + 5 * (COND - UNCOND), atol=1e-5)


def test_guiding_velocities_guides_x0():
    sigmas = jnp.array([0.3, 0.9])
    velocity = guide(cond=COND, uncond=UNCOND, scale=5.0)
    x0 = guide(
        cond=x0_from_velocity(xt=XT, velocity=COND, sigmas=sigmas),
        uncond=x0_from_velocity(xt=XT, velocity=UNCOND, sigmas=sigmas),
        scale=5.0,
    )
    np.testing.assert_allclose(x0_from_velocity(xt=XT, velocity=velocity, sigmas=sigmas), x0, atol=1e-5)


def test_bf16_predictions_are_guided_in_float32():
    cond, uncond = COND.astype(jnp.bfloat16), UNCOND.astype(jnp.bfloat16)
    guided = guide(cond=cond, uncond=uncond, scale=5.0)
    expected = 5 * np.asarray(cond, np.float32) - 4 * np.asarray(uncond, np.float32)
    np.testing.assert_allclose(guided, expected, atol=1e-5)

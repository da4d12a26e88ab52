from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion import flow

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses_golden.npz")
SHAPE = (3, 2, 2, 3, 4)


def normal(seed, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), SHAPE, dtype)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_sigmas_of_the_training_schedule(shift):
    sigmas = flow.shifted_sigma(np.arange(1000, 0, -1) / 1000, shift)
    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas, GOLDEN[f"train_sigmas_{shift}"], rtol=0, atol=1e-14)


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    u = np.linspace(0, 1, 11)
    shifted = flow.shifted_sigma(u, 5.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert np.all(shifted[1:-1] > u[1:-1])
    np.testing.assert_allclose(flow.shifted_sigma(shifted, 1 / 5.0), u, atol=1e-15)


def test_student_timesteps_are_no_image_of_even_times_under_one_shift():
    # What flow's docstring says of 1000, 900, 757, 522.
    shifts = [sigma * (1 - u) / (u * (1 - sigma)) for sigma, u in ((0.9, 0.75), (0.757, 0.5), (0.522, 0.25))]
    np.testing.assert_allclose(shifts, [3.00, 3.12, 3.28], atol=0.005)
    np.testing.assert_allclose(flow.shifted_sigma(np.array([0.75, 0.5, 0.25]), 3.0), [0.9, 0.75, 0.5])


def test_sigma_of_a_timestep_is_a_division():
    np.testing.assert_array_equal(
        flow.sigma_of_timestep(jnp.array([1000.0, 757.0, 0.0])), np.float32([1.0, 0.757, 0.0])
    )


def test_sampled_timesteps_are_uniform_before_the_shift():
    timesteps = np.asarray(flow.sample_timesteps(jax.random.key(0), 40_000, shift=5.0))
    assert timesteps.min() == 20
    assert timesteps.max() == 980
    u = flow.shifted_sigma(timesteps / 1000, 1 / 5.0)
    # Clamping leaves a point mass at each end: u below 0.0040661 and above 0.9074074.
    assert np.mean(timesteps == 20) == pytest.approx(0.00407, abs=0.002)
    assert np.mean(timesteps == 980) == pytest.approx(0.0926, abs=0.006)
    for level in (0.25, 0.5, 0.75):
        assert np.mean(u < level) == pytest.approx(level, abs=0.01)


def test_sampled_timesteps_keep_their_bounds():
    timesteps = flow.sample_timesteps(jax.random.key(1), 100, shift=1, minimum=400, maximum=500)
    assert float(timesteps.min()) == 400
    assert float(timesteps.max()) == 500


def test_noise_levels_are_per_example():
    x0, noise = normal(0), normal(1)
    xt = flow.add_noise(x0=x0, noise=noise, sigmas=jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_array_equal(xt[0], x0[0])
    np.testing.assert_allclose(xt[1], 0.75 * x0[1] + 0.25 * noise[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(xt[2], noise[2])


def test_the_velocity_leads_back_to_x0():
    x0, noise, sigmas = normal(0), normal(1), jnp.array([0.1, 0.6, 1.0])
    xt = flow.add_noise(x0=x0, noise=noise, sigmas=sigmas)
    velocity = flow.velocity_target(x0=x0, noise=noise)
    np.testing.assert_allclose(flow.x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigmas), x0, atol=1e-6)


def test_velocity_is_the_time_derivative_of_the_noising():
    x0, noise, sigmas = normal(0), normal(1), jnp.array([0.1, 0.6, 1.0])
    _, derivative = jax.jvp(lambda s: flow.add_noise(x0=x0, noise=noise, sigmas=s), (sigmas,), (jnp.ones_like(sigmas),))
    np.testing.assert_allclose(derivative, flow.velocity_target(x0=x0, noise=noise), atol=1e-6)


def test_bf16_networks_are_computed_with_in_float32():
    x0, noise, sigmas = normal(0, jnp.bfloat16), normal(1, jnp.bfloat16), jnp.full(3, 0.999)
    xt = flow.add_noise(x0=x0, noise=noise, sigmas=sigmas)
    velocity = flow.velocity_target(x0=x0, noise=noise)
    assert xt.dtype == velocity.dtype == jnp.float32
    # In bf16 the 0.1 % of x0 in xt would be lost altogether.
    np.testing.assert_allclose(flow.x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigmas), x0, atol=1e-6)


def test_one_noise_level_for_several_examples_is_refused():
    with pytest.raises(Exception, match=r"(?s)sigmas|batch"):
        flow.add_noise(x0=normal(0), noise=normal(1), sigmas=jnp.array([0.5]))


def test_logit_normal_timesteps_have_the_quantiles_of_the_normal():
    timesteps = flow.sample_logit_normal_timesteps(jax.random.key(0), 20_000, mean=0.7, deviation=1.6)
    found = np.quantile(np.asarray(timesteps, np.float64), [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(found, [126, 406, 668, 856, 965], atol=8)

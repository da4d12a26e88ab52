from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion.unipc import unipc_sample, unipc_schedule
from avd_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "unipc_golden.npz")
CASES = sorted(tuple(map(float, key.split("_")[1:])) for key in GOLDEN if key.startswith("final"))


def golden_velocity(latents, timesteps):
    return jnp.tanh(latents * GOLDEN["slope"]) + 0.3 * jnp.sin(timesteps / 200)[:, None, None, None, None]


@pytest.mark.parametrize(("steps", "shift"), CASES)
def test_golden(steps, shift):
    steps = int(steps)
    timesteps, sigmas = unipc_schedule(steps, shift)
    np.testing.assert_array_equal(timesteps, GOLDEN[f"timesteps_{steps}_{shift}"])
    np.testing.assert_allclose(sigmas, GOLDEN[f"sigmas_{steps}_{shift}"], rtol=0, atol=1e-7)
    noise, expected = jnp.asarray(GOLDEN["noise"], jnp.float32), GOLDEN[f"final_{steps}_{shift}"]
    final = unipc_sample(golden_velocity, noise, num_steps=steps, shift=shift)
    error = np.sqrt(np.mean((np.asarray(final) - expected) ** 2) / np.mean(expected**2))
    assert error < 2e-6


def test_wans_own_timesteps():
    timesteps, sigmas = unipc_schedule(4, 5.0)
    np.testing.assert_array_equal(timesteps, [999, 937, 833, 624])
    np.testing.assert_allclose(sigmas[0], 0.9997998, atol=1e-7)
    assert sigmas[-1] == 0


def test_second_order_convergence():
    # dz/dsigma = z (1 - z), solved in closed form from the first sigma to 0. A shift of 1, because with a larger one
    # the errors of the first and the last step have opposite signs and cancel at some step counts.
    errors = []
    with jax.enable_x64(True):
        start = jnp.array([0.1, 0.3, 0.5, 0.9]).reshape(1, 1, 2, 2, 1)
        for steps in (80, 160, 320):
            _, sigmas = unipc_schedule(steps, 1.0)
            exact = 1 / (1 + (1 / start - 1) * np.exp(float(sigmas[0])))
            solved = unipc_sample(lambda z, t: z * (1 - z), start, num_steps=steps, shift=1.0)
            errors.append(np.abs(np.asarray(solved - exact)).ravel())
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all((orders > 1.8) & (orders < 2.1)), orders
    assert errors[-1].max() < 1e-6


def test_data_at_one_point_is_found_in_any_number_of_steps():
    data = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 3))
    noise = jax.random.normal(jax.random.key(1), data.shape)
    for steps in (1, 2, 3, 5):
        timesteps, sigmas = unipc_schedule(steps, 5.0)
        table = dict(zip(timesteps.tolist(), sigmas.tolist(), strict=False))

        def velocity(z, t, table=table):
            sigma = jnp.select([t[0] == key for key in table], list(table.values()))
            return (z - data) / sigma

        final = unipc_sample(velocity, noise, num_steps=steps, shift=5.0)
        np.testing.assert_allclose(final, data, atol=2e-6)


def test_the_network_is_traced_once_and_gets_a_timestep_an_example():
    calls = []

    def velocity(latents, timesteps):
        calls.append((latents.shape, timesteps.shape, timesteps.dtype))
        return -latents.astype(jnp.bfloat16)

    final = unipc_sample(velocity, jnp.ones((2, 1, 2, 2, 3)), num_steps=9, shift=5.0)
    assert calls == [((2, 1, 2, 2, 3), (2,), jnp.float32)]
    assert final.dtype == jnp.float32


@pytest.mark.parametrize(("steps", "shift", "field"), [(0, 5.0, "num_steps"), (4, 0.0, "shift"), (4, -1.0, "shift")])
def test_bad_schedules_are_refused(steps, shift, field):
    with pytest.raises(UserError, match=field):
        unipc_schedule(steps, shift)

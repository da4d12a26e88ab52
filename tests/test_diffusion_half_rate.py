"""Half-rate steps: the rollout by hand, the noise that both rates share, simulation, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion.student import (
    HalfRate,
    backward_simulation,
    check_half_rate,
    half_rate_simulation,
    half_rate_steps,
    initial_noise,
    renoise,
    student_sample,
)
from avd_jax.errors import UserError

TIMESTEPS = (1000.0, 900.0, 757.0, 522.0)
SHAPE = 5, 2, 2, 3
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
NOISE = initial_noise(KEYS, SHAPE)


def velocity(latents, timesteps, factor=0.3):
    return factor * latents + (timesteps / 2000)[:, None, None, None, None]


def interpolate(x0):
    made = x0[:, :-1] * x0[:, 1:]
    return jnp.zeros((*x0.shape[:1], 2 * x0.shape[1] - 1, *x0.shape[2:])).at[:, ::2].set(x0).at[:, 1::2].set(made)


HALF = HalfRate(2, partial(velocity, factor=0.7), interpolate)


def noise_after(step):
    return renoise(jnp.zeros_like(NOISE), KEYS, step=step, timesteps=jnp.full(2, 1000.0))


def by_hand(half_steps, total=4):
    """The input of each step, and at last the result."""
    inputs, xt = [], NOISE[:, ::2] if half_steps else NOISE
    for i, timestep in enumerate(TIMESTEPS):
        inputs.append(xt)
        sigma, following = timestep / 1000, (*TIMESTEPS, 0.0)[i + 1] / 1000
        x0 = xt - sigma * velocity(xt, jnp.full(2, timestep), 0.7 if i < half_steps else 0.3)
        if i == half_steps - 1:
            x0 = interpolate(x0)
        noise = noise_after(i) if i >= half_steps - 1 else noise_after(i)[:, ::2]
        xt = (1 - following) * x0 + following * noise
    return [*inputs, xt]


@pytest.mark.parametrize("half_steps", [1, 2, 4])
def test_rollout_by_hand(half_steps):
    half = HalfRate(half_steps, HALF.velocity_fn, interpolate)
    actual = student_sample(velocity, NOISE, KEYS, timesteps=TIMESTEPS, half_rate=half)
    np.testing.assert_allclose(actual, by_hand(half_steps)[-1], atol=1e-5)
    assert by_hand(half_steps)[0].shape[1] == 3


def test_both_rates_agree_if_frames_know_nothing_of_each_other_and_are_alike():
    """With an interpolator that makes the frame that a full rate would have made, nothing changes."""
    full = by_hand(0)
    x0 = full[1] - 0.9 * velocity(full[1], jnp.full(2, 900.0))
    half = HalfRate(2, velocity, lambda half_x0: x0.at[:, ::2].set(half_x0))
    actual = student_sample(velocity, NOISE, KEYS, timesteps=TIMESTEPS, half_rate=half)
    np.testing.assert_allclose(actual, student_sample(velocity, NOISE, KEYS, timesteps=TIMESTEPS), atol=1e-5)


def test_the_input_of_the_first_full_rate_step():
    xt = half_rate_steps(NOISE, KEYS, timesteps=TIMESTEPS, half_rate=HALF)
    np.testing.assert_allclose(xt, by_hand(2)[2], atol=1e-5)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_simulation_gives_the_input_of_each_step_without_gradient(stop):
    def run(scale):
        half = HalfRate(2, lambda *args: scale * HALF.velocity_fn(*args), interpolate)
        options = {"timesteps": TIMESTEPS, "stop_step": jnp.int32(stop), "half_rate": half}
        if stop < 2:
            return half_rate_simulation(NOISE, KEYS, **options)
        return backward_simulation(lambda *args: scale * velocity(*args), NOISE, KEYS, **options)

    xt, timesteps = jax.jit(run)(1.0)
    np.testing.assert_allclose(xt, by_hand(2)[stop], atol=1e-5)
    np.testing.assert_array_equal(timesteps, np.full(2, TIMESTEPS[stop], np.float32))
    assert not jax.grad(lambda scale: jnp.sum(run(scale)[0]))(1.0)


@pytest.mark.parametrize(
    ("steps", "frames", "message"),
    [
        (2, 4, "half_rate_steps=2: 4 latent frames have no half rate, which takes an odd number from 3 on"),
        (2, 1, "half_rate_steps=2: 1 latent frames have no half rate"),
        (5, 5, "half_rate_steps=5: the student has 4 steps; give 0 to 4"),
        (-1, 5, "half_rate_steps=-1: the student has 4 steps; give 0 to 4"),
    ],
)
def test_steps_that_do_not_fit(steps, frames, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_half_rate(steps, num_steps=4, frames=frames)
    check_half_rate(0, num_steps=4, frames=frames)

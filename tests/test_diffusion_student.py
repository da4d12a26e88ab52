import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion.flow import add_noise, x0_from_velocity
from avd_jax.diffusion.student import (
    StudentSchedule,
    backward_simulation,
    initial_noise,
    random_times,
    renoise,
    student_sample,
)
from avd_jax.errors import UserError

TIMESTEPS = StudentSchedule().timesteps
SHAPE = (3, 2, 2, 4)
KEYS = jax.random.split(jax.random.key(0), 3)


def velocity(latents, timesteps):
    return jnp.tanh(1.5 * latents) + 0.5 * jnp.cos(timesteps / 300)[:, None, None, None, None]


@jax.jit
def sample(keys):
    return student_sample(velocity, initial_noise(keys, SHAPE), keys, timesteps=TIMESTEPS)


@jax.jit
def finish(xt, stop_step):
    """Continue from the input of `stop_step` to the last x0 (docs/method.md, Training loop), with its noises."""
    x0 = xt
    for step, timestep in enumerate(TIMESTEPS):
        if step > 0:
            noise = renoise(jnp.zeros_like(x0), KEYS, step=step - 1, timesteps=jnp.full(3, 1000.0))
            renoised = (1 - timestep / 1000) * x0 + timestep / 1000 * noise
            xt = jnp.where(step > stop_step, renoised, xt)
        x0 = jnp.where(step >= stop_step, xt - timestep / 1000 * velocity(xt, jnp.full(3, timestep)), x0)
    return x0


def test_the_rollout_step_by_step():
    np.testing.assert_allclose(sample(KEYS), finish(initial_noise(KEYS, SHAPE), 0), rtol=0, atol=1e-5)


def test_noises_are_normal_and_unlike_one_another():
    keys = jax.random.split(jax.random.key(1), 2)
    shape = (4, 8, 8, 16)
    zero, pure = jnp.zeros((2, *shape)), jnp.full(2, 1000.0)
    noises = [initial_noise(keys, shape)] + [renoise(zero, keys, step=step, timesteps=pure) for step in range(3)]
    rows = np.concatenate([np.asarray(noise).reshape(2, -1) for noise in noises])
    # 4,096 numbers each: the entries of their covariance scatter by 1/64 or so about the identity's.
    np.testing.assert_allclose(np.cov(rows), np.eye(len(rows)), atol=0.09)
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=0.08)


def test_an_example_does_not_depend_on_its_batch():
    whole = sample(KEYS)
    for rows in (jnp.array([1]), jnp.array([2, 0])):
        np.testing.assert_allclose(sample(KEYS[rows]), whole[rows], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(initial_noise(KEYS[rows], SHAPE), initial_noise(KEYS, SHAPE)[rows])


def test_backward_simulation_is_the_same_path():
    noise = initial_noise(KEYS, SHAPE)
    simulate = jax.jit(lambda stop: backward_simulation(velocity, noise, KEYS, timesteps=TIMESTEPS, stop_step=stop))
    for stop_step, timestep in enumerate(TIMESTEPS):
        xt, timesteps = simulate(stop_step)
        np.testing.assert_array_equal(timesteps, np.full(3, timestep, np.float32))
        np.testing.assert_allclose(finish(xt, stop_step), sample(KEYS), rtol=0, atol=1e-5)


def test_no_forward_pass_is_made_beyond_the_stop():
    evaluated, traced = [], []

    def counted(latents, timesteps):
        traced.append(1)
        jax.debug.callback(lambda t: evaluated.append(float(t)), timesteps[0])
        return velocity(latents, timesteps)

    noise = initial_noise(KEYS, SHAPE)
    simulate = jax.jit(lambda stop: backward_simulation(counted, noise, KEYS, timesteps=TIMESTEPS, stop_step=stop))
    for stop_step in range(len(TIMESTEPS)):
        evaluated.clear()
        jax.block_until_ready(simulate(stop_step))
        jax.effects_barrier()
        assert sorted(evaluated, reverse=True) == list(TIMESTEPS[:stop_step])
    assert len(traced) == 1


def test_stopping_at_once_returns_the_noise():
    noise = initial_noise(KEYS, SHAPE)
    xt, _ = backward_simulation(velocity, noise, KEYS, timesteps=TIMESTEPS, stop_step=0)
    np.testing.assert_array_equal(xt, noise)


def test_no_gradient_through_the_simulation_and_the_right_one_through_the_last_step():
    noise = initial_noise(KEYS, SHAPE)

    def loss(scale, stop_step, xt=None):
        def network(latents, timesteps):
            return scale * velocity(latents, timesteps)

        if xt is None:
            xt, _ = backward_simulation(network, noise, KEYS, timesteps=TIMESTEPS, stop_step=stop_step)
        timesteps = jnp.full(3, TIMESTEPS[2])
        x0 = x0_from_velocity(xt=xt, velocity=network(xt, timesteps), sigmas=timesteps / 1000)
        return jnp.mean(jnp.square(x0))

    stop_step = jnp.int32(2)
    frozen, _ = backward_simulation(
        lambda z, t: 0.7 * velocity(z, t), noise, KEYS, timesteps=TIMESTEPS, stop_step=stop_step
    )
    gradient = jax.jit(jax.grad(loss))(0.7, stop_step)
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(loss))(0.7, stop_step, frozen), rtol=1e-5)
    through_noise = jax.grad(
        lambda n: jnp.sum(backward_simulation(velocity, n, KEYS, timesteps=TIMESTEPS, stop_step=stop_step)[0])
    )
    np.testing.assert_array_equal(through_noise(noise), np.zeros_like(noise))


def test_the_network_is_traced_once():
    calls = []

    def counted(latents, timesteps):
        calls.append((latents.shape, timesteps.shape))
        return velocity(latents, timesteps).astype(jnp.bfloat16)

    x0 = student_sample(counted, initial_noise(KEYS, SHAPE), KEYS, timesteps=TIMESTEPS)
    assert calls == [((3, *SHAPE), (3,))]
    assert x0.dtype == jnp.float32


def test_a_student_that_knows_the_data_returns_it():
    data = jax.random.normal(jax.random.key(5), (3, *SHAPE))

    def perfect(latents, timesteps):
        return (latents - data) / (timesteps / 1000)[:, None, None, None, None]

    x0 = student_sample(perfect, initial_noise(KEYS, SHAPE), KEYS, timesteps=TIMESTEPS)
    np.testing.assert_allclose(x0, data, atol=1e-6)


def test_renoise_uses_the_flow():
    x0, half = jnp.ones((3, *SHAPE)), jnp.full(3, 500.0)
    noise = renoise(jnp.zeros_like(x0), KEYS, step=1, timesteps=jnp.full(3, 1000.0))
    expected = add_noise(x0=x0, noise=noise, sigmas=half / 1000)
    np.testing.assert_allclose(renoise(x0, KEYS, step=1, timesteps=half), expected, atol=1e-6)


@pytest.mark.parametrize("timesteps", [(), (1000, 1000), (500, 900), (1001, 500), (1000, 0), (float("nan"),)])
def test_bad_schedules_are_refused(timesteps):
    with pytest.raises(UserError, match="timesteps"):
        StudentSchedule(timesteps)


def test_schedules_compare_by_value():
    assert StudentSchedule([1000, 500]) == StudentSchedule((1000.0, 500.0))
    assert TIMESTEPS == (1000, 900, 757, 522)


def test_a_first_timestep_below_1000_starts_from_weaker_noise():
    noise, times = initial_noise(KEYS, SHAPE), (800.0, 300.0)
    xt, _ = backward_simulation(velocity, noise, KEYS, timesteps=times, stop_step=0)
    np.testing.assert_allclose(xt, 0.8 * noise, rtol=1e-6)
    end = student_sample(velocity, noise, KEYS, timesteps=times[:1])
    np.testing.assert_allclose(end, xt - 0.8 * velocity(xt, jnp.full(3, 800.0)), rtol=1e-5, atol=1e-6)


def test_random_times_fall_from_1000_and_belong_to_the_example():
    keys = jax.random.split(jax.random.key(5), 4000)
    times = np.asarray(random_times(keys, 4, shift=5.0))
    assert (times[0] == 1000).all()
    assert (np.diff(times, axis=0) <= 0).all()
    np.testing.assert_array_equal(random_times(keys[7:9], 4, shift=5.0), times[:, 7:9])
    # The second is a draw of its own: the quantiles of a shift of 5.
    np.testing.assert_allclose(np.quantile(times[1], [0.05, 0.25, 0.5, 0.75]), [208, 625, 833, 938], atol=30)


def test_a_rollout_over_own_times_is_that_of_each_example_alone():
    times, noise = random_times(KEYS, 4, shift=5.0), initial_noise(KEYS, SHAPE)
    xt, last = backward_simulation(velocity, noise, KEYS, timesteps=times, stop_step=3)
    np.testing.assert_array_equal(last, times[3])
    alone, _ = backward_simulation(
        velocity, noise[1:2], KEYS[1:2], timesteps=tuple(map(float, times[:, 1])), stop_step=3
    )
    np.testing.assert_allclose(alone[0], xt[1], rtol=0, atol=1e-5)

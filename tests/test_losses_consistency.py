"""The consistency losses in float64: against the trigonometric form, a flow that is known, and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion.flow import add_noise, flow_step, velocity_along_flow, x0_from_velocity
from avd_jax.losses.consistency import (
    consistency_loss,
    consistency_tangent,
    discrete_consistency_loss,
    normalised,
    trigonometric_speed,
)

SHAPE = (4, 2, 3, 2, 3)
SIGMAS = np.array([0.0, 0.2, 0.7, 0.98])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def over_latents(x):
    return jnp.asarray(x)[:, None, None, None, None]


def network(xt, timesteps):
    """A velocity that bends in the point and in time."""
    sigma = over_latents(timesteps / 1000)
    mix = normal(7, (3, 3))
    return jnp.tanh((1 + sigma) * xt @ mix) + jnp.sin(3 * sigma) * xt


def teacher(xt, timesteps):
    return jnp.cos(over_latents(timesteps / 1000)) * (xt @ normal(8, (3, 3)))


def point():
    xt, sigmas = normal(0), jnp.asarray(SIGMAS)
    flow = teacher(xt, 1000 * sigmas)
    velocity, change = velocity_along_flow(network, xt, 1000 * sigmas, flow)
    return {"velocity": velocity, "velocity_change": change, "teacher_velocity": flow, "sigmas": sigmas}


def trigonometric(strength):
    """The tangent as the originals compute it: x and F on the trigonometric path, the product with tangents c s."""
    sigmas = jnp.asarray(SIGMAS)
    angles = jnp.arctan2(sigmas, 1 - sigmas)
    cos, sin = (over_latents(f(angles)) for f in (jnp.cos, jnp.sin))
    x = normal(0) * over_latents(1 / trigonometric_speed(sigmas))

    def rotating(velocity_fn):
        def F(x, t):
            c, s = over_latents(jnp.cos(t)), over_latents(jnp.sin(t))
            v = velocity_fn(x / (c + s), 1000 * jnp.sin(t) / (jnp.cos(t) + jnp.sin(t)))
            return ((c - s) * x + v) / (c + s)

        return F

    of_teacher = rotating(teacher)(x, angles)
    tangents = cos * sin * of_teacher, (cos * sin)[:, 0, 0, 0, 0]
    of_student, change = jax.jvp(rotating(network), (x, angles), tangents)
    pull = -cos * jnp.sqrt(1 - strength**2 * sin**2) * (of_student - of_teacher)
    return pull - strength * (cos * sin * x + change)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_it_is_the_tangent_of_the_trigonometric_path(strength):
    # At sigma 1 both vanish, and c times x is finite on one side only: the levels stop short of it.
    np.testing.assert_allclose(
        consistency_tangent(**point(), strength=strength), trigonometric(strength), rtol=0, atol=1e-10
    )


def test_without_strength_it_is_a_regression_on_the_teachers_velocity():
    given = point()
    a = trigonometric_speed(given["sigmas"])
    weight = over_latents((1 - given["sigmas"]) / a * a)
    expected = -weight * (given["velocity"] - given["teacher_velocity"])
    np.testing.assert_allclose(consistency_tangent(**given, strength=0.0), expected, atol=1e-14)


def test_at_full_strength_it_is_how_the_prediction_changes_along_the_flow():
    """Central differences of x0 along the teacher's straight line through the point."""
    given, step = point(), 1e-5
    xt, sigmas, flow = normal(0), given["sigmas"], given["teacher_velocity"]

    def prediction(offset):
        moved = xt + offset * flow
        return x0_from_velocity(xt=moved, velocity=network(moved, 1000 * (sigmas + offset)), sigmas=sigmas + offset)

    change = (prediction(step) - prediction(-step)) / (2 * step)
    a = trigonometric_speed(sigmas)
    found = consistency_tangent(**given, strength=1.0)
    np.testing.assert_allclose(found, over_latents((1 - sigmas) / a * a**2) * change, atol=1e-6)


def test_the_exact_consistency_function_of_a_linear_flow_has_none():
    """dy/dsigma = k y has y(sigma) = e^(k sigma) y(0): the exact student predicts y e^(-k sigma)."""
    k, sigmas = 0.8, jnp.asarray(SIGMAS[1:])
    xt = normal(0)[1:]

    def exact(xt, timesteps):
        sigma = over_latents(timesteps / 1000)
        return xt * (1 - jnp.exp(-k * sigma)) / sigma

    velocity, change = velocity_along_flow(exact, xt, 1000 * sigmas, k * xt)
    tangent = consistency_tangent(
        velocity=velocity, velocity_change=change, teacher_velocity=k * xt, sigmas=sigmas, strength=1.0
    )
    np.testing.assert_allclose(tangent, 0, atol=1e-14)
    direction, rms = normalised(tangent)
    np.testing.assert_allclose(rms, 0, atol=1e-14)
    assert consistency_loss(velocity=velocity, direction=direction, sigmas=sigmas).max() < 1e-18


def test_the_gradient_is_the_direction_and_the_same_for_every_size():
    gradients = {}
    for repeats in (1, 5):
        direction, _ = normalised(jnp.tile(normal(1), (1, repeats, 1, 1, 1)))
        velocity = jnp.tile(normal(2), (1, repeats, 1, 1, 1))
        given = {"direction": direction, "sigmas": jnp.asarray(SIGMAS)}
        found = jax.grad(lambda v, given=given: consistency_loss(velocity=v, **given).sum())(velocity)
        expected = -over_latents(trigonometric_speed(given["sigmas"])) * direction / velocity[0].size
        np.testing.assert_allclose(found, expected, atol=1e-14)
        gradients[repeats] = jnp.sqrt(jnp.mean(direction**2, axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(gradients[1], 1, atol=1e-3)
    np.testing.assert_allclose(gradients[1], gradients[5], rtol=1e-12)


@pytest.mark.parametrize("where", ["velocity", "direction"])
def test_an_example_that_is_not_finite_leaves_the_others_alone(where):
    given = {"velocity": normal(2), "direction": normalised(normal(1))[0]}
    sigmas = jnp.asarray(SIGMAS)

    def loss(velocity, direction):
        losses = consistency_loss(velocity=velocity, direction=direction, sigmas=sigmas)
        return losses.sum(), losses

    good, expected = jax.grad(loss, has_aux=True)(given["velocity"], given["direction"])
    given[where] = given[where].at[1, 0, 1, 0, 2].set(jnp.nan)
    gradient, losses = jax.grad(loss, has_aux=True)(given["velocity"], given["direction"])
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(gradient[others], good[others])
    np.testing.assert_array_equal(losses[others], expected[others])
    assert losses[1] == 0
    np.testing.assert_array_equal(gradient[1], 0)


def test_the_discrete_loss_is_zero_on_a_straight_flow_and_has_no_gradient_in_the_target():
    x0, noise, sigmas = normal(0), normal(1), jnp.asarray(SIGMAS)
    xt, following = add_noise(x0=x0, noise=noise, sigmas=sigmas), sigmas / 2
    moved = flow_step(xt=xt, velocity=noise - x0, sigmas=sigmas, next_sigmas=following)
    np.testing.assert_allclose(moved, add_noise(x0=x0, noise=noise, sigmas=following), atol=1e-14)
    ends = [x0_from_velocity(xt=x, velocity=noise - x0, sigmas=s) for x, s in ((xt, sigmas), (moved, following))]
    np.testing.assert_allclose(discrete_consistency_loss(x0=ends[0], next_x0=ends[1]), 0, atol=1e-28)
    one, other = normal(2), normal(3)
    np.testing.assert_allclose(
        discrete_consistency_loss(x0=one, next_x0=other), ((one - other) ** 2).mean((1, 2, 3, 4)) / 2, rtol=1e-12
    )
    gradients = jax.grad(lambda a, b: discrete_consistency_loss(x0=a, next_x0=b).sum(), (0, 1))(one, other)
    np.testing.assert_allclose(gradients[0], (one - other) / one[0].size, rtol=1e-12)
    np.testing.assert_array_equal(gradients[1], 0)

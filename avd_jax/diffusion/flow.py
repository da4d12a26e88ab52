"""Rectified flow as Wan2.1 uses it: the noise schedule, and the way between x0, noise, velocity and xt.

    xt = (1 - sigma) x0 + sigma noise,    velocity = noise - x0,    x0 = xt - sigma velocity
    sigma(u) = s u / (1 + (s - 1) u)      with the timestep shift s

One convention holds everywhere: **a timestep is what the network is given, and sigma = timestep / 1000**. The shift
acts once, where timesteps are made (drawn in `sample_timesteps`, or laid out by a solver), and never again after that.

So the authors' student timesteps 1000, 900, 757, 522 have sigmas 1, 0.9, 0.757, 0.522: in their code, too, sigma stays
t/1000 whatever shift the schedule object was built with (docs/method.md, last section). They are near a shift of 3 of
1000, 750, 500, 250, which is 1000, 900, 750, 500. But no one shift makes them (the three would need 3.00, 3.12, 3.28),
so configs list them as they are, shifted already.

Arithmetic is at least float32: bf16 has 8 bits, and x0 is a small difference of large terms if sigma is near 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Key

from avd_jax.shapes import Latents, Sigmas, Timesteps, typechecked

NUM_TRAIN_TIMESTEPS = 1000


def at_least_float32(x: Array) -> Array:
    """Return `x` in float32, or as it is if it is wider already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def shifted_sigma(u, shift: float):
    """Return the noise level at uniform time `u` in [0, 1] (0: data, 1: noise); any array or float, element by element.

    docs/method.md, Notation. A shift above 1 spends more of the time at high noise; 1 leaves `u` as it is.
    """
    return shift * u / (1 + (shift - 1) * u)


def sigma_of_timestep(timesteps):
    """Return the noise level of network timesteps in 0..1000: a division, since they are shifted already."""
    return timesteps / NUM_TRAIN_TIMESTEPS


@typechecked
def sample_timesteps(
    key: Key[Array, ""], batch: int, *, shift: float | int, minimum: float | int = 20.0, maximum: float | int = 980.0
) -> Timesteps:
    """Draw random network timesteps: uniform, then shifted, then clamped.

    Args:
      key: random key.
      batch: how many.
      shift: timestep shift, 5.0 in the paper.
      minimum, maximum: bounds in 0..1000; the mass beyond them lands on them, as the paper clamps and does not redraw.

    Returns:
      [B] float32.
    """
    u = jax.random.uniform(key, (batch,), jnp.float32)
    return jnp.clip(NUM_TRAIN_TIMESTEPS * shifted_sigma(u, shift), minimum, maximum)


@typechecked
def sample_logit_normal_timesteps(
    key: Key[Array, ""], batch: int, *, mean: float | int, deviation: float | int
) -> Timesteps:
    """Draw random network timesteps, [B] float32, whose ln(sigma / (1 - sigma)) is normal with mean and deviation."""
    logits = mean + deviation * jax.random.normal(key, (batch,), jnp.float32)
    return NUM_TRAIN_TIMESTEPS * jax.nn.sigmoid(logits)


@typechecked
def add_noise(*, x0: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
    """Return xt = (1 - sigma) x0 + sigma noise, [B F H W C], for one noise level an example."""
    sigmas = _over_latents(sigmas)
    return (1 - sigmas) * at_least_float32(x0) + sigmas * at_least_float32(noise)


@typechecked
def velocity_target(*, x0: Latents, noise: Latents) -> Latents:
    """Return what the network learns to predict, noise - x0, [B F H W C]."""
    return at_least_float32(noise) - at_least_float32(x0)


@typechecked
def flow_step(*, xt: Latents, velocity: Latents, sigmas: Sigmas, next_sigmas: Sigmas) -> Latents:
    """Return where a velocity at xt leads in one Euler step, xt + (next_sigma - sigma) velocity, [B F H W C].

    It is an Euler step of the trigonometric path too: both keep the x0 and the noise that the velocity implies.
    """
    step = at_least_float32(next_sigmas) - at_least_float32(sigmas)
    return at_least_float32(xt) + _over_latents(step) * at_least_float32(velocity)


@typechecked
def velocity_along_flow(
    velocity_fn: Callable, xt: Latents, timesteps: Timesteps, direction: Latents
) -> tuple[Latents, Latents]:
    """Return a network's velocity v at a point and dv/dsigma along a flow through it, both [B F H W C].

    Args:
      velocity_fn: (latents [B F H W C], timesteps [B]) -> velocity; `jax.jvp` has to go through it.
      xt: the point.
      timesteps: its network timesteps.
      direction: dxt/dsigma of the flow, such as the teacher's velocity there.
    """
    per_sigma = jnp.full_like(timesteps, NUM_TRAIN_TIMESTEPS)
    return jax.jvp(velocity_fn, (xt, timesteps), (direction.astype(xt.dtype), per_sigma))


@typechecked
def x0_from_velocity(*, xt: Latents, velocity: Latents, sigmas: Sigmas) -> Latents:
    """Return the x0 that a velocity at xt implies, xt - sigma velocity, [B F H W C]."""
    return at_least_float32(xt) - _over_latents(sigmas) * at_least_float32(velocity)


def _over_latents(sigmas: Array) -> Array:
    return rearrange(at_least_float32(sigmas), "b -> b 1 1 1 1")

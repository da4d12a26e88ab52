"""Consistency of a student along its teacher's flow: continuous in time (sCM, rCM) and between two times (discrete).

The consistency function is the student's x0 prediction, f(y, sigma) = y - sigma v. It should not change along the
guided teacher's flow dy/dsigma = v_T, so the loss follows its rate of change there (docs/rcm.md):

    v' = dv/dsigma along the flow,    df/dsigma = v_T - v - sigma v'

In the angle t of the trigonometric path, tan t = sigma / (1 - sigma), with a = sqrt((1 - sigma)^2 + sigma^2),
c = cos t = (1 - sigma) / a and s = sin t = sigma / a, the tangent of weight c and strength r is

    g = -c a sqrt(1 - r^2 s^2) (v - v_T) + r [c a^2 df/dsigma + c^2 a (v - v_T)]

which is c df/dt at r = 1, and a plain regression on the teacher's velocity at r = 0. With g at a root mean square of 1,
G = g / (rms(g) + 7e-5), the loss is L_CM = 1/2 mean((F - stop_grad(F + G))^2); F = a v + ... is the velocity in t.

From arXiv 2410.11081 and 2510.08431 with NVlabs/rcm's code. There the sum of squares of G is 1 and the loss a sum: its
weight 100 is 100 / sqrt(elements) here, 0.07 for Wan2.1 1.3B, whatever the number of elements.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from avd_jax.diffusion.flow import at_least_float32
from avd_jax.shapes import Array, Latents, PerExample, Sigmas, typechecked

# What their 0.1 beside the norm of 1,996,800 elements is beside a root mean square.
SMALLEST_RMS = 7e-5


@typechecked
def trigonometric_speed(sigmas: Sigmas) -> Sigmas:
    """Return a = sqrt((1 - sigma)^2 + sigma^2), [B]: velocities along t differ by a times those along sigma."""
    sigmas = at_least_float32(sigmas)
    return jnp.sqrt(jnp.square(1 - sigmas) + jnp.square(sigmas))


@typechecked
def consistency_tangent(
    *,
    velocity: Latents,
    velocity_change: Latents,
    teacher_velocity: Latents,
    sigmas: Sigmas,
    strength: float | Array,
) -> Latents:
    """Return g, [B F H W C].

    Args:
      velocity: v, the student's at a point.
      velocity_change: v', its rate of change in sigma along the teacher's flow there.
      teacher_velocity: v_T, guided, at the same point.
      sigmas: noise levels of the point.
      strength: r in 0..1.
    """
    velocity, change, teacher = (at_least_float32(x) for x in (velocity, velocity_change, teacher_velocity))
    sigma, a = (rearrange(x, "b -> b 1 1 1 1") for x in (at_least_float32(sigmas), trigonometric_speed(sigmas)))
    cos, sin = (1 - sigma) / a, sigma / a
    error = velocity - teacher
    follow = cos * jnp.square(a) * (-error - sigma * change) + jnp.square(cos) * a * error
    return -cos * a * jnp.sqrt(1 - jnp.square(strength * sin)) * error + strength * follow


@typechecked
def normalised(tangent: Latents) -> tuple[Latents, PerExample]:
    """Return a tangent with a root mean square of 1 in each example, and what it was, [B]."""
    rms = jnp.sqrt(reduce(jnp.square(at_least_float32(tangent)), "b f h w c -> b", "mean"))
    return tangent / (rearrange(rms, "b -> b 1 1 1 1") + SMALLEST_RMS), rms


@typechecked
def consistency_loss(*, velocity: Latents, direction: Latents, sigmas: Sigmas) -> PerExample:
    """Return L_CM of each example, [B]. Its gradient in the velocity is -a G over the number of elements.

    An example with a value that is not finite counts as 0 and gets no gradient. The others are not touched by it.

    Args:
      velocity: the student's, with gradient.
      direction: G, from `normalised`, of the same point.
      sigmas: noise levels of the point.
    """
    finite = jnp.isfinite(at_least_float32(velocity)).all((1, 2, 3, 4)) & jnp.isfinite(direction).all((1, 2, 3, 4))
    kept = rearrange(finite, "b -> b 1 1 1 1")
    # Before the difference is made: the gradient of a value that is thrown away would be 0 times nan.
    velocity, direction = (jnp.where(kept, x, 0) for x in (at_least_float32(velocity), direction))
    speed = rearrange(trigonometric_speed(sigmas), "b -> b 1 1 1 1")
    moved = speed * (velocity - jax.lax.stop_gradient(velocity))
    return 0.5 * reduce(jnp.square(moved - jax.lax.stop_gradient(direction)), "b f h w c -> b", "mean")


@typechecked
def discrete_consistency_loss(*, x0: Latents, next_x0: Latents) -> PerExample:
    """Return half the mean square of the difference of two x0 predictions, [B] (NVlabs/rcm, `cm_type=dcm`).

    Args:
      x0: the student's at a point, with gradient.
      next_x0: its at the next point of the teacher's flow; a constant.
    """
    target = jax.lax.stop_gradient(at_least_float32(next_x0))
    return 0.5 * reduce(jnp.square(at_least_float32(x0) - target), "b f h w c -> b", "mean")

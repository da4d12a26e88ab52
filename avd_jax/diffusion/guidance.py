"""Classifier-free guidance in Wan's own convention (docs/method.md, Guidance); the formula is written here only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from avd_jax.diffusion.flow import at_least_float32
from avd_jax.shapes import Latents, typechecked


@typechecked
def guide(*, cond: Latents, uncond: Latents, scale: float | int) -> Latents:
    """Return uncond + scale * (cond - uncond), [B F H W C]: 0 is unconditional, 1 conditional, the paper uses 5.

    Velocities and x0 predictions (at one xt) may both be guided: x0 is affine in the velocity. The authors' code
    computes cond + 5 * (cond - uncond), which is a scale of 6 here.

    The difference is taken in float32 at least: it is small, and it is scaled up.
    """
    cond, uncond = at_least_float32(cond), at_least_float32(uncond)
    return uncond + scale * (cond - uncond)


def guided_velocity(velocity_fn: Callable[[Any], Latents], *, conditions, negative_conditions, scale: float) -> Latents:
    """Return the guided velocity of a network at one point, [B F H W C].

    Args:
      velocity_fn: conditions -> velocity [B F H W C]; traced once.
      conditions: what the network is told, a pytree of arrays [B ...].
      negative_conditions: likewise for the unconditional pass, or the same for all examples, [...].
      scale: of `guide`.
    """
    negative = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape).astype(c.dtype), negative_conditions, conditions)
    # One after the other: the network is compiled once, holds the activations of one pass, and no shard has to move.
    both = jax.tree.map(lambda *passes: jnp.stack(passes), conditions, negative)
    cond, uncond = jax.lax.map(velocity_fn, both)
    return guide(cond=cond, uncond=uncond, scale=scale)

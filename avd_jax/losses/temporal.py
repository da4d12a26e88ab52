"""Temporal regularisation (AVD, Eq. 8): the generated frames are to differ, up to a point.

    L_temp = -log(E[Var_time(x)] + eps)

The variance is the population variance along frames at each position and channel; the expectation runs over
everything else, the batch included, so unlike the other losses it is one number a batch.
"""

import jax
import jax.numpy as jnp
from einops import reduce

from avd_jax.diffusion.flow import at_least_float32
from avd_jax.shapes import Latents, PerExample, Scalar, typechecked


@typechecked
def temporal_variance(x: Latents) -> PerExample:
    """Return the variance along frames of each example, [B], averaged over height, width and channels."""
    # Float32: the variance is a mean of small squares.
    variance = jnp.var(at_least_float32(x), axis=1)
    return reduce(variance, "b h w c -> b", "mean")


@typechecked
def temporal_loss(x: Latents, *, clip: float | int = 0.6, eps: float = 1e-6) -> Scalar:
    """Return L_temp of a batch of generated latents [B F H W C].

    The value is always that of Eq. 8, so that it can be logged. What the clip truncates is the gradient: it is zero
    once the loss is at or below `clip`, and that of Eq. 8 above it. The decision is one for the global batch (the
    authors' code takes it on each device).

    Args:
      x: the latents that the distribution matching loss sees.
      clip: loss at which the frames differ enough, 0.6 in the paper; -inf never truncates.
      eps: keeps the logarithm finite if nothing moves.
    """
    loss = -jnp.log(jnp.mean(temporal_variance(x)) + eps)
    return jnp.where(loss > clip, loss, jax.lax.stop_gradient(loss))

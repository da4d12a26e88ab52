"""Classifier-free guidance in Wan's own convention; nothing else in the package spells the formula out."""

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

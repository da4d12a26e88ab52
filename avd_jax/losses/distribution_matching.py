"""Distribution matching (AVD, Eq. 4, after Yin et al. 2024) and the loss that keeps its fake_score up to date.

    grad = (fake_x0 - real_x0) / mean|x0 - real_x0|,    L_KL = 1/2 mean((x0 - stop_grad(x0 - grad))^2)

Means run over all axes but the batch; each function returns a value an example and the caller reduces.
"""

import jax
import jax.numpy as jnp
from einops import reduce

from avd_jax.diffusion.flow import at_least_float32, velocity_target
from avd_jax.shapes import Latents, PerExample, typechecked


@typechecked
def distribution_matching_gradient(*, x0: Latents, fake_x0: Latents, real_x0: Latents) -> Latents:
    """Return the normalised direction from the teacher's prediction to the student's distribution (Eq. 4).

    Args:
      x0: the student's sample.
      fake_x0: fake_score's x0 prediction at a noised `x0`.
      real_x0: the teacher's, guided, at the same point.

    Returns:
      [B F H W C], a constant to differentiation. An example that equals `real_x0` throughout has a normaliser of 0 and
      gets no gradient: it is where the teacher wants it. A nan in the inputs stays one, so that a run that has diverged
      shows it.
    """
    x0, fake_x0, real_x0 = (jax.lax.stop_gradient(at_least_float32(x)) for x in (x0, fake_x0, real_x0))
    distance = reduce(jnp.abs(x0 - real_x0), "b f h w c -> b 1 1 1 1", "mean")
    return jnp.where(distance == 0, 0, (fake_x0 - real_x0) / distance)


@typechecked
def distribution_matching_loss(*, x0: Latents, fake_x0: Latents, real_x0: Latents) -> PerExample:
    """Return L_KL of each example, [B] (Eq. 4); arguments as in `distribution_matching_gradient`.

    Its value is half the mean square of that gradient. Its derivative with respect to x0 is that gradient over the
    number of elements of an example.
    """
    gradient = distribution_matching_gradient(x0=x0, fake_x0=fake_x0, real_x0=real_x0)
    x0 = at_least_float32(x0)
    target = jax.lax.stop_gradient(x0 - gradient)
    return 0.5 * reduce(jnp.square(x0 - target), "b f h w c -> b", "mean")


@typechecked
def flow_matching_loss(*, velocity: Latents, x0: Latents, noise: Latents) -> PerExample:
    """Return the mean squared error of fake_score's velocity on the student's samples, [B]; docs/method.md, fake_score.

    `x0` is taken as a constant: this loss trains fake_score, never the student that made the sample.
    """
    target = jax.lax.stop_gradient(velocity_target(x0=x0, noise=noise))
    return reduce(jnp.square(at_least_float32(velocity) - target), "b f h w c -> b", "mean")

"""Adaptive regression (AVD, Eqs. 5-7): real latents pull on the student, less if it fits them worse.

    w = 1 - sigmoid(k (L - Lbar[t])),    Lbar[t] <- alpha Lbar[t] + (1 - alpha) L

L is one example's regression loss at timestep t of the student's schedule, Lbar the running mean of such losses.

Within a batch, every weight comes from the history before the batch. The history afterwards is what the batch's
examples would have left behind one after another, in batch order. Both follow from the global batch alone, so one
device and a pod agree. The update is a closed form of that sequence, with no loop over examples.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Bool, Float, Int

from avd_jax.diffusion.flow import at_least_float32
from avd_jax.errors import UserError
from avd_jax.shapes import Latents, PerExample, typechecked

TimestepIndex = Int[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossHistory:
    """The running mean loss at each of the student's timesteps. One for the whole run, replicated, in its checkpoints.

    Attributes:
      mean: [T] float32, 0 for a timestep that was not seen.
      seen: [T] bool.
    """

    mean: Float[Array, " timesteps"]
    seen: Bool[Array, " timesteps"]

    @classmethod
    def init(cls, num_timesteps: int) -> "LossHistory":
        """Return the history of a student with `num_timesteps` steps that has seen nothing."""
        return cls(mean=jnp.zeros(num_timesteps, jnp.float32), seen=jnp.zeros(num_timesteps, bool))


@typechecked
def regression_loss(*, velocity: Latents, target: Latents) -> PerExample:
    """Return the mean squared error of a predicted velocity, [B] (Eq. 5)."""
    return reduce(jnp.square(at_least_float32(velocity) - at_least_float32(target)), "b f h w c -> b", "mean")


@typechecked
def adaptive_weight(loss: PerExample, history_mean: PerExample, *, k: float | int) -> PerExample:
    """Return 1 - sigmoid(k (loss - history_mean)), [B] (Eq. 7), a constant to differentiation.

    Args:
      loss: each example's regression loss.
      history_mean: the mean loss at each example's timestep.
      k: steepness, 3.0 in the paper.
    """
    # sigmoid(-z) is 1 - sigmoid(z) without the rounding to 0 or 1 of the subtraction.
    return jax.lax.stop_gradient(jax.nn.sigmoid(-k * (at_least_float32(loss) - at_least_float32(history_mean))))


@typechecked
def update_history(
    history: LossHistory,
    losses: PerExample,
    timestep_index: TimestepIndex,
    *,
    alpha: float | int,
) -> LossHistory:
    """Return the history after a batch (Eq. 6), as if its examples had come one after another in batch order.

    Args:
      history: before the batch, T timesteps.
      losses: each example's regression loss.
      timestep_index: each example's step of the student, 0..T-1.
      alpha: share of the old mean that stays, 0.95 in the paper. A timestep's first loss is its mean.
    """
    losses = jax.lax.stop_gradient(at_least_float32(losses))
    hits = timestep_index[:, None] == jnp.arange(history.mean.shape[0])  # [B T]
    earlier = jnp.cumsum(hits, axis=0) - hits
    count = hits.sum(axis=0)

    share = jnp.where((earlier == 0) & ~history.seen, 1.0, 1.0 - alpha)
    left = alpha ** (count - 1 - earlier).astype(losses.dtype)  # of an example's share, after the batch's later ones
    new = jnp.where(hits, share * left * losses[:, None], 0).sum(axis=0)
    # An unseen timestep's old mean is 0, so it needs no case of its own.
    mean = alpha ** count.astype(losses.dtype) * history.mean + new
    # A state keeps its dtype, whatever that of the losses.
    return LossHistory(mean=mean.astype(history.mean.dtype), seen=history.seen | (count > 0))


@typechecked
def weights_and_update(
    history: LossHistory,
    losses: PerExample,
    timestep_index: TimestepIndex,
    *,
    alpha: float | int = 0.95,
    k: float | int = 3.0,
    weight_uses: str = "before",
) -> tuple[PerExample, LossHistory]:
    """Return each example's weight, [B], and the history after the batch (Eqs. 6 and 7).

    Args:
      history: before the batch, T timesteps.
      losses: each example's regression loss; no gradient flows through it from here.
      timestep_index: each example's step of the student, 0..T-1.
      alpha: share of the old mean that stays.
      k: steepness of the weight.
      weight_uses: 'before' (paper): the mean before the batch. 'after' (the authors' code): that mean updated with the
        example's own loss alone, which amounts to a k of alpha k.

    A timestep's first loss is its history, so the example weighs 1/2, as do others of that timestep in the same batch.

    Raises:
      UserError: `weight_uses` is neither.
    """
    if weight_uses not in ("before", "after"):
        raise UserError(f"weight_uses is {weight_uses!r}: use 'before' or 'after'")
    losses = jax.lax.stop_gradient(at_least_float32(losses))
    mean = jnp.where(history.seen[timestep_index], history.mean[timestep_index], losses)
    if weight_uses == "after":
        mean = alpha * mean + (1 - alpha) * losses
    weights = adaptive_weight(losses, mean, k=k)
    return weights, update_history(history, losses, timestep_index, alpha=alpha)

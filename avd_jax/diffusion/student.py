"""The few-step student: its rollout, and the backward simulation that feeds its loss (PAPER.md, Training, Algorithm 1).

A step predicts x0 from xt and re-noises it with fresh noise to the next timestep; after the last step the "next
timestep" is 0, where re-noising changes nothing, so every step is the same program and the network is traced once.

Randomness is per example: key `b` of `keys: [B]` decides everything about example `b`, whatever else is in the batch
and however it is sharded. `fold_in(key, 0)` gives the initial noise, `fold_in(key, i + 1)` the noise added after step
i. The noise is generated example by example under `vmap`, which for JAX's default threefry keys draws what a lone
example would.

A rollout whose early steps work on fewer frames is two of these loops: `student_sample` on the first timesteps gives
their x0, then interpolation, then `renoise` to where the second loop goes on.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from avd_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, add_noise, at_least_float32, sigma_of_timestep, x0_from_velocity
from avd_jax.errors import UserError
from avd_jax.shapes import Latents, Timesteps, typechecked

Keys = Key[Array, " batch"]


@dataclass(frozen=True)
class StudentSchedule:
    """The timesteps that a student was trained for; belongs to its weights and is saved with them.

    Attributes:
      timesteps: network timesteps (1000 sigma) from noise to data; the default is the authors' config.

    Raises:
      UserError: where they are not strictly decreasing within (0, 1000].
    """

    timesteps: tuple[float | int, ...] = (1000.0, 900.0, 757.0, 522.0)

    def __post_init__(self):
        times = tuple(float(t) for t in self.timesteps)
        decreasing = all(a > b for a, b in itertools.pairwise((*times, 0.0)))
        if not times or times[0] > NUM_TRAIN_TIMESTEPS or not decreasing:
            raise UserError(f"timesteps are {list(self.timesteps)}: give decreasing numbers, at most 1000 and above 0")
        object.__setattr__(self, "timesteps", times)


@typechecked
def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Return the noise that each example starts from, [B *shape] float32; `shape` is an example's, (F, H, W, C)."""
    return _example_noise(keys, 0, shape)


@typechecked
def renoise(x0: Latents, keys: Keys, *, step: int | Int[Array, ""], timesteps: Timesteps) -> Latents:
    """Return x0 [B F H W C] noised to `timesteps` [B] with the noise that belongs after `step` (0-based)."""
    noise = _example_noise(keys, step + 1, x0.shape[1:])
    return add_noise(x0=x0, noise=noise, sigmas=sigma_of_timestep(timesteps))


@typechecked
def student_sample(velocity_fn: Callable, noise: Latents, keys: Keys, *, timesteps: Sequence[float | int]) -> Latents:
    """Run all steps of the student.

    Args:
      velocity_fn: (latents [B F H W C], timesteps [B] float32) -> velocity [B F H W C]; traced once.
      noise: [B F H W C], from `initial_noise`.
      keys: [B] typed random keys, the ones that `noise` was made with.
      timesteps: `StudentSchedule.timesteps`.

    Returns:
      the last x0 prediction, [B F H W C] in float32 at least.
    """
    return _roll_out(velocity_fn, noise, keys, timesteps, len(timesteps))


@typechecked
def backward_simulation(
    velocity_fn: Callable,
    noise: Latents,
    keys: Keys,
    *,
    timesteps: Sequence[float | int],
    stop_step: int | Int[Array, ""],
) -> tuple[Latents, Timesteps]:
    """Run the student, without gradient, up to the input of one of its steps (PAPER.md, Training).

    The loop's length is dynamic: `stop_step` network evaluations are made and no more, whatever value it is traced for.
    The caller makes the step at the returned point itself, with gradient or without.

    Args:
      velocity_fn: (latents [B F H W C], timesteps [B] float32) -> velocity [B F H W C]; traced once.
      noise: [B F H W C], from `initial_noise`.
      keys: [B] typed random keys, the ones that `noise` was made with.
      timesteps: `StudentSchedule.timesteps`.
      stop_step: integer in 0..len(timesteps)-1, one for the batch, usually traced; 0 returns the noise itself. The
        random choice must be the same on every host.

    Returns:
      xt [B F H W C], the input of step `stop_step`, and that step's timestep for each example, [B] float32.
    """

    def without_gradient(latents, times):
        # A loop of dynamic length has no reverse mode, so no tangent may enter it through the network's parameters.
        return jax.lax.stop_gradient(velocity_fn(latents, times))

    xt = _roll_out(without_gradient, jax.lax.stop_gradient(noise), keys, timesteps, stop_step)
    timestep = jnp.asarray(timesteps, jnp.float32)[stop_step]
    return xt, jnp.full(noise.shape[:1], timestep)


def _roll_out(velocity_fn, noise, keys, timesteps, num_steps):
    """Return the input of step `num_steps` [B F H W C], which behind the last step is the final x0."""
    batch = noise.shape[:1]
    times = jnp.asarray((*timesteps, 0.0), jnp.float32)

    def step(i, xt):
        now = jnp.full(batch, times[i])
        velocity = velocity_fn(xt, now)
        x0 = x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigma_of_timestep(now))
        return renoise(x0, keys, step=i, timesteps=jnp.full(batch, times[i + 1]))

    return jax.lax.fori_loop(0, num_steps, step, at_least_float32(noise))


def _example_noise(keys, index, shape):
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))(keys)

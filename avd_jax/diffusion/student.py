"""The few-step student: its rollout, and the backward simulation that feeds its loss (docs/method.md, Algorithm 1).

A step predicts x0 from xt and re-noises it with fresh noise to the next timestep. After the last step the "next
timestep" is 0. Re-noising to 0 changes nothing, so every step is the same program and the network is traced once. The
first step starts from noise as strong as its timestep says: if that is below 1000, sigma times standard normal noise.

Randomness is per example: key `b` of `keys: [B]` decides everything about example `b`, whatever else is in the batch
and however it is sharded. `fold_in(key, 0)` gives the initial noise, `fold_in(key, i + 1)` the noise added after step
i. The noise is generated example by example under `vmap`, which for JAX's default threefry keys draws what a lone
example would.

With `HalfRate` the first steps work on every second frame (docs/method.md, Frame interpolation): the last of them ends
in the interpolation of its x0 to all frames, which is re-noised for the first step at the full rate. Half-rate noise is
every second frame of the noise that a full rate draws, so a seed means the same at both rates.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from avd_jax.diffusion.flow import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    at_least_float32,
    sample_timesteps,
    sigma_of_timestep,
    x0_from_velocity,
)
from avd_jax.errors import UserError
from avd_jax.shapes import Latents, Timesteps, typechecked

Keys = Key[Array, " batch"]
OwnTimes = Float[Array, "steps batch"]  # timesteps of each example


@dataclass(frozen=True)
class StudentSchedule:
    """The timesteps that a student was trained for; belongs to its weights and is saved with them.

    Attributes:
      timesteps: network timesteps (1000 sigma) from noise to data; the default is the authors' config.

    Raises:
      UserError: if they are not strictly decreasing within (0, 1000].
    """

    timesteps: tuple[float | int, ...] = (1000.0, 900.0, 757.0, 522.0)

    def __post_init__(self):
        times = tuple(float(t) for t in self.timesteps)
        decreasing = all(a > b for a, b in itertools.pairwise((*times, 0.0)))
        if not times or times[0] > NUM_TRAIN_TIMESTEPS or not decreasing:
            raise UserError(f"timesteps are {list(self.timesteps)}: give decreasing numbers, at most 1000 and above 0")
        object.__setattr__(self, "timesteps", times)


HALF_RATE_POSITIONS = {"consecutive": 1, "strided": 2}  # name -> distance of neighbouring half-rate frames
# A small teacher denoises every second frame 3.6 times better if it is told so (docs/interpolation.md).
DEFAULT_HALF_RATE_POSITIONS = "strided"


@dataclass(frozen=True)
class HalfRate:
    """The first steps at half the frame rate.

    Attributes:
      steps: how many.
      velocity_fn: as that of the rollout, for latents [B (F+1)/2 H W C].
      interpolate: x0 [B (F+1)/2 H W C] -> [B F H W C].
    """

    steps: int
    velocity_fn: Callable
    interpolate: Callable


def check_half_rate(steps: int, *, num_steps: int, frames: int) -> None:
    """Raise a UserError if so many half-rate steps do not fit a student's steps or a clip's latent frames."""
    if not 0 <= steps <= num_steps:
        raise UserError(f"half_rate_steps={steps}: the student has {num_steps} steps; give 0 to {num_steps}")
    if steps and (frames < 3 or frames % 2 == 0):
        raise UserError(
            f"half_rate_steps={steps}: {frames} latent frames have no half rate, which takes an odd number from 3 on "
            "(8n + 1 video frames, 9 at least); choose another length, or half_rate_steps=0"
        )


@typechecked
def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Return the noise that each example starts from, [B *shape] float32; `shape` is an example's, (F, H, W, C)."""
    return _example_noise(keys, 0, shape)


@typechecked
def random_times(keys: Keys, steps: int, *, shift: float | int) -> OwnTimes:
    """Return the timesteps of a rollout that does not follow a schedule, falling from 1000 (NVlabs/rcm).

    Each is drawn uniformly and shifted; where a draw is above the timestep before it, that is taken again.

    Args:
      keys: [B], one an example.
      steps: how many.
      shift: timestep shift.
    """

    def drawn(key):
        return sample_timesteps(key, steps - 1, shift=shift, minimum=0.0, maximum=float(NUM_TRAIN_TIMESTEPS))

    first = jnp.full((keys.shape[0], 1), float(NUM_TRAIN_TIMESTEPS))
    return jax.lax.cummin(jnp.concatenate([first, jax.vmap(drawn)(keys)], axis=1), axis=1).T


@typechecked
def renoise(x0: Latents, keys: Keys, *, step: int | Int[Array, ""], timesteps: Timesteps) -> Latents:
    """Return x0 [B F H W C] noised to `timesteps` [B] with the noise that belongs after `step` (0-based)."""
    noise = _noise_after(keys, x0.shape[1:])(step)
    return add_noise(x0=x0, noise=noise, sigmas=sigma_of_timestep(timesteps))


@typechecked
def student_sample(
    velocity_fn: Callable,
    noise: Latents,
    keys: Keys,
    *,
    timesteps: Sequence[float | int],
    half_rate: HalfRate | None = None,
) -> Latents:
    """Run all steps of the student.

    Args:
      velocity_fn: (latents [B F H W C], timesteps [B] float32) -> velocity [B F H W C]; traced once.
      noise: [B F H W C], from `initial_noise`.
      keys: [B] typed random keys, the ones that `noise` was made with.
      timesteps: `StudentSchedule.timesteps`.
      half_rate: how the first steps are made, if not like the others; their number fits (`check_half_rate`).

    Returns:
      the last x0 prediction, [B F H W C] in float32 at least.
    """
    if half_rate is None:
        return full_rate_steps(velocity_fn, _start(noise, timesteps), keys, timesteps=timesteps, first_step=0)
    xt = half_rate_steps(noise, keys, timesteps=timesteps, half_rate=half_rate)
    return full_rate_steps(velocity_fn, xt, keys, timesteps=timesteps, first_step=half_rate.steps)


@typechecked
def half_rate_steps(noise: Latents, keys: Keys, *, timesteps: Sequence[float | int], half_rate: HalfRate) -> Latents:
    """Run the half-rate steps from noise [B F H W C]; returns the input of the first full-rate step, [B F H W C]."""
    steps = half_rate.steps
    x0 = _half_rate_input(noise, keys, (*timesteps[:steps], 0.0), half_rate, steps)
    timestep = jnp.full(noise.shape[:1], (*timesteps, 0.0)[steps], jnp.float32)
    return renoise(half_rate.interpolate(x0), keys, step=steps - 1, timesteps=timestep)


@typechecked
def full_rate_steps(
    velocity_fn: Callable, xt: Latents, keys: Keys, *, timesteps: Sequence[float | int], first_step: int
) -> Latents:
    """Run the steps from `first_step` on, whose input is `xt` [B F H W C]; returns the last x0 prediction."""
    return _roll_out(velocity_fn, xt, timesteps, first_step, len(timesteps), _noise_after(keys, xt.shape[1:]))


@typechecked
def first_input(noise: Latents, *, timesteps: Sequence[float | int]) -> Latents:
    """Return the input [B F H W C] of the first step, from `initial_noise`: as strong as that step's timestep says."""
    return at_least_float32(_start(noise, timesteps))


@typechecked
def one_step(
    velocity_fn: Callable, xt: Latents, keys: Keys, *, timesteps: Sequence[float | int], step: int | Int[Array, ""]
) -> Latents:
    """Run a step, whose number may be traced; from its input [B F H W C] to the next one's, at the end to the x0."""
    return _step(velocity_fn, timesteps, xt.shape[:1], _noise_after(keys, xt.shape[1:]))(xt, step)[0]


@typechecked
def all_predictions(
    velocity_fn: Callable,
    noise: Latents,
    keys: Keys,
    *,
    timesteps: Sequence[float | int],
    half_rate: HalfRate | None = None,
) -> Float[Array, "steps batch frames height width channels"]:
    """Run all steps of the student, without gradient, and keep each one's x0 prediction.

    Entry `s` is the sample of a rollout that stops at step `s` (Algorithm 1), so one rollout gives samples for all of
    them.

    Args:
      velocity_fn, noise, keys, timesteps, half_rate: as in `student_sample`; x0 of a half-rate step is interpolated.

    Returns:
      [steps B F H W C] in float32 at least.
    """
    velocity_fn, noise, first, parts = _constant(velocity_fn), jax.lax.stop_gradient(noise), 0, []
    noise_after, xt = _noise_after(keys, noise.shape[1:]), _start(noise, timesteps)
    if half_rate is not None and half_rate.steps:
        half_rate, first = _without_gradient(half_rate), half_rate.steps
        _, found = _scan(
            half_rate.velocity_fn,
            _start(noise[:, ::2], timesteps),
            timesteps,
            (0, first),
            lambda step: noise_after(step)[:, ::2],
        )
        parts.append(jax.lax.map(half_rate.interpolate, found))
        xt = renoise(parts[0][-1], keys, step=first - 1, timesteps=_timestep_of(noise, (*timesteps, 0.0), first))
    parts.append(_scan(velocity_fn, xt, timesteps, (first, len(timesteps)), noise_after)[1])
    return jax.lax.stop_gradient(jnp.concatenate(parts))


@typechecked
def backward_simulation(
    velocity_fn: Callable,
    noise: Latents,
    keys: Keys,
    *,
    timesteps: Sequence[float | int] | OwnTimes,
    stop_step: int | Int[Array, ""],
    half_rate: HalfRate | None = None,
) -> tuple[Latents, Timesteps]:
    """Run the student, without gradient, up to the input of one of its steps (Algorithm 1).

    The loop's length is dynamic: `stop_step` network evaluations are made and no more, whatever value it is traced for.
    The caller makes the step at the returned point itself, with gradient or without.

    Args:
      velocity_fn: (latents [B F H W C], timesteps [B] float32) -> velocity [B F H W C]; traced once.
      noise: [B F H W C], from `initial_noise`.
      keys: [B] typed random keys, the ones that `noise` was made with.
      timesteps: `StudentSchedule.timesteps`, or those of each example without half-rate steps.
      stop_step: integer in 0..len(timesteps)-1, one for the batch, usually traced; 0 returns the noise itself. The
        random choice must be the same on every host.
      half_rate: how the first steps are made, if not like the others; stop_step is then `half_rate.steps` at least.

    Returns:
      xt [B F H W C], the input of step `stop_step`, and that step's timestep for each example, [B] float32.
    """
    xt, first = jax.lax.stop_gradient(_start(noise, timesteps)), 0
    if half_rate is not None:
        xt = half_rate_steps(noise, keys, timesteps=timesteps, half_rate=_without_gradient(half_rate))
        xt, first = jax.lax.stop_gradient(xt), half_rate.steps
    noise_after = _noise_after(keys, noise.shape[1:])
    xt = _roll_out(_constant(velocity_fn), xt, timesteps, first, stop_step, noise_after)
    return xt, _timestep_of(noise, timesteps, stop_step)


@typechecked
def half_rate_simulation(
    noise: Latents,
    keys: Keys,
    *,
    timesteps: Sequence[float | int],
    stop_step: int | Int[Array, ""],
    half_rate: HalfRate,
) -> tuple[Float[Array, "batch half_frames height width channels"], Timesteps]:
    """Run the student, without gradient, up to the input of one of its half-rate steps.

    Args:
      noise: [B F H W C], from `initial_noise`.
      keys, timesteps: as in `backward_simulation`.
      stop_step: below `half_rate.steps`.
      half_rate: how the steps are made.

    Returns:
      xt [B (F+1)/2 H W C] and the step's timestep for each example, [B] float32.
    """
    half_rate = _without_gradient(half_rate)
    xt = _half_rate_input(jax.lax.stop_gradient(noise), keys, timesteps, half_rate, stop_step)
    return xt, _timestep_of(noise, timesteps, stop_step)


def _half_rate_input(noise, keys, timesteps, half_rate, stop):
    """Return the input of step `stop` at half rate, whose noise is every second frame of the full rate's."""
    noise_after, start = _noise_after(keys, noise.shape[1:]), _start(noise[:, ::2], timesteps)
    return _roll_out(half_rate.velocity_fn, start, timesteps, 0, stop, lambda step: noise_after(step)[:, ::2])


def _constant(function):
    # A loop of dynamic length has no reverse mode, so no tangent may enter it through the network's parameters.
    return lambda *args: jax.lax.stop_gradient(function(*args))


def _without_gradient(half_rate: HalfRate) -> HalfRate:
    return HalfRate(half_rate.steps, _constant(half_rate.velocity_fn), half_rate.interpolate)


def _timestep_of(noise, timesteps, step):
    return jnp.full(noise.shape[:1], jnp.asarray(timesteps, jnp.float32)[step])


def _start(noise, timesteps):
    """Return the input of the first step: the noise, as strong as its timestep says."""
    x0 = jnp.zeros_like(noise)
    return add_noise(x0=x0, noise=noise, sigmas=sigma_of_timestep(_timestep_of(noise, timesteps, 0)))


def _roll_out(velocity_fn, xt, timesteps, first_step, stop_step, noise_after):
    """Return the input of step `stop_step`, given that of `first_step`; after the last step it is the final x0."""
    step = _step(velocity_fn, timesteps, xt.shape[:1], noise_after)
    return jax.lax.fori_loop(first_step, stop_step, lambda i, xt: step(xt, i)[0], at_least_float32(xt))


def _scan(velocity_fn, xt, timesteps, steps, noise_after):
    """Run the steps of a range and return (input of the step after them, all x0 predictions)."""
    return jax.lax.scan(
        _step(velocity_fn, timesteps, xt.shape[:1], noise_after), at_least_float32(xt), jnp.arange(*steps)
    )


def _step(velocity_fn, timesteps, batch, noise_after):
    """Return the function (input of a step, its number) -> (input of the next one, its x0 prediction)."""
    times = jnp.asarray(timesteps, jnp.float32)
    times = jnp.concatenate([times, jnp.zeros_like(times[:1])])

    def step(xt, i):
        now, following = jnp.full(batch, times[i]), jnp.full(batch, times[i + 1])
        velocity = velocity_fn(xt, now)
        x0 = x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigma_of_timestep(now))
        return add_noise(x0=x0, noise=noise_after(i), sigmas=sigma_of_timestep(following)), x0

    return step


def _noise_after(keys, shape):
    """Return the function from a step to the noise of `shape` that is added after it."""
    return lambda step: _example_noise(keys, step + 1, shape)


def _example_noise(keys, index, shape):
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))(keys)

"""What the losses of a distillation are made of: the student's sample, two scores of it, the regression's prediction.

docs/method.md, Algorithm 1 and Eqs. 4 to 7; docs/rcm.md. Pure functions of arrays; networks come in as callables
`network(params, xt, timesteps, conditions)`.

With half-rate steps the student sees every second frame at its first steps, as it will when it generates. If a rollout
stops there, it ends in the interpolation of its x0; the gradient of the losses on all frames flows through that. The
regression is then on every second frame of the real latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from avd_jax.diffusion.flow import add_noise, sample_timesteps, sigma_of_timestep, velocity_target, x0_from_velocity
from avd_jax.diffusion.guidance import guided_velocity
from avd_jax.diffusion.student import (
    HALF_RATE_POSITIONS,
    HalfRate,
    all_predictions,
    backward_simulation,
    half_rate_simulation,
    initial_noise,
    random_times,
)
from avd_jax.losses.adaptive_regression import regression_loss
from avd_jax.losses.distribution_matching import flow_matching_loss
from avd_jax.training.method import Value

# Streams of an update's key (1 is the examples', see `training.update`), and of an example's.
STOP = 0
ROLLOUT, SCORE, REGRESSION, TIMES, CONSISTENCY, ORDER = range(6)


@dataclass(frozen=True)
class Student:
    """How the student is run while it trains.

    Attributes:
      network: of generator and fake_score.
      timesteps: of its steps.
      shape: (F, H, W, C) of its samples, where nothing else says it.
      half_rate_steps: first steps at half rate.
      half_rate_positions: of their frames, a key of HALF_RATE_POSITIONS.
      interpolator: `(params, latents) -> latents`, makes the missing frames; None without half-rate steps.
      random_shift: timestep shift of the random times of rollouts in training (`random_times`), without half-rate
        steps; None: `timesteps`.
    """

    network: Callable
    timesteps: tuple[float, ...]
    shape: tuple[int, int, int, int]
    half_rate_steps: int = 0
    half_rate_positions: str = ""
    interpolator: Callable | None = None
    random_shift: float | None = None

    @property
    def at_half_rate(self) -> Callable:
        """The network as it sees every second frame."""
        stride = HALF_RATE_POSITIONS[self.half_rate_positions]
        return self.network if stride == 1 else partial(self.network, frame_stride=stride)

    def stop_step(self, key):
        """Draw the step (0-based) at which a rollout stops, one for the batch, from an update's key."""
        return jax.random.randint(jax.random.fold_in(key, STOP), (), 0, len(self.timesteps))

    def rollout_times(self, keys):
        """Return the timesteps of a rollout in training, [steps] or, if each example has its own, [steps B]."""
        if self.random_shift is None:
            return self.timesteps
        return random_times(stream(keys, TIMES), len(self.timesteps), shift=self.random_shift)

    def x0(self, params, conditions, keys, stop, interpolator=None, *, shape=None):
        """Return the x0 at step `stop` of a rollout, [B F H W C]; only that step carries gradient (Algorithm 1).

        Args:
          params: of the network.
          conditions: of each example.
          keys: [B].
          stop: from `stop_step`.
          interpolator: its parameters.
          shape: (F, H, W, C) of the samples, if it is not that of `shape`.
        """
        keys, half_steps = stream(keys, ROLLOUT), self.half_rate_steps
        noise = initial_noise(keys, shape or self.shape)
        # Constants from the start: else the rollout's loop would be differentiated only to be thrown away.
        constants = jax.lax.stop_gradient(params)
        simulation = {"timesteps": self.rollout_times(keys), "stop_step": stop}
        if half_steps:
            simulation["half_rate"] = self._half_rate(constants, conditions, interpolator)

        def last_step(network, xt, timesteps):
            velocity = network(params, xt, timesteps, conditions)
            return x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigma_of_timestep(timesteps))

        def full_rate():
            velocity_fn = partial(_velocity, self.network, constants, conditions)
            return last_step(self.network, *backward_simulation(velocity_fn, noise, keys, **simulation))

        def half_rate():
            x0 = last_step(self.at_half_rate, *half_rate_simulation(noise, keys, **simulation))
            return self.interpolator(interpolator, x0)

        return jax.lax.cond(stop < half_steps, half_rate, full_rate) if half_steps else full_rate()

    def _half_rate(self, params, conditions, interpolator) -> HalfRate:
        velocity_fn = partial(_velocity, self.at_half_rate, params, conditions)
        return HalfRate(self.half_rate_steps, velocity_fn, partial(self.interpolator, interpolator))

    def samples(self, params, conditions, keys, interpolator=None, *, shape, times):
        """Return the x0 of one rollout through all steps as the samples of `times` updates, each [B F H W C].

        Every example takes them in a random order of its own, and all of them once before any again.

        Args:
          params, conditions, keys, interpolator: as in `x0`, all of them constants here.
          shape: (F, H, W, C) of the samples.
          times: how many updates.
        """
        number = len(self.timesteps)
        rounds = -(-times // number)

        def order(key):
            drawn = [jax.random.permutation(jax.random.fold_in(key, i), number) for i in range(rounds)]
            return jnp.concatenate(drawn)[:times]

        orders = jax.vmap(order)(stream(keys, ORDER))
        keys = stream(keys, ROLLOUT)
        half_rate = self._half_rate(params, conditions, interpolator) if self.half_rate_steps else None
        found = all_predictions(
            partial(_velocity, self.network, params, conditions),
            initial_noise(keys, shape),
            keys,
            timesteps=self.timesteps,
            half_rate=half_rate,
        )
        taken = jax.vmap(lambda x0, order: x0[order], in_axes=(1, 0), out_axes=1)(found, orders)
        return tuple(taken)

    def regression(self, params, latents, conditions, keys, stop):
        """Return L_reg of each example at a random timestep of the schedule (Eq. 5), and its `index`, both [B].

        With half-rate steps all examples are at one rate, that of step `stop`, because they are one array.

        Args:
          params, conditions, keys, stop: as in `x0`.
          latents: real ones, [B F H W C].
        """
        timesteps, half_steps = jnp.asarray(self.timesteps, jnp.float32), self.half_rate_steps
        keys = stream(keys, REGRESSION)
        at_half_rate = stop < half_steps
        first, last = 0, len(self.timesteps)
        if half_steps:
            first, last = jnp.where(at_half_rate, 0, half_steps), jnp.where(at_half_rate, half_steps, last)
        index = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), first, last))(keys)
        noise = initial_noise(keys, latents.shape[1:])

        def loss_of(network, latents, noise):
            xt = add_noise(x0=latents, noise=noise, sigmas=sigma_of_timestep(timesteps[index]))
            velocity = network(params, xt, timesteps[index], conditions)
            return regression_loss(velocity=velocity, target=velocity_target(x0=latents, noise=noise))

        full_rate = partial(loss_of, self.network, latents, noise)
        if not half_steps:
            return {"loss": full_rate(), "index": index}
        half_rate = partial(loss_of, self.at_half_rate, latents[:, ::2], noise[:, ::2])
        return {"loss": jax.lax.cond(at_half_rate, half_rate, full_rate), "index": index}


@dataclass(frozen=True)
class ScoreTimesteps:
    """The random timesteps at which teacher and fake_score are compared: uniform, shifted, clamped."""

    shift: float
    minimum: float
    maximum: float

    def noised(self, x0, keys):
        """Return x0 noised to such timesteps: (xt, noise, timesteps)."""
        keys = stream(keys, SCORE)
        draw = partial(sample_timesteps, shift=self.shift, minimum=self.minimum, maximum=self.maximum)
        timesteps = jax.vmap(lambda key: draw(jax.random.fold_in(key, 1), 1)[0])(keys)
        noise = initial_noise(keys, x0.shape[1:])
        return add_noise(x0=x0, noise=noise, sigmas=sigma_of_timestep(timesteps)), noise, timesteps


def scores(
    student: Callable,
    teacher: Callable,
    timesteps: ScoreTimesteps,
    guidance_scale: float,
    *,
    x0,
    fake_score,
    teacher_params,
    conditions,
    negative_conditions,
    keys,
) -> dict:
    """Return the x0 predictions of fake_score and of the guided teacher at one noised x0; constants to the gradient.

    Args:
      student, teacher: networks; the student's is fake_score's too.
      timesteps: at which x0 is noised.
      guidance_scale: of the teacher, in Wan's convention.
      x0: the student's sample, [B F H W C].
      fake_score, teacher_params: parameters.
      conditions: of each example.
      negative_conditions: those that guidance subtracts, one for all examples.
      keys: [B].
    """
    xt, _, times = timesteps.noised(jax.lax.stop_gradient(x0), keys)
    sigmas = sigma_of_timestep(times)
    fake = student(jax.lax.stop_gradient(fake_score), xt, times, conditions)
    real = guided_velocity(
        partial(teacher, teacher_params, xt, times),
        conditions=conditions,
        negative_conditions=negative_conditions,
        scale=guidance_scale,
    )
    fake_x0 = x0_from_velocity(xt=xt, velocity=fake, sigmas=sigmas)
    real_x0 = x0_from_velocity(xt=xt, velocity=real, sigmas=sigmas)
    return jax.lax.stop_gradient({"fake_x0": fake_x0, "real_x0": real_x0})


def scores_value(student: Callable, teacher: Callable, timesteps: ScoreTimesteps, guidance_scale: float) -> Value:
    """Return `scores` as a value of an update, made of `x0` and the `prompts` that it was made for."""
    compare = partial(scores, student, teacher, timesteps, guidance_scale)

    def found(x0, fake_score, teacher, negative, prompts, keys):
        return compare(
            x0=x0,
            fake_score=fake_score,
            teacher_params=teacher,
            conditions=prompts,
            negative_conditions=negative,
            keys=keys,
        )

    return Value("scores", ("x0", "fake_score", "teacher", "negative", "prompts", "keys"), found)


def fake_score_loss(
    network: Callable, timesteps: ScoreTimesteps, *, params, x0, conditions, keys, weight: Callable = jnp.ones_like
):
    """Return fake_score's flow-matching loss on the student's samples x0 [B F H W C], [B].

    `weight` maps noise levels [B] to factors [B].
    """
    x0 = jax.lax.stop_gradient(x0)
    xt, noise, times = timesteps.noised(x0, keys)
    velocity = network(params, xt, times, conditions)
    loss = flow_matching_loss(velocity=velocity, x0=x0, noise=noise)
    return weight(sigma_of_timestep(times)) * loss


def _velocity(network, params, conditions, latents, timesteps):
    return network(params, latents, timesteps, conditions)


def stream(keys, number: int):
    """Return the keys [B] of a stream of each example's."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

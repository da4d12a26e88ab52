"""The losses of one batch: what the generator and fake_score minimise (PAPER.md, Losses and Algorithm 1).

    L_G = L_KL + 2.0 w L_reg + 0.05 L_temp        (Eq. 9; the weights are in the config)

Randomness is per example: example `b` of the global batch has a key of its own, so neither the number of devices nor
the cut into accumulation parts changes what it sees. The step at which the student's rollout stops is one
for the batch.

With `half_rate.steps` the student sees every second frame at its first steps, as it will when it generates: a rollout
that stops there ends in the interpolation of its x0, through which the gradient of the losses on all frames flows, and
the regression is on every second frame of the real latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from avd_jax.diffusion.flow import add_noise, sample_timesteps, sigma_of_timestep, velocity_target, x0_from_velocity
from avd_jax.diffusion.guidance import guide
from avd_jax.diffusion.student import (
    HALF_RATE_POSITIONS,
    HalfRate,
    backward_simulation,
    half_rate_simulation,
    initial_noise,
)
from avd_jax.losses.adaptive_regression import LossHistory, regression_loss, weights_and_update
from avd_jax.losses.distribution_matching import distribution_matching_loss, flow_matching_loss
from avd_jax.losses.temporal import temporal_loss
from avd_jax.training.meters import LATENT, latent_meters
from avd_jax.training.networks import Networks, Params

# Streams of an update's key, and of an example's.
_STOP, _EXAMPLES = range(2)
_ROLLOUT, _SCORE, _REGRESSION = range(3)


Term = Callable[..., tuple[jax.Array, dict]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What no update changes: the teacher's parameters, the embeddings of the negative prompt [L text_dim], and the
    interpolator's parameters, where the student makes half-rate steps.
    """

    teacher: Params
    negative_prompt_embeds: jax.Array
    interpolator: Params | None = None


def stop_step(config, key):
    """Draw the step (0-based) at which the student's rollout stops, one for the batch."""
    return jax.random.randint(jax.random.fold_in(key, _STOP), (), 0, len(config.student.timesteps))


def example_keys(key, examples):
    """Return one key for each example number of the global batch."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, _EXAMPLES)))(examples)


def student_x0(
    config, networks: Networks, params: Params, prompt_embeds, keys, stop, shape, interpolator: Params | None = None
):
    """Return the student's x0 at step `stop` of its rollout, [B F H W C]; only that step carries gradient."""
    keys, half_steps = _stream(keys, _ROLLOUT), config.half_rate.steps
    noise = initial_noise(keys, shape)
    # Constants from the start: else the rollout's loop would be differentiated only to be thrown away.
    constants = jax.lax.stop_gradient(params)
    simulation = {"timesteps": tuple(config.student.timesteps), "stop_step": stop}
    if half_steps:
        half_velocity = partial(_velocity, _at_half_rate(config, networks), constants, prompt_embeds)
        simulation["half_rate"] = HalfRate(half_steps, half_velocity, partial(networks.interpolator, interpolator))

    def last_step(network, xt, timesteps):
        velocity = network(params, xt, timesteps, prompt_embeds)
        return x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigma_of_timestep(timesteps))

    def at_full_rate():
        velocity_fn = partial(_velocity, networks.student, constants, prompt_embeds)
        return last_step(networks.student, *backward_simulation(velocity_fn, noise, keys, **simulation))

    def at_half_rate():
        x0 = last_step(_at_half_rate(config, networks), *half_rate_simulation(noise, keys, **simulation))
        return networks.interpolator(interpolator, x0)

    return jax.lax.cond(stop < half_steps, at_half_rate, at_full_rate) if half_steps else at_full_rate()


def fake_score_loss(
    config,
    networks: Networks,
    params: Params,
    generator: Params,
    batch,
    keys,
    stop,
    shape,
    interpolator: Params | None = None,
):
    """Return fake_score's flow-matching loss on the student's samples of `shape` (F, H, W, C), [B]."""
    prompt_embeds = batch["prompt_embeds"]
    x0 = student_x0(config, networks, generator, prompt_embeds, keys, stop, shape, interpolator)
    x0 = jax.lax.stop_gradient(x0)
    xt, noise, timesteps = _noised(config, x0, keys)
    velocity = networks.student(params, xt, timesteps, prompt_embeds)
    return flow_matching_loss(velocity=velocity, x0=x0, noise=noise)


def generator_terms(
    config, networks: Networks, fake_score: Params, frozen: Frozen, history: LossHistory, stop
) -> tuple[Term, ...]:
    """Return what L_G is the sum of: functions `(params, batch, keys) -> (loss, parts)` that share no evaluation.

    They are apart so that the activations of one can be gone before the next one starts. A loss is a scalar; `parts`
    are those of `no_parts` that the term computes.
    """
    weights = config.loss

    def on_samples(params: Params, batch: dict, keys):
        shape = batch["latents"].shape[1:]
        x0 = student_x0(config, networks, params, batch["prompt_embeds"], keys, stop, shape, frozen.interpolator)
        loss, parts = jnp.zeros(()), {}
        for whose, latents in (("made", jax.lax.stop_gradient(x0)), ("real", batch["latents"])):
            parts |= {f"{whose}/{name}": value for name, value in latent_meters(latents).items()}
        if weights.distribution_matching:
            fake_x0, real_x0 = _scores(config, networks, fake_score, frozen, x0, batch["prompt_embeds"], keys)
            parts["distribution_matching"] = distribution_matching_loss(x0=x0, fake_x0=fake_x0, real_x0=real_x0)
            loss += weights.distribution_matching * jnp.mean(parts["distribution_matching"])
        if weights.temporal:
            parts["temporal"] = temporal_loss(x0, clip=weights.temporal_clip)
            loss += weights.temporal * parts["temporal"]
        return loss, parts

    def on_real_latents(params: Params, batch: dict, keys):
        parts = _regression(config, networks, params, history, batch, keys, stop)
        return weights.regression * jnp.mean(parts["regression_weight"] * parts["regression"]), parts

    first = (on_samples,) if weights.distribution_matching or weights.temporal else ()
    return (*first, on_real_latents) if weights.regression else first


def no_parts(size: int) -> dict:
    """Return what L_G is made of where every term is switched off, for the history and the log.

    That is `distribution_matching` [B] and `temporal` (scalar), `regression`, `regression_weight`, `timestep_index`,
    `made/*` and `real/*` (see `latent_meters`) [B].
    """
    return {
        "distribution_matching": jnp.zeros(size),
        "temporal": jnp.zeros(()),
        "regression": jnp.zeros(size),
        "regression_weight": jnp.zeros(size),
        "timestep_index": jnp.zeros(size, jnp.int32),
        **{f"{whose}/{name}": jnp.full(size, jnp.nan) for whose in ("made", "real") for name in LATENT},
    }


def _scores(config, networks, fake_score, frozen, x0, prompt_embeds, keys):
    """Return the x0 predictions of fake_score and of the guided teacher at one noised x0; constants to the gradient."""
    xt, _, timesteps = _noised(config, jax.lax.stop_gradient(x0), keys)
    sigmas = sigma_of_timestep(timesteps)
    fake = networks.student(jax.lax.stop_gradient(fake_score), xt, timesteps, prompt_embeds)
    negative = jnp.broadcast_to(frozen.negative_prompt_embeds, prompt_embeds.shape).astype(prompt_embeds.dtype)
    # One after the other, so that the teacher is compiled once and holds the activations of one pass.
    cond, uncond = jax.lax.map(
        partial(networks.teacher, frozen.teacher, xt, timesteps), jnp.stack([prompt_embeds, negative])
    )
    real = guide(cond=cond, uncond=uncond, scale=config.guidance_scale)
    fake_x0 = x0_from_velocity(xt=xt, velocity=fake, sigmas=sigmas)
    real_x0 = x0_from_velocity(xt=xt, velocity=real, sigmas=sigmas)
    return jax.lax.stop_gradient((fake_x0, real_x0))


def _regression(config, networks, params, history, batch, keys, stop):
    """Return L_reg at a random timestep of the student's schedule, with its weight (Eqs. 5-7).

    With half-rate steps all examples are at one rate, that of step `stop`, for they are one array.
    """
    timesteps, half_steps = jnp.asarray(config.student.timesteps, jnp.float32), config.half_rate.steps
    keys = _stream(keys, _REGRESSION)
    at_half_rate = stop < half_steps
    first, last = 0, len(timesteps)
    if half_steps:
        first, last = jnp.where(at_half_rate, 0, half_steps), jnp.where(at_half_rate, half_steps, last)
    index = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), first, last))(keys)
    noise = initial_noise(keys, batch["latents"].shape[1:])

    def loss_of(network, latents, noise):
        xt = add_noise(x0=latents, noise=noise, sigmas=sigma_of_timestep(timesteps[index]))
        velocity = network(params, xt, timesteps[index], batch["caption_embeds"])
        return regression_loss(velocity=velocity, target=velocity_target(x0=latents, noise=noise))

    at_full = partial(loss_of, networks.student, batch["latents"], noise)
    if half_steps:
        at_half = partial(loss_of, _at_half_rate(config, networks), batch["latents"][:, ::2], noise[:, ::2])
        loss = jax.lax.cond(at_half_rate, at_half, at_full)
    else:
        loss = at_full()
    if config.loss.regression_weighting == "fixed":
        weight = jnp.ones_like(loss)
    else:
        weight, _ = weights_and_update(
            history,
            loss,
            index,
            alpha=config.loss.adaptive_alpha,
            k=config.loss.adaptive_k,
            weight_uses=config.loss.adaptive_uses,
        )
    return {"regression": loss, "regression_weight": weight, "timestep_index": index}


def _noised(config, x0, keys):
    """Return x0 noised to a random timestep of the score schedule: (xt, noise, timesteps)."""
    keys, score = _stream(keys, _SCORE), config.score
    draw = partial(sample_timesteps, shift=score.shift, minimum=score.min_timestep, maximum=score.max_timestep)
    timesteps = jax.vmap(lambda key: draw(jax.random.fold_in(key, 1), 1)[0])(keys)
    noise = initial_noise(keys, x0.shape[1:])
    return add_noise(x0=x0, noise=noise, sigmas=sigma_of_timestep(timesteps)), noise, timesteps


def _at_half_rate(config, networks):
    """Return the student as it sees every second frame."""
    stride = HALF_RATE_POSITIONS[config.half_rate.positions]
    return networks.student if stride == 1 else partial(networks.student, frame_stride=stride)


def _velocity(network, params, prompt_embeds, latents, timesteps):
    return network(params, latents, timesteps, prompt_embeds)


def _stream(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

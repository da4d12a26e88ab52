"""The losses of one batch: what the generator and fake_score minimise (PAPER.md, Losses and Algorithm 1).

    L_G = L_KL + 2.0 w L_reg + 0.05 L_temp        (Eq. 9; the weights are in the config)

Randomness is per example: example `b` of the global batch has a key of its own, so neither the number of devices nor
the cut into accumulation parts changes what it sees. The step at which the student's rollout stops is one
for the batch.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from avd_jax.diffusion.flow import add_noise, sample_timesteps, sigma_of_timestep, velocity_target, x0_from_velocity
from avd_jax.diffusion.guidance import guide
from avd_jax.diffusion.student import backward_simulation, initial_noise
from avd_jax.losses.adaptive_regression import LossHistory, regression_loss, weights_and_update
from avd_jax.losses.distribution_matching import distribution_matching_loss, flow_matching_loss
from avd_jax.losses.temporal import temporal_loss
from avd_jax.training.meters import LATENT, latent_meters
from avd_jax.training.networks import Networks, Params

# Streams of an update's key, and of an example's.
_STOP, _EXAMPLES = range(2)
_ROLLOUT, _SCORE, _REGRESSION = range(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What no update changes: the teacher's parameters and the embeddings of the negative prompt, [L text_dim]."""

    teacher: Params
    negative_prompt_embeds: jax.Array


def stop_step(config, key):
    """Draw the step (0-based) at which the student's rollout stops, one for the batch."""
    return jax.random.randint(jax.random.fold_in(key, _STOP), (), 0, len(config.student.timesteps))


def example_keys(key, examples):
    """Return one key for each example number of the global batch."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, _EXAMPLES)))(examples)


def student_x0(config, networks: Networks, params: Params, prompt_embeds, keys, stop, shape):
    """Return the student's x0 at step `stop` of its rollout, [B F H W C]; only that step carries gradient."""
    keys = _stream(keys, _ROLLOUT)
    # Constants from the start: else the rollout's loop would be differentiated only to be thrown away.
    constants = jax.lax.stop_gradient(params)
    xt, timesteps = backward_simulation(
        partial(_velocity, networks.student, constants, prompt_embeds),
        initial_noise(keys, shape),
        keys,
        timesteps=tuple(config.student.timesteps),
        stop_step=stop,
    )
    velocity = networks.student(params, xt, timesteps, prompt_embeds)
    return x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigma_of_timestep(timesteps))


def fake_score_loss(config, networks: Networks, params: Params, generator: Params, batch, keys, stop, shape):
    """Return fake_score's flow-matching loss on the student's samples of `shape` (F, H, W, C), [B]."""
    prompt_embeds = batch["prompt_embeds"]
    x0 = jax.lax.stop_gradient(student_x0(config, networks, generator, prompt_embeds, keys, stop, shape))
    xt, noise, timesteps = _noised(config, x0, keys)
    velocity = networks.student(params, xt, timesteps, prompt_embeds)
    return flow_matching_loss(velocity=velocity, x0=x0, noise=noise)


def generator_loss(
    config,
    networks: Networks,
    params: Params,
    fake_score: Params,
    frozen: Frozen,
    history: LossHistory,
    batch,
    keys,
    stop,
):
    """Return L_G of a batch and, for the history and the log, what it is made of.

    Returns:
      (loss, parts): a scalar, and a dict with `distribution_matching` [B], `temporal` scalar, and `regression`,
      `regression_weight`, `timestep_index`, `made/*` and `real/*` (see `latent_meters`) [B]; a term that is
      switched off is 0 and is not computed.
    """
    weights = config.loss
    size = batch["latents"].shape[0]
    parts = {
        "distribution_matching": jnp.zeros(size),
        "temporal": jnp.zeros(()),
        "regression": jnp.zeros(size),
        "regression_weight": jnp.zeros(size),
        "timestep_index": jnp.zeros(size, jnp.int32),
        **{f"{whose}/{name}": jnp.full(size, jnp.nan) for whose in ("made", "real") for name in LATENT},
    }
    if weights.distribution_matching or weights.temporal:
        shape = batch["latents"].shape[1:]
        x0 = student_x0(config, networks, params, batch["prompt_embeds"], keys, stop, shape)
        for whose, latents in (("made", jax.lax.stop_gradient(x0)), ("real", batch["latents"])):
            parts |= {f"{whose}/{name}": value for name, value in latent_meters(latents).items()}
    if weights.distribution_matching:
        fake_x0, real_x0 = _scores(config, networks, fake_score, frozen, x0, batch["prompt_embeds"], keys)
        parts["distribution_matching"] = distribution_matching_loss(x0=x0, fake_x0=fake_x0, real_x0=real_x0)
    if weights.temporal:
        parts["temporal"] = temporal_loss(x0, clip=weights.temporal_clip)
    if weights.regression:
        parts |= _regression(config, networks, params, history, batch, keys)
    loss = (
        weights.distribution_matching * jnp.mean(parts["distribution_matching"])
        + weights.temporal * parts["temporal"]
        + weights.regression * jnp.mean(parts["regression_weight"] * parts["regression"])
    )
    return loss, parts


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


def _regression(config, networks, params, history, batch, keys):
    """Return L_reg at a random timestep of the student's schedule, with its weight (Eqs. 5-7)."""
    timesteps = jnp.asarray(config.student.timesteps, jnp.float32)
    keys = _stream(keys, _REGRESSION)
    index = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(timesteps)))(keys)
    latents = batch["latents"]
    noise = initial_noise(keys, latents.shape[1:])
    xt = add_noise(x0=latents, noise=noise, sigmas=sigma_of_timestep(timesteps[index]))
    velocity = networks.student(params, xt, timesteps[index], batch["caption_embeds"])
    loss = regression_loss(velocity=velocity, target=velocity_target(x0=latents, noise=noise))
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


def _velocity(network, params, prompt_embeds, latents, timesteps):
    return network(params, latents, timesteps, prompt_embeds)


def _stream(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

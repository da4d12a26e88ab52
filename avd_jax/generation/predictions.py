"""How alike the neighbouring frames are in what a model predicts at each step of sampling (AVD's paper, Fig. 15).

At each step the model predicts x0 from x_t, x0 = x_t - sigma v. The cosine similarity is between latent frames f and
f + 1 of that prediction, over height, width and channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.data.latents import pad_prompt_embeds
from avd_jax.diffusion.flow import sigma_of_timestep, x0_from_velocity
from avd_jax.diffusion.guidance import guided_velocity
from avd_jax.diffusion.student import initial_noise, student_sample
from avd_jax.diffusion.unipc import unipc_sample
from avd_jax.errors import UserError
from avd_jax.generation.pipeline import sample_keys
from avd_jax.generation.run import Opened
from avd_jax.generation.sampling import embeddings_of, load_transformer, text_encoder_of, texts_of
from avd_jax.generation.settings import Job
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from avd_jax.shapes import Array


@dataclass(frozen=True)
class Step:
    """A step of sampling: what the network was told, and the similarities [videos F-1] of its predictions."""

    timestep: float
    similarities: np.ndarray


def neighbour_similarities(latents: Array) -> Array:
    """Return the cosine similarity of frames f and f + 1 of latents [B F H W C]: [B F-1], 0 for a frame of zeros."""
    flat = latents.astype(jnp.float32).reshape(*latents.shape[:2], -1)
    flat = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
    return jnp.sum(flat[:, 1:] * flat[:, :-1], axis=-1)


def steps_of(opened: Opened, jobs: Sequence[Job], *, batch_size: int, fsdp: int = 1) -> list[Step]:
    """Sample the jobs and return each step, in the order of sampling; nothing is decoded.

    Args:
      opened: from `generation.run.open_for`; a student's steps are all made at the full frame rate.
      jobs: prompts and seeds.
      batch_size: videos to sample together, rounded up to what the devices share out evenly.
      fsdp: devices that share one copy of the transformer.

    Raises:
      UserError: videos of one latent frame, which has no neighbour, or values that are not finite.
    """
    settings, shape, mesh = opened.settings, opened.shape, make_mesh(fsdp=fsdp)
    if shape[0] < 2:
        raise UserError(f"--frames {settings.frames}: is one latent frame, which has no neighbour; give more")
    texts = _embeddings(opened, jobs)
    network, params = load_transformer(opened.parts, settings, mesh)
    seen: list[tuple[float, np.ndarray]] = []

    def note(timestep, similarities) -> None:
        seen.append((float(timestep), np.asarray(similarities)))

    @partial(jax.jit, compiler_options=compiler_options(mesh))
    def sample(params, keys, conditions, negative_conditions):
        def velocity_fn(xt, times):
            predict = partial(network, params, xt, times)
            if settings.solver == "student":
                velocity = predict(conditions)
            else:
                guidance = {"negative_conditions": negative_conditions, "scale": settings.guidance_scale}
                velocity = guided_velocity(predict, conditions=conditions, **guidance)
            x0 = x0_from_velocity(xt=xt, velocity=velocity, sigmas=sigma_of_timestep(times))
            jax.debug.callback(note, times[0], neighbour_similarities(x0))
            return velocity

        noise = initial_noise(keys, shape)
        if settings.solver == "student":
            return student_sample(velocity_fn, noise, keys, timesteps=settings.timesteps)
        return unipc_sample(velocity_fn, noise, num_steps=settings.steps, shift=settings.shift)

    shards = mesh.devices.size // mesh.shape["seq"]
    size = -(-min(batch_size, len(jobs)) // shards) * shards
    negative = {}
    if settings.negative_prompt is not None:
        negative = jax.device_put({"prompt_embeds": texts[settings.negative_prompt]}, replicated(mesh))
    found: dict[float, list[np.ndarray]] = {}
    for start in range(0, len(jobs), size):
        batch = list(jobs[start : start + size])
        rows = batch + batch[-1:] * (size - len(batch))
        keys = jax.jit(sample_keys, out_shardings=batch_sharding(mesh))(
            np.asarray([job.seed for job in rows], np.uint32)
        )
        embeds = np.stack([texts[job.prompt] for job in rows])
        conditions = jax.device_put({"prompt_embeds": embeds}, batch_sharding(mesh))
        jax.block_until_ready(sample(params, keys, conditions, negative))
        jax.effects_barrier()
        for timestep, similarities in seen:
            found.setdefault(timestep, []).append(similarities[: len(batch)])
        seen.clear()
    steps = [Step(timestep, np.concatenate(found[timestep])) for timestep in sorted(found, reverse=True)]
    if not all(np.isfinite(step.similarities).all() for step in steps):
        raise UserError("predictions are not finite; try --dtype float32, or check the weights")
    return steps


def _embeddings(opened: Opened, jobs: Sequence[Job]) -> dict[str, np.ndarray]:
    """Return text -> embeddings [text_len text_dim] of the prompts and the negative prompt."""
    settings, parts = opened.settings, opened.parts
    encoder = cache(lambda: text_encoder_of(parts, settings.dtype))
    found = embeddings_of(texts_of(settings, jobs), None, encoder)
    length = parts.transformer.config.text_len
    return {text: pad_prompt_embeds(embeds, length) for text, embeds in found.items()}

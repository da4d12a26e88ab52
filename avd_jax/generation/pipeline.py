"""The samplers as compiled functions from seeds and prompts to latents, and the sizes that they can make.

A network comes in as a callable `network(params, latents, timesteps, prompt_embeds) -> velocity` beside its
parameters, so that training samples with the very functions that generation uses. Example b of a batch depends on key b
and embedding b only: a video is the same in every batch and on every number of devices, but for the last bits, where a
backend sums in another order for another batch size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.diffusion.guidance import guide
from avd_jax.diffusion.student import (
    HALF_RATE_POSITIONS,
    HalfRate,
    Keys,
    StudentSchedule,
    check_half_rate,
    full_rate_steps,
    half_rate_steps,
    initial_noise,
    student_sample,
)
from avd_jax.diffusion.unipc import unipc_sample, unipc_schedule
from avd_jax.errors import UserError
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.models.wan_vae import WanVAEConfig

Network = Callable[..., jax.Array]
LatentsShape = tuple[int, int, int, int]

MAX_SEED = 2**32 - 1


def latents_shape(*, frames: int, height: int, width: int, dit: WanDiTConfig, vae: WanVAEConfig) -> LatentsShape:
    """Return the shape (F, H, W, C) of the latents of one video.

    Args:
      frames: of the video, 4n + 1.
      height, width: pixels, multiples of 16 (8 pixels a latent, 2 latents a patch).
      dit: sizes of the transformer.
      vae: sizes of the video autoencoder.

    Raises:
      UserError: naming the size that does not fit, and the nearest ones that do.
    """
    patch_frames, patch_height, patch_width = dit.patch_size
    stride = vae.temporal_stride * patch_frames
    latent_frames = (frames - 1) // vae.temporal_stride + 1
    if frames < 1 or (frames - 1) % vae.temporal_stride or latent_frames % patch_frames:
        first = 1 + vae.temporal_stride * (patch_frames - 1)
        raise UserError(f"frames={frames} is not {stride}n + {first}; try {_nearest(frames, stride, first)}")
    for name, pixels, patch in (("height", height, patch_height), ("width", width, patch_width)):
        stride = vae.spatial_stride * patch
        if pixels < 1 or pixels % stride:
            raise UserError(f"{name}={pixels} is not a multiple of {stride}; try {_nearest(pixels, stride, stride)}")
    return latent_frames, height // vae.spatial_stride, width // vae.spatial_stride, dit.in_dim


def sample_keys(seeds: Sequence[int]) -> Keys:
    """Return one random key a seed, [B]; a seed is 0..2^32 - 1 and gives the same noise wherever it stands."""
    # threefry by name: only its draws are the same alone and in a batch.
    make = partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(make)(np.asarray(seeds, np.uint32))


def as_network(module: nnx.Module) -> tuple[Network, nnx.State]:
    """Return a module as a network and its parameters."""
    graphdef, state = nnx.split(module)

    def network(params, latents, timesteps, prompt_embeds, **options):
        return nnx.merge(graphdef, params)(latents, timesteps, prompt_embeds, **options)

    return network, state


@dataclass(frozen=True)
class HalfRateSampling:
    """How a student makes its first steps at half the frame rate.

    Attributes:
      steps: how many; 1 at least.
      positions: of the frames in the rotary embedding, a key of HALF_RATE_POSITIONS.
      interpolator: makes the missing frames, [B F H W C] -> [B 2F-1 H W C].
    """

    steps: int
    positions: str
    interpolator: nnx.Module


def make_student_sampler(
    network: Network,
    shape: LatentsShape,
    *,
    timesteps: Sequence[float | int],
    half_rate: HalfRateSampling | None = None,
) -> Callable[..., jax.Array]:
    """Compile the few-step rollout of a student (PAPER.md, Training), one program for each rate that it runs at.

    Args:
      network: see the module; for strided half-rate positions it takes `frame_stride` too.
      shape: from `latents_shape`.
      timesteps: those that the student was trained for.
      half_rate: for a rollout whose first steps are at half rate.

    Returns:
      A function `(params, keys [B], prompt_embeds [B L D]) -> latents [B F H W C]`, float32; keys are from
      `sample_keys`.

    Raises:
      UserError: timesteps that are not decreasing in 1000..0, or half-rate steps that do not fit them or the shape.
    """
    timesteps = StudentSchedule(tuple(timesteps)).timesteps
    if half_rate is None:

        @jax.jit
        def sample(params, keys, prompt_embeds):
            velocity_fn = _velocity_fn(network, params, prompt_embeds)
            return student_sample(velocity_fn, initial_noise(keys, shape), keys, timesteps=timesteps)

        return sample
    steps = half_rate.steps
    check_half_rate(steps, num_steps=len(timesteps), frames=shape[0])
    # No argument where it changes nothing: networks that know no positions are networks too.
    stride = HALF_RATE_POSITIONS[half_rate.positions]
    options = {} if stride == 1 else {"frame_stride": stride}
    graphdef, interpolator = nnx.split(half_rate.interpolator)

    @jax.jit
    def first(params, interpolator, keys, prompt_embeds):
        velocity_fn = _velocity_fn(network, params, prompt_embeds, **options)
        phase = HalfRate(steps, velocity_fn, nnx.merge(graphdef, interpolator))
        return half_rate_steps(initial_noise(keys, shape), keys, timesteps=timesteps, half_rate=phase)

    @jax.jit
    def rest(params, xt, keys, prompt_embeds):
        velocity_fn = _velocity_fn(network, params, prompt_embeds)
        return full_rate_steps(velocity_fn, xt, keys, timesteps=timesteps, first_step=steps)

    def sample_at_both_rates(params, keys, prompt_embeds):
        return rest(params, first(params, interpolator, keys, prompt_embeds), keys, prompt_embeds)

    return sample_at_both_rates


def _velocity_fn(network: Network, params, prompt_embeds, **options) -> Callable:
    return lambda latents, times: network(params, latents, times, prompt_embeds, **options)


def make_teacher_sampler(
    network: Network, shape: LatentsShape, *, num_steps: int, shift: float, guidance_scale: float
) -> Callable[..., jax.Array]:
    """Compile Wan's own sampling: UniPC with classifier-free guidance.

    Args:
      network: see the module.
      shape: from `latents_shape`.
      num_steps: solver steps, two network evaluations each.
      shift: timestep shift.
      guidance_scale: in Wan's convention, see `guide`.

    Returns:
      A jitted `(params, keys [B], prompt_embeds [B L D], negative_prompt_embeds [L D]) -> latents [B F H W C]`,
      float32; keys are from `sample_keys`, and a seed starts from the noise that the student starts from.

    Raises:
      UserError: num_steps below 1, or a shift that is not positive.
    """
    unipc_schedule(num_steps, shift)  # now, not at the first call

    @jax.jit
    def sample(params, keys, prompt_embeds, negative_prompt_embeds):
        negative = jnp.broadcast_to(negative_prompt_embeds, prompt_embeds.shape).astype(prompt_embeds.dtype)
        both = jnp.stack([prompt_embeds, negative])

        def velocity_fn(latents, times):
            # One after the other: the network is compiled once, and no shard of the batch has to move.
            cond, uncond = jax.lax.map(partial(network, params, latents, times), both)
            return guide(cond=cond, uncond=uncond, scale=guidance_scale)

        return unipc_sample(velocity_fn, initial_noise(keys, shape), num_steps=num_steps, shift=shift)

    return sample


def _nearest(size: int, stride: int, first: int) -> str:
    """Return the members of first, first + stride, ... on both sides of `size`, for a message."""
    below = (size - first) // stride * stride + first
    return f"{below} or {below + stride}" if below >= first else str(first)

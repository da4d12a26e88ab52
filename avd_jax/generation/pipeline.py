"""The samplers as compiled functions from seeds and prompts to latents, and the sizes that they can make.

A network comes in as a callable `network(params, xt, timesteps, conditions) -> velocity` beside its parameters, so
that training samples with the very functions that generation uses. Example b of a batch depends on key b and conditions
b only. So a video is the same in every batch and on every number of devices, except for its last bits: a backend may
sum in another order for another batch size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from avd_jax.diffusion.guidance import guided_velocity
from avd_jax.diffusion.student import (
    HALF_RATE_POSITIONS,
    HalfRate,
    Keys,
    StudentSchedule,
    check_half_rate,
    first_input,
    full_rate_steps,
    half_rate_steps,
    initial_noise,
    one_step,
    student_sample,
)
from avd_jax.diffusion.unipc import UniPC, unipc_sample, unipc_schedule
from avd_jax.errors import UserError
from avd_jax.models.functional import functional
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.models.wan_vae import WanVAEConfig
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.mesh import batch_sharding

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


def sample_keys(seeds: Sequence[int] | jax.Array) -> Keys:
    """Return one random key a seed, [B]; a seed is 0..2^32 - 1 and gives the same noise at every place in a batch."""
    # threefry by name: only its draws are the same alone and in a batch.
    make = partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(make)(jnp.asarray(seeds, jnp.uint32))


@dataclass(frozen=True)
class Steps:
    """A sampler in steps that the host starts one by one: their program is compiled once, and may be kept on disk.

    What the host does between them, such as counting, is no part of the program.

    Attributes:
      count: of the steps.
      start: `(params, *others, keys, conditions...) -> state`, jitted: the noise, or what half-rate steps end in.
      made: how many of the steps `start` makes.
      step: `(params, state, number, keys, conditions...) -> state`, jitted, from number `made` on; the first entry of
        the last state is the latents [B F H W C].
      others: parameters of other networks that `start` runs.
      sharding: of the state.
    """

    count: int
    start: Callable[..., tuple]
    made: int
    step: Callable[..., tuple]
    others: tuple = ()
    sharding: jax.sharding.Sharding | None = None

    def compiled(self, params, keys, *conditions) -> "Steps":
        """Return it with its programs compiled for arguments such as these; shapes of parameters will do."""
        start = self.start.lower(params, *self.others, keys, *conditions)
        state = jax.tree.map(lambda leaf: leaf.update(sharding=self.sharding), start.out_info)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        step = self.step.lower(params, state, number, keys, *conditions)
        return replace(self, start=start.compile(), step=step.compile())

    def __call__(self, params, keys, *conditions, on_step: Callable[[jax.Array], object] = lambda latents: None):
        """Return the latents.

        Args:
          params: of the network.
          keys: [B], from `sample_keys`.
          conditions: of each example, and for the teacher the negative ones.
          on_step: called with what a step makes once it is dispatched, step by step.
        """
        state = self.start(params, *self.others, keys, *conditions)
        for _ in range(self.made):
            on_step(state[0])
        for number in range(self.made, self.count):
            state = self.step(params, state, np.int32(number), keys, *conditions)
            on_step(state[0])
        return state[0]


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


class StudentSampler:
    """The few-step rollout of a student (docs/method.md, Algorithm 1), one program for each rate that it runs at.

    Attributes:
      first: `(params, interpolator, keys, conditions) -> xt`, jitted: the half-rate steps; None without any.
      rest: `(params, xt, keys, conditions) -> latents`, jitted: the others; without half-rate steps
        `(params, keys, conditions) -> latents`, from the noise on.
      interpolator: parameters of the frame interpolator, or None.
    """

    def __init__(
        self,
        network: Network,
        shape: LatentsShape,
        *,
        timesteps: Sequence[float | int],
        half_rate: HalfRateSampling | None = None,
        mesh: Mesh | None = None,
    ):
        """Build the programs; nothing is compiled yet.

        Args:
          network: see the module; for strided half-rate positions it takes `frame_stride` too.
          shape: from `latents_shape`.
          timesteps: those that the student was trained for.
          half_rate: for a rollout whose first steps are at half rate.
          mesh: of the devices for which the programs are compiled; None: the arguments tell.

        Raises:
          UserError: timesteps that are not decreasing in 1000..0, or half-rate steps that do not fit them or the shape.
        """
        timesteps = StudentSchedule(tuple(timesteps)).timesteps
        compiled = partial(jax.jit, **_on(mesh))
        self.first = self.interpolator = None
        if half_rate is None:

            @compiled
            def sample(params, keys, conditions):
                velocity_fn = _velocity_fn(network, params, conditions)
                return student_sample(velocity_fn, initial_noise(keys, shape), keys, timesteps=timesteps)

            self.rest = sample
            return
        steps = half_rate.steps
        check_half_rate(steps, num_steps=len(timesteps), frames=shape[0])
        # No argument if it changes nothing, so that networks without positions can be sampled too.
        stride = HALF_RATE_POSITIONS[half_rate.positions]
        options = {} if stride == 1 else {"frame_stride": stride}
        interpolate, self.interpolator = functional(half_rate.interpolator)

        @compiled
        def first(params, interpolator, keys, conditions):
            velocity_fn = _velocity_fn(network, params, conditions, **options)
            phase = HalfRate(steps, velocity_fn, partial(interpolate, interpolator))
            return half_rate_steps(initial_noise(keys, shape), keys, timesteps=timesteps, half_rate=phase)

        @compiled
        def rest(params, xt, keys, conditions):
            velocity_fn = _velocity_fn(network, params, conditions)
            return full_rate_steps(velocity_fn, xt, keys, timesteps=timesteps, first_step=steps)

        self.first, self.rest = first, rest

    def __call__(self, params, keys, conditions) -> jax.Array:
        """Return latents [B F H W C], float32, for keys [B] from `sample_keys` and the conditions of each example."""
        if self.first is None:
            return self.rest(params, keys, conditions)
        return self.rest(params, self.first(params, self.interpolator, keys, conditions), keys, conditions)


def student_steps(
    network: Network,
    shape: LatentsShape,
    *,
    timesteps: Sequence[float | int],
    half_rate: HalfRateSampling | None = None,
    mesh: Mesh | None = None,
) -> Steps:
    """Return what `StudentSampler` computes, in steps; see there."""
    timesteps = StudentSchedule(tuple(timesteps)).timesteps
    sampler = StudentSampler(network, shape, timesteps=timesteps, half_rate=half_rate)

    def start(params, *others):
        *interpolator, keys, conditions = others
        if interpolator:
            return (sampler.first(params, *interpolator, keys, conditions),)
        return (first_input(initial_noise(keys, shape), timesteps=timesteps),)

    def step(params, state, number, keys, conditions):
        velocity_fn = _velocity_fn(network, params, conditions)
        return (one_step(velocity_fn, *state, keys, timesteps=timesteps, step=number),)

    made, others = (half_rate.steps, (sampler.interpolator,)) if half_rate else (0, ())
    sharding, programs = _step_programs(mesh, start, step)
    return Steps(len(timesteps), programs[0], made, programs[1], others, sharding)


def teacher_steps(
    network: Network,
    shape: LatentsShape,
    *,
    num_steps: int,
    shift: float,
    guidance_scale: float,
    mesh: Mesh | None = None,
) -> Steps:
    """Return what `make_teacher_sampler` computes, in steps; see there."""
    solver = UniPC(num_steps, shift)

    def start(params, keys, conditions, negative_conditions):
        return solver.start(initial_noise(keys, shape))

    def step(params, state, number, keys, conditions, negative_conditions):
        velocity_fn = _guided_velocity_fn(network, params, conditions, negative_conditions, guidance_scale)
        return solver.step(velocity_fn, state, tuple(jnp.asarray(row, jnp.float32)[number] for row in solver.rows))

    sharding, programs = _step_programs(mesh, start, step)
    return Steps(num_steps, programs[0], 0, programs[1], sharding=sharding)


def _step_programs(mesh: Mesh | None, *functions: Callable) -> tuple[NamedSharding | None, list[Callable]]:
    """Return the sharding of the state, whose examples the mesh shares out, and the jitted functions."""
    sharding = None if mesh is None else batch_sharding(mesh)
    return sharding, [jax.jit(function, out_shardings=sharding, **_on(mesh)) for function in functions]


def _on(mesh: Mesh | None) -> dict[str, object]:
    """Return options of `jax.jit`; without the compiler's, a layer on a pod takes several times as long."""
    return {} if mesh is None else {"compiler_options": compiler_options(mesh)}


def _velocity_fn(network: Network, params, conditions, **options) -> Callable:
    return lambda xt, times: network(params, xt, times, conditions, **options)


def make_teacher_sampler(
    network: Network,
    shape: LatentsShape,
    *,
    num_steps: int,
    shift: float,
    guidance_scale: float,
    mesh: Mesh | None = None,
) -> Callable[..., jax.Array]:
    """Compile Wan's own sampling: UniPC with classifier-free guidance.

    Args:
      network: see the module.
      shape: from `latents_shape`.
      num_steps: solver steps, two network evaluations each.
      shift: timestep shift.
      guidance_scale: in Wan's convention, see `guide`.
      mesh: as for `StudentSampler`.

    Returns:
      A jitted `(params, keys [B], conditions, negative_conditions) -> latents [B F H W C]`, float32. Keys are from
      `sample_keys`, and a seed starts from the noise that the student starts from; the negative conditions are one for
      all examples.

    Raises:
      UserError: num_steps below 1, or a shift that is not positive.
    """
    unipc_schedule(num_steps, shift)  # now, not at the first call

    @partial(jax.jit, **_on(mesh))
    def sample(params, keys, conditions, negative_conditions):
        velocity_fn = _guided_velocity_fn(network, params, conditions, negative_conditions, guidance_scale)
        return unipc_sample(velocity_fn, initial_noise(keys, shape), num_steps=num_steps, shift=shift)

    return sample


def _guided_velocity_fn(network: Network, params, conditions, negative_conditions, scale: float) -> Callable:
    guidance = {"conditions": conditions, "negative_conditions": negative_conditions, "scale": scale}
    return lambda xt, times: guided_velocity(partial(network, params, xt, times), **guidance)


def _nearest(size: int, stride: int, first: int) -> str:
    """Return the members of first, first + stride, ... on both sides of `size`, for a message."""
    below = (size - first) // stride * stride + first
    return f"{below} or {below + stride}" if below >= first else str(first)

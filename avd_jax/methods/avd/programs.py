"""What a distillation compiles beside its updates, for the memory verdict, and the unit of its cost."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from avd_jax.capacity.program import Program
from avd_jax.data.encoding import decoder_program, decoding_dtype, encoder_program
from avd_jax.generation.pipeline import HalfRateSampling, LatentsShape, StudentSampler
from avd_jax.methods.avd.objectives import Student
from avd_jax.methods.avd.samples import decoding_mesh
from avd_jax.methods.transformers import abstract_conditions, make_placement, shaped_params
from avd_jax.models.functional import Denoiser, make_denoiser
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig, computing_in
from avd_jax.parallel.mesh import batch_sharding, filled_up, replicated


def unit(network: Denoiser, model: WanDiTConfig, shape: LatentsShape, batch_size: int) -> tuple[str, Callable, tuple]:
    """Return the piece of work in which a cycle's cost is stated: one forward pass on a batch.

    It is a whole one: of a single example every batch shard would make the attention.
    """
    conditions = abstract_conditions(batch_size, model, "bfloat16", None)
    latents = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    args = network.abstract_params(), latents, jax.ShapeDtypeStruct((batch_size,), jnp.float32), conditions
    return "forward passes of the DiT", network, args


def programs(
    config, student: Student, model: WanDiTConfig, interpolator: InterpolatorConfig | None, mesh: Mesh
) -> Mapping[str, Callable[[], Program]]:
    """Return the programs by name, each made when it is asked for.

    `student_sample`, `student_sample_half_rate` and `vae_decode` make the sample videos of a run. No run needs the
    others: `vae_encode` makes its data, and `forward` is one evaluation of the transformer on one example with
    half-precision weights.

    Args:
      config: of `config.FIELDS`.
      student: see its class.
      model: sizes of the transformer.
      interpolator: sizes of the frame interpolator, or None.
      mesh: to run on.
    """
    sampled = partial(_student_sample, config, student, model, interpolator, mesh)
    half_rate = {"student_sample_half_rate": partial(sampled, half_rate=True)} if student.half_rate_steps else {}
    return {
        "student_sample": sampled,
        **half_rate,
        "vae_decode": partial(_vae_decode, config, student.shape, mesh),
        "vae_encode": partial(_vae_encode, student.shape, mesh),
        "forward": partial(_forward, config, student.shape, model, mesh),
    }


def _student_sample(config, student: Student, model, interpolator, mesh, *, half_rate: bool = False) -> Program:
    """Return the program of the student's steps at one of its rates."""
    sampling = None
    if student.half_rate_steps:
        module = nnx.eval_shape(lambda: Interpolator(interpolator, nnx.Rngs(0)))
        sampling = HalfRateSampling(student.half_rate_steps, student.half_rate_positions, module)
    sampler = StudentSampler(student.network, student.shape, timesteps=student.timesteps, half_rate=sampling)
    count, everywhere = filled_up(config.sample.prompts, mesh), replicated(mesh)

    def shaped(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    keys = shaped(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)))
    inputs = keys, abstract_conditions(count, model, "float32", everywhere)
    params = shaped_params(student.network.abstract_params(), mesh)
    if half_rate:
        args = params, jax.tree.map(shaped, sampler.interpolator), *inputs
        return Program("student_sample_half_rate", sampler.first, args)
    xt = (shaped(jax.ShapeDtypeStruct((count, *student.shape), jnp.float32)),) if sampling else ()
    return Program("student_sample", sampler.rest, (params, *xt, *inputs))


def _abstract_vae(channels: int, dtype) -> WanVAE:
    sizes = WanVAEConfig(z_dim=channels, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)
    return nnx.eval_shape(lambda: computing_in(WanVAE(sizes, nnx.Rngs(0)), dtype))


def _vae_decode(config, shape: LatentsShape, mesh) -> Program:
    """Return the program that decodes the samples, one on each device of a host."""
    first = mesh.devices.flat[0]
    own = decoding_mesh(mesh, first.process_index, config.sample.prompts)
    graphdef, state = nnx.split(_abstract_vae(shape[-1], decoding_dtype(first.platform)))
    decode = decoder_program(graphdef, platform=first.platform, mesh=own, memory_gib=config.sample.vae_gib)
    latents = jax.ShapeDtypeStruct((own.size, *shape), jnp.float32)
    return Program("vae_decode", decode, (_placed(state, replicated(own)), _placed(latents, batch_sharding(own))))


def _vae_encode(shape: LatentsShape, mesh) -> Program:
    """Return the program that makes a clip of the run's data, on one device."""
    frames, height, width, channels = shape
    first = mesh.devices.flat[0]
    vae = _abstract_vae(channels, jnp.float32)
    graphdef, state = nnx.split(vae)
    time, space = vae.config.temporal_stride, vae.config.spatial_stride
    video = jax.ShapeDtypeStruct((1, (frames - 1) * time + 1, height * space, width * space, 3), jnp.float32)
    own = decoding_mesh(mesh, first.process_index, 1)
    encode = encoder_program(graphdef, platform=first.platform)
    return Program("vae_encode", encode, _placed((state, video), replicated(own)))


def _placed(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _forward(config, shape: LatentsShape, model, mesh) -> Program:
    network = make_denoiser(
        model,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="none",
        placement=make_placement(config.attention, mesh),
    )
    everywhere = replicated(mesh)
    latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32, sharding=everywhere)
    times = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=everywhere)
    args = shaped_params(network.abstract_params(), mesh), latents, times
    conditions = abstract_conditions(1, model, "bfloat16", everywhere)
    return Program("forward", jax.jit(lambda params, *inputs: network(params, *inputs)), (*args, conditions))

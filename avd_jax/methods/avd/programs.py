"""What a distillation compiles beside its updates, for the memory verdict, and the unit of its cost."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.capacity.program import Program
from avd_jax.generation.pipeline import HalfRateSampling, LatentsShape, StudentSampler
from avd_jax.methods.avd.objectives import Student
from avd_jax.methods.transformers import abstract_conditions, make_placement, shaped_params
from avd_jax.models.functional import Denoiser, make_denoiser
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig
from avd_jax.parallel.compiler import convolution_options
from avd_jax.parallel.mesh import filled_up, replicated


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

    `student_sample`, `student_sample_half_rate` and `vae_decode` make the sample videos of a run; `forward` is one
    evaluation of the transformer on one example with half-precision weights.

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
        "vae_decode": partial(_vae_decode, student.shape, mesh),
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


def _vae_decode(shape: LatentsShape, mesh) -> Program:
    one = NamedSharding(Mesh(mesh.devices.flat[:1], ("one",)), PartitionSpec())
    channels = shape[-1]
    config = WanVAEConfig(z_dim=channels, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0))))
    latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shaped = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), (state, latents))

    @partial(jax.jit, compiler_options=convolution_options(mesh.devices.flat[0].platform))
    def decode(state, latents):
        return nnx.merge(graphdef, state).decode(latents)

    return Program("vae_decode", decode, shaped)


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

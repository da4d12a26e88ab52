"""What a distillation compiles beside its updates, for the memory verdict, and the unit of its cost."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from avd_jax.capacity.budget import Stage
from avd_jax.capacity.program import Program
from avd_jax.data.encoding import decoder_program, decoding_on, encoder_program, text_program
from avd_jax.data.tokenizer import TEXT_LENGTH
from avd_jax.generation.pipeline import HalfRateSampling, LatentsShape, StudentSampler, make_teacher_sampler
from avd_jax.methods.samples import own_device
from avd_jax.methods.students import Student
from avd_jax.methods.transformers import abstract_conditions, make_placement, shaped_params
from avd_jax.models.functional import Denoiser, denoiser, make_denoiser
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.low_bit import KINDS, low_bit
from avd_jax.models.umt5 import UMT5Config, UMT5Encoder
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.mesh import filled_up, make_mesh, placed, replicated
from avd_jax.training.method import BatchField, Frozen, Trained

TEXTS_AT_ONCE = 8  # that scripts/encode.py gives to the text encoder


@dataclass(frozen=True)
class Sizes:
    """What is known before any weight is read.

    Attributes:
      model: sizes of generator, fake_score and teacher.
      shapes: different shapes (F, H, W, C) of the clips, that of the first set first.
      interpolator: sizes of the frame interpolator, or None without half-rate steps.
    """

    model: WanDiTConfig
    shapes: Sequence[LatentsShape]
    interpolator: InterpolatorConfig | None


def unit(network: Denoiser, model: WanDiTConfig, fields: Mapping[str, BatchField]) -> tuple[str, Callable, tuple]:
    """Return the piece of work in which a cycle's cost is stated: one forward pass on a batch of some fields.

    It is a whole one: of a single example every batch shard would make the attention.
    """
    batch_size, *shape = fields["latents"].abstract.shape
    conditions = abstract_conditions(batch_size, model, "bfloat16", None)
    latents = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    args = network.abstract_params(), latents, jax.ShapeDtypeStruct((batch_size,), jnp.float32), conditions
    return "forward passes of the DiT", network, args


def stages(config) -> tuple[Stage, ...]:
    """Return when the programs run: for sample videos beside the run, and for encoding and generation without one."""
    samples = "teacher_sample", "student_sample_half_rate", "student_sample", "vae_decode"
    return (
        *([Stage("samples", samples)] if config.sample_every else []),
        Stage("encoding", ("text_encode", "vae_encode"), beside_the_run=False),
        Stage("generation", ("text_encode", "teacher_sample", "vae_decode"), beside_the_run=False),
    )


def programs(
    config,
    generator: Trained,
    student: Student,
    teacher: Denoiser,
    teacher_parts: Mapping[str, Frozen],
    held: Set[str],
    sizes: Sizes,
    mesh: Mesh,
) -> Mapping[str, Callable[[], Program]]:
    """Return the programs by name, each made when it is asked for.

    `teacher_sample`, `student_sample`, `student_sample_half_rate` and `vae_decode` make the sample videos of a run;
    `text_encode` is umT5-XXL on one device, and `vae_encode` makes a clip of the run's data; `forward` is one
    evaluation of the transformer on one example with half-precision weights; `generate_int8` and `generate_fp8` make
    one video of the student on one device with weights of 8 bits (`generate.py --weights_dtype`).

    Args:
      config: of `config.FIELDS`.
      generator: the student as it is trained.
      student: see its class.
      teacher: its network.
      teacher_parts: `teacher` and `negative`, which its samples take.
      held: names of what the run holds anyway.
      sizes: of the networks and the clips, of which `vae_encode` makes the largest; samples are as `student.shape`.
      mesh: to run on.
    """
    model, shape = sizes.model, student.shape
    frozen = {name: part.abstract for name, part in teacher_parts.items()}
    params = generator.parameters(shaped_params(generator.abstract, mesh), frozen)
    sampled = partial(_student_sample, config, params, student, model, sizes.interpolator, mesh)
    found = {"student_sample": sampled}
    if student.half_rate_steps:
        found["student_sample_half_rate"] = partial(sampled, half_rate=True)
    if config.sample.teacher_steps:
        found["teacher_sample"] = partial(_teacher_sample, config, teacher, teacher_parts, held, shape, model, mesh)
    found["vae_decode"] = partial(_vae_decode, config, shape, mesh)
    found["vae_encode"] = partial(_vae_encode, max(sizes.shapes, key=math.prod), mesh)
    if model.text_dim == UMT5Config().dim:
        found["text_encode"] = partial(_text_encode, mesh)
    found["forward"] = partial(_forward, config, shape, model, mesh)
    return found | {f"generate_{kind}": partial(_generate, config, student, model, kind, mesh) for kind in KINDS}


def _samples(config, model: WanDiTConfig, mesh: Mesh) -> tuple:
    """Return the keys and conditions of the sample videos, of which every shard has its share."""
    count = filled_up(config.sample.prompts, mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    return placed(keys, replicated(mesh)), abstract_conditions(count, model, "float32", replicated(mesh))


def _teacher_sample(config, teacher: Denoiser, parts, held: Set[str], shape: LatentsShape, model, mesh) -> Program:
    sample = config.sample
    sampler = make_teacher_sampler(
        teacher,
        shape,
        num_steps=sample.teacher_steps,
        shift=sample.teacher_shift,
        guidance_scale=config.guidance_scale,
        mesh=mesh,
    )
    args = parts["teacher"].abstract, *_samples(config, model, mesh), parts["negative"].abstract
    resident = tuple(i for i, name in ((0, "teacher"), (3, "negative")) if name in held)
    return Program("teacher_sample", sampler, args, resident=resident)


def _text_encode(mesh: Mesh) -> Program:
    """Return the program of the text encoder as scripts/encode.py and generate.py run it, on one device."""
    config = UMT5Config()
    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    graphdef, state = nnx.split(encoder)
    ids = jax.ShapeDtypeStruct((TEXTS_AT_ONCE, TEXT_LENGTH), jnp.int32)
    args = placed((state, ids, ids), replicated(own_device(mesh, mesh.devices.flat[0].process_index)))
    return Program("text_encode", text_program(graphdef), args)


def _student_sample(config, params, student: Student, model, interpolator, mesh, *, half_rate=False) -> Program:
    """Return the program of the student's steps at one of its rates."""
    sampling = None
    if student.half_rate_steps:
        module = nnx.eval_shape(lambda: Interpolator(interpolator, nnx.Rngs(0)))
        sampling = HalfRateSampling(student.half_rate_steps, student.half_rate_positions, module)
    sampler = StudentSampler(student.network, student.shape, timesteps=student.timesteps, half_rate=sampling, mesh=mesh)
    inputs = _samples(config, model, mesh)
    if half_rate:
        args = params, placed(sampler.interpolator, replicated(mesh)), *inputs
        return Program("student_sample_half_rate", sampler.first, args, resident=(0, 1))
    latents = jax.ShapeDtypeStruct((inputs[0].shape[0], *student.shape), jnp.float32)
    xt = (placed(latents, replicated(mesh)),) if sampling else ()
    return Program("student_sample", sampler.rest, (params, *xt, *inputs), resident=(0,))


def _abstract_vae(channels: int, made: Callable[[WanVAE], WanVAE] = lambda vae: vae) -> WanVAE:
    sizes = WanVAEConfig(z_dim=channels, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)
    return nnx.eval_shape(lambda: made(WanVAE(sizes, nnx.Rngs(0))))


def _vae_decode(config, shape: LatentsShape, mesh) -> Program:
    """Return the program that decodes one of the samples, on one device."""
    first = mesh.devices.flat[0]
    graphdef, state = nnx.split(_abstract_vae(shape[-1], partial(decoding_on, device=first)))
    decode = decoder_program(graphdef, platform=first.platform, memory_gib=config.sample.vae_gib)
    args = state, jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return Program("vae_decode", decode, placed(args, replicated(own_device(mesh, first.process_index))))


def _vae_encode(shape: LatentsShape, mesh) -> Program:
    """Return the program that makes a clip of the run's data, on one device."""
    frames, height, width, channels = shape
    first = mesh.devices.flat[0]
    vae = _abstract_vae(channels)
    graphdef, state = nnx.split(vae)
    time, space = vae.config.temporal_stride, vae.config.spatial_stride
    video = jax.ShapeDtypeStruct((1, (frames - 1) * time + 1, height * space, width * space, 3), jnp.float32)
    encode = encoder_program(graphdef, platform=first.platform)
    return Program("vae_encode", encode, placed((state, video), replicated(own_device(mesh, first.process_index))))


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
    run = jax.jit(lambda params, *inputs: network(params, *inputs), compiler_options=compiler_options(mesh))
    return Program("forward", run, (*args, conditions))


def _generate(config, student: Student, model, kind: str, mesh) -> Program:
    """Return the program of one video of the student with weights of 8 bits, on one device."""
    own = make_mesh(devices=mesh.devices.flat[:1])
    placement, dtype = make_placement(config.attention, own), jnp.bfloat16

    def build() -> WanDiT:
        return WanDiT(model, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, placement=placement)

    network, _ = denoiser(low_bit(build, kind)[0])
    sampler = StudentSampler(network, student.shape, timesteps=student.timesteps, mesh=own)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    conditions = abstract_conditions(1, model, "float32", replicated(own))
    args = *placed((network.abstract_params(), keys), replicated(own)), conditions
    return Program(f"generate_{kind}", sampler.rest, args)

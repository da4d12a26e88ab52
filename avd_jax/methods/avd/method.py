"""AVD as a method of the trainer: which networks there are, what they start from, what a run of it reads and says."""

from collections.abc import Mapping
from functools import partial

import jax
from flax import nnx

from avd_jax import convert
from avd_jax.convert.architectures import INTERPOLATOR
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.weights import open_weights
from avd_jax.diffusion.student import StudentSchedule, check_half_rate
from avd_jax.errors import UserError
from avd_jax.losses.adaptive_regression import LossHistory
from avd_jax.methods import distillation, transformers
from avd_jax.methods.adapters import BASE, StudentNetworks
from avd_jax.methods.avd.observer import AVDObserver
from avd_jax.methods.avd.terms import asks_for_fake_score, fake_score_update, generator_update
from avd_jax.methods.programs import Sizes, programs, stages, unit
from avd_jax.methods.students import Student
from avd_jax.models.attention import check_heads
from avd_jax.models.functional import Functional, functional, unallocated
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.parallel.mesh import make_mesh, placed, replicated
from avd_jax.training.method import Frozen, Method
from avd_jax.training.optimizers import constant


def build(config, *, devices=None, video: Mapping[str, int] | None = None) -> Method:
    """Check a config against weights, data and devices, and put the method together; nothing is compiled yet.

    Args:
      config: of `config.FIELDS`.
      devices: to run on; None: all that are here.
      video: frames, height and width of the videos if config.data.latents is empty, to compile ahead of time.

    Raises:
      UserError: naming the field that does not fit.
    """
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size // config.accumulation_steps, devices=devices)
    sizes = _sizes(config, video)
    check_heads(sizes.model.num_heads, mesh.shape["seq"])
    distillation.check_texts(config)
    trainable = StudentNetworks(config, sizes.model, mesh, partial(distillation.start, config, mesh))
    teacher = distillation.teacher_network(config, sizes.model, mesh)
    interpolator = _interpolator(sizes.interpolator) if config.half_rate.steps else None
    student = Student(
        network=trainable.network,
        timesteps=StudentSchedule(tuple(config.student.timesteps)).timesteps,
        shape=sizes.shapes[0],
        half_rate_steps=config.half_rate.steps,
        half_rate_positions=config.half_rate.positions,
        interpolator=interpolator,
    )
    settings, ema_decay = config.optimizer, (lambda step: config.ema_decay) if config.ema_decay else None
    generator = trainable.trained("generator", constant(settings, settings.learning_rate), ema_decay)
    networks, updates = {"generator": generator}, (generator_update(config, student, teacher),)
    teacher_parts = distillation.teacher_parts(config, sizes.model, teacher, mesh)
    frozen = {BASE: teacher_parts[BASE]} if trainable.needs_base(networks) else {}
    if asks_for_fake_score(config.loss):
        networks["fake_score"] = trainable.trained("fake_score", constant(settings, settings.fake_score_learning_rate))
        updates, frozen = (fake_score_update(config, student), *updates), dict(teacher_parts)
    if interpolator is not None:
        frozen["interpolator"] = _interpolator_part(config, interpolator, mesh)
    info = transformers.latents_infos(config.data.latents)[0] if config.data.latents else None
    return Method(
        name="avd",
        main="generator",
        mesh=mesh,
        networks=networks,
        frozen=frozen,
        updates=updates,
        **transformers.encoded_sizes(config.batch_size, sizes.shapes, sizes.model),
        batches=transformers.encoded_batches(config, mesh, text_len=sizes.model.text_len, prompts=config.data.prompts),
        extras={"history": partial(LossHistory.init, len(config.student.timesteps))},
        accumulation_steps=config.accumulation_steps,
        record=partial(
            distillation.record,
            config,
            sizes.model,
            info,
            half_rate_steps=config.half_rate.steps,
            half_rate_positions=config.half_rate.positions,
        ),
        inputs=partial(_inputs, config),
        observer=partial(AVDObserver, config, generator, student, teacher, teacher_parts, sizes.model, info, mesh),
        unit=partial(unit, trainable.network, sizes.model),
        programs=programs(config, generator, student, teacher, teacher_parts, set(frozen), sizes, mesh),
        stages=stages(config),
    )


def _sizes(config, video: Mapping[str, int] | None) -> Sizes:
    model, shapes = distillation.model_and_clips(config, video)
    named, interpolator = config.half_rate.interpolator, None
    if named:
        interpolator = open_weights(named, INTERPOLATOR).config
        if interpolator.channels != shapes[0][-1]:
            raise UserError(
                f"config.half_rate.interpolator={named}: takes latents of {interpolator.channels} channels, the set "
                f"has {shapes[0][-1]}; use the one that was trained for this VAE"
            )
    elif config.half_rate.steps:
        interpolator = InterpolatorConfig(shapes[0][-1])
    for shape in shapes:
        check_half_rate(config.half_rate.steps, num_steps=len(config.student.timesteps), frames=shape[0])
    return Sizes(model, shapes, interpolator)


def _interpolator(sizes: InterpolatorConfig) -> Functional:
    return unallocated(lambda: Interpolator(sizes, nnx.Rngs(0)))


def _interpolator_part(config, interpolator: Functional, mesh) -> Frozen:
    def load():
        return jax.device_put(functional(convert.load_interpolator(config.half_rate.interpolator))[1], replicated(mesh))

    return Frozen(placed(interpolator.abstract_params(), replicated(mesh)), load)


def _inputs(config) -> dict[str, str]:
    found = distillation.inputs(config)
    if config.half_rate.interpolator:
        found["half_rate.interpolator"] = fingerprint(open_weights(config.half_rate.interpolator, INTERPOLATOR))
    return found

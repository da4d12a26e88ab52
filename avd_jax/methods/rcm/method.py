"""rCM as a method of the trainer: which networks there are, what they start from, what a run of it reads and says."""

from collections.abc import Mapping
from functools import partial

from avd_jax.diffusion.student import StudentSchedule
from avd_jax.methods import distillation, transformers
from avd_jax.methods.adapters import StudentNetworks
from avd_jax.methods.observer import DistillationObserver
from avd_jax.methods.programs import Sizes, programs, stages, unit
from avd_jax.methods.rcm.terms import counts, fake_score_update, generator_updates, matches_distributions
from avd_jax.methods.students import Student
from avd_jax.models.attention import check_heads
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.method import Method
from avd_jax.training.optimizers import power_decay, warmed_up


def build(config, *, devices=None, video: Mapping[str, int] | None = None) -> Method:
    """Put the method together; arguments and errors as in `methods/avd/method.py`."""
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size // config.accumulation_steps, devices=devices)
    model, shapes = distillation.model_and_clips(config, video)
    check_heads(model.num_heads, mesh.shape["seq"])
    distillation.check_texts(config)
    trainable = StudentNetworks(config, model, mesh, partial(distillation.start, config, mesh))
    # Only a forward pass goes through it: there is nothing to keep.
    with_tangents = trainable.make("none", tangents=True)
    teacher = distillation.teacher_network(config, model, mesh)
    student = Student(
        network=trainable.network,
        timesteps=StudentSchedule(tuple(config.student.timesteps)).timesteps,
        shape=shapes[0],
        random_shift=config.score.shift if config.rollout.times == "random" else None,
    )
    settings, ema_decay = config.optimizer, power_decay(config.ema_power) if config.ema_power else None
    generator = trainable.trained("generator", warmed_up(settings, settings.learning_rate), ema_decay)
    networks, updates = {"generator": generator}, generator_updates(config, student, with_tangents, teacher)
    if matches_distributions(config):
        rate = settings.fake_score_learning_rate
        networks["fake_score"] = trainable.trained("fake_score", warmed_up(settings, rate))
        updates = (fake_score_update(config, student), *updates)
    teacher_parts = distillation.teacher_parts(config, model, teacher, mesh)
    sizes = Sizes(model, shapes, None)
    info = transformers.latents_infos(config.data.latents)[0] if config.data.latents else None
    return Method(
        name="rcm",
        main="generator",
        mesh=mesh,
        networks=networks,
        frozen=teacher_parts,
        updates=updates,
        **transformers.encoded_sizes(config.batch_size, shapes, model),
        batches=transformers.encoded_batches(config, mesh, text_len=model.text_len, prompts=config.data.prompts),
        extras={"counts": counts},
        accumulation_steps=config.accumulation_steps,
        record=partial(distillation.record, config, model, info, fewer_steps=config.rollout.times == "random"),
        inputs=partial(distillation.inputs, config),
        observer=partial(DistillationObserver, config, generator, student, teacher, teacher_parts, model, info, mesh),
        unit=partial(unit, trainable.network, model),
        programs=programs(config, generator, student, teacher, teacher_parts, set(teacher_parts), sizes, mesh),
        stages=stages(config),
    )

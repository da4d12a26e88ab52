"""rCM as a method of the trainer: which networks there are, what they start from, what a run of it reads and says."""

import dataclasses
from collections.abc import Mapping
from functools import partial

from avd_jax.diffusion.student import StudentSchedule
from avd_jax.methods import distillation, transformers
from avd_jax.methods.observer import DistillationObserver
from avd_jax.methods.programs import Sizes, programs, stages, unit
from avd_jax.methods.rcm.terms import counts, fake_score_update, generator_updates, matches_distributions
from avd_jax.methods.students import Student
from avd_jax.models.attention import check_heads
from avd_jax.models.functional import make_denoiser
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.method import Method, Trained
from avd_jax.training.optimizers import power_decay, warmed_up


def build(config, *, devices=None, video: Mapping[str, int] | None = None) -> Method:
    """Put the method together; arguments and errors as in `methods/avd/method.py`."""
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size // config.accumulation_steps, devices=devices)
    model, shapes = distillation.model_and_clips(config, video)
    check_heads(model.num_heads, mesh.shape["seq"])
    distillation.check_texts(config)
    placement = transformers.make_placement(config.attention, mesh)
    make = partial(make_denoiser, model)
    trained = {"dtype": config.compute_dtype, "param_dtype": "float32"}
    network = make(**trained, remat=config.remat, placement=placement)
    # Only a forward pass goes through it: there is nothing to keep.
    with_tangents = make(**trained, remat="none", placement=dataclasses.replace(placement, tangents=True))
    frozen_dtypes = {"dtype": config.teacher_dtype, "param_dtype": config.teacher_dtype}
    teacher = make(**frozen_dtypes, remat="none", placement=placement)
    student = Student(
        network=network,
        timesteps=StudentSchedule(tuple(config.student.timesteps)).timesteps,
        shape=shapes[0],
        random_shift=config.score.shift if config.rollout.times == "random" else None,
    )
    start, settings = partial(distillation.start, config, mesh), config.optimizer

    def network_of(rate: float, ema_decay=None) -> Trained:
        optimizer = warmed_up(settings, rate)
        abstract = network.abstract_params()
        return Trained(abstract, start, optimizer, ema_decay, optimizer_memory=settings.memory)

    networks = {
        "generator": network_of(settings.learning_rate, power_decay(config.ema_power) if config.ema_power else None)
    }
    updates = generator_updates(config, student, with_tangents, teacher)
    if matches_distributions(config):
        networks["fake_score"] = network_of(settings.fake_score_learning_rate)
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
        observer=partial(DistillationObserver, config, student, teacher, teacher_parts, model, info, mesh),
        unit=partial(unit, network, model),
        programs=programs(config, student, teacher, teacher_parts, set(teacher_parts), sizes, mesh),
        stages=stages(config),
    )

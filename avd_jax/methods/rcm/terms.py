"""rCM's updates (docs/rcm.md): the generator's terms, fake_score's, and what they are made of.

    L_G = 0.07 L_CM + L_KL

While the run warms up the generator has the consistency terms alone, and fake_score rests.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from avd_jax.diffusion.flow import (
    add_noise,
    flow_step,
    sample_logit_normal_timesteps,
    shifted_sigma,
    sigma_of_timestep,
    velocity_along_flow,
    x0_from_velocity,
)
from avd_jax.diffusion.guidance import guided_velocity
from avd_jax.diffusion.student import initial_noise
from avd_jax.losses.consistency import (
    consistency_loss,
    consistency_tangent,
    discrete_consistency_loss,
    normalised,
    trigonometric_speed,
)
from avd_jax.losses.distribution_matching import distribution_matching_loss
from avd_jax.methods import students
from avd_jax.methods.meters import latent_metrics, latent_shares
from avd_jax.methods.students import CONSISTENCY, ScoreTimesteps, Student, stream
from avd_jax.training.method import Draw, Made, Term, Update, Value, active

NETWORKS = "generator", "fake_score"
DISTRIBUTION_MATCHING = "distribution_matching"


def counts() -> dict[str, jax.Array]:
    """Return how many updates each network has had: none."""
    return {name: jnp.zeros((), jnp.int32) for name in NETWORKS}


def generator_terms(config, network: Callable | None) -> tuple[Term, ...]:
    """Return the terms of L_G.

    Args:
      config: of `config.FIELDS`.
      network: the student's; None if nothing is to be computed.
    """

    def consistency(generator, along_flow, captions):
        at = along_flow
        velocity = network(generator, at["xt"], at["timesteps"], captions)
        sigmas = sigma_of_timestep(at["timesteps"])
        return consistency_loss(velocity=velocity, direction=at["direction"], sigmas=sigmas)

    def discrete(generator, one_step, captions):
        at = one_step
        velocity = network(generator, at["xt"], at["timesteps"], captions)
        x0 = x0_from_velocity(xt=at["xt"], velocity=velocity, sigmas=sigma_of_timestep(at["timesteps"]))
        return discrete_consistency_loss(x0=x0, next_x0=at["next_x0"])

    weights = config.loss
    return (
        Term("consistency", weights.consistency, ("generator", "along_flow", "captions"), consistency),
        Term("discrete_consistency", weights.discrete_consistency, ("generator", "one_step", "captions"), discrete),
        Term(
            DISTRIBUTION_MATCHING,
            weights.distribution_matching,
            ("x0", "scores"),
            lambda x0, scores: distribution_matching_loss(x0=x0, **scores),
        ),
    )


def matches_distributions(config) -> bool:
    """Return whether fake_score is trained and compared with."""
    return bool(config.loss.distribution_matching)


def warmup(config) -> int:
    """Return the generator updates with consistency alone: none if there is nothing else, or no consistency."""
    names = {term.name for term in active(generator_terms(config, None))}
    return config.consistency.warmup if names > {DISTRIBUTION_MATCHING} else 0


def generator_updates(config, student: Student, with_tangents: Callable, teacher: Callable) -> tuple[Update, ...]:
    """Return the generator's update in the warm-up, if there is one, and afterwards.

    They read `latents` with their `captions` for consistency and `prompts` for the student's samples, and the
    parameters of the `teacher` and of `fake_score`.

    Args:
      config: of `config.FIELDS`.
      student: see its class.
      with_tangents: its network once more, as `jax.jvp` goes through it.
      teacher: its network.
    """
    timesteps = ScoreTimesteps(config.score.shift, 0.0, 1000.0)
    values = (
        Value(
            "along_flow",
            ("generator", "teacher", "negative", "latents", "captions", "keys", "counts"),
            _along_flow(config, with_tangents, teacher),
        ),
        Value(
            "one_step",
            ("generator", "teacher", "negative", "latents", "captions", "keys"),
            _one_step(config, student.network, teacher),
        ),
        _samples(student),
        students.scores_value(student.network, teacher, timesteps, config.guidance_scale),
    )
    watch = Value("tangent", ("along_flow",), lambda along_flow: along_flow["measured"]), latent_shares()
    extras = partial(_counted, "generator")
    make = partial(Update, "generator", "generator", values=values, watch=watch, metrics=_metrics, extras=extras)
    terms, first = generator_terms(config, student.network), warmup(config)
    lasting = make(terms=terms, draws=(_stop(student, "generator"),), begins=first)
    if not first:
        return (lasting,)
    alone = tuple(term for term in terms if term.name != DISTRIBUTION_MATCHING)
    return make(terms=alone, ends=first), lasting


def fake_score_update(config, student: Student) -> Update:
    """Return fake_score's update: flow matching on the student's samples for `prompts`."""
    timesteps = ScoreTimesteps(config.score.shift, 0.0, 1000.0)
    trigonometric = config.loss.fake_score_weighting == "trigonometric"  # the mean square along t

    def weight(sigmas):
        return jnp.square(trigonometric_speed(sigmas)) if trigonometric else jnp.ones_like(sigmas)

    def loss(fake_score, x0, prompts, keys):
        return students.fake_score_loss(
            student.network, timesteps, params=fake_score, x0=x0, conditions=prompts, keys=keys, weight=weight
        )

    return Update(
        name="fake_score",
        network="fake_score",
        terms=(Term("fake_score", 1.0, ("fake_score", "x0", "prompts", "keys"), loss),),
        values=(_samples(student),),
        draws=(_stop(student, "fake_score"),),
        times=config.fake_score_updates,
        begins=warmup(config),
        extras=partial(_counted, "fake_score"),
    )


def _stop(student: Student, network: str) -> Draw:
    """Return the step at which a rollout stops: each in turn, counted by the updates of a network."""
    steps = len(student.timesteps)
    return Draw("stop", lambda key, extras: extras["counts"][network] % steps, outcomes=tuple(range(steps)))


def _samples(student: Student) -> Value:
    def x0(generator, prompts, canvas, keys, stop):
        return student.x0(generator, prompts, keys, stop, shape=canvas.shape[2:])

    return Value("x0", ("generator", "prompts", "canvas", "keys", "stop"), x0)


def _along_flow(config, network: Callable, teacher: Callable) -> Callable:
    """Return the function that finds the tangent G at noised latents, all of it constant to the gradient."""
    settings, warmup_steps = config.consistency, config.consistency.warmup

    def along_flow(generator, teacher, negative, latents, captions, keys, counts):
        params, keys = jax.lax.stop_gradient(generator), stream(keys, CONSISTENCY)
        draw = partial(sample_logit_normal_timesteps, mean=settings.mean, deviation=settings.deviation)
        timesteps = jax.vmap(lambda key: draw(jax.random.fold_in(key, 1), 1)[0])(keys)
        xt = _noised(latents, keys, timesteps)
        flow = guided(teacher, negative, captions, xt, timesteps)
        velocity, change = velocity_along_flow(
            lambda xt, timesteps: network(params, xt, timesteps, captions), xt, timesteps, flow
        )
        strength = jnp.minimum(counts["generator"] / warmup_steps, 1.0) if warmup_steps else jnp.ones(())
        given = {"velocity": velocity, "velocity_change": change, "teacher_velocity": flow}
        tangent = consistency_tangent(**given, sigmas=sigma_of_timestep(timesteps), strength=strength)
        direction, rms = normalised(tangent)
        error = jnp.mean(jnp.square(velocity - flow), axis=(1, 2, 3, 4))
        measured = {"tangent": rms, "velocity_error": error, "strength": jnp.full_like(rms, strength)}
        return jax.lax.stop_gradient({"xt": xt, "timesteps": timesteps, "direction": direction, "measured": measured})

    guided = _guided(config, teacher)
    return along_flow


def _one_step(config, network: Callable, teacher: Callable) -> Callable:
    """Return the function that takes one step of the teacher from noised latents, and the student's x0 after it."""
    intervals, shift = config.consistency.intervals, config.score.shift

    def one_step(generator, teacher, negative, latents, captions, keys):
        keys = stream(keys, CONSISTENCY)
        number = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 1, intervals + 1))(keys)
        sigmas, following = (shifted_sigma(n / intervals, shift) for n in (number, number - 1))
        xt = _noised(latents, keys, 1000 * sigmas)
        flow = guided(teacher, negative, captions, xt, 1000 * sigmas)
        moved = flow_step(xt=xt, velocity=flow, sigmas=sigmas, next_sigmas=following)
        velocity = network(jax.lax.stop_gradient(generator), moved, 1000 * following, captions)
        next_x0 = x0_from_velocity(xt=moved, velocity=velocity, sigmas=following)
        return jax.lax.stop_gradient({"xt": xt, "timesteps": 1000 * sigmas, "next_x0": next_x0})

    guided = _guided(config, teacher)
    return one_step


def _noised(latents, keys, timesteps):
    noise = initial_noise(keys, latents.shape[1:])
    return add_noise(x0=latents, noise=noise, sigmas=sigma_of_timestep(timesteps))


def _guided(config, network: Callable) -> Callable:
    def velocity(params, negative, captions, xt, timesteps):
        return guided_velocity(
            partial(network, params, xt, timesteps),
            conditions=captions,
            negative_conditions=negative,
            scale=config.guidance_scale,
        )

    return velocity


def _counted(network: str, extras: Mapping, made: Made) -> Mapping:
    before = extras["counts"]
    return {**extras, "counts": before | {network: before[network] + 1}}


def _metrics(made: Made, extras: Mapping) -> dict:
    """Return the numbers of the tangent and of the latent meters, if they were computed."""
    metrics = {}
    if found := made.values.get("tangent"):
        metrics = {f"consistency/{name}": jnp.mean(value) for name, value in found.items()}
        metrics["consistency/nonfinite"] = jnp.mean(~jnp.isfinite(found["tangent"]))
    return metrics | latent_metrics(made)

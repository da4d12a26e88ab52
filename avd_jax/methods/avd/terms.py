"""AVD's two updates: the terms of each loss, and what they are made of.

    L_G = L_KL + 2.0 w L_reg + 0.05 L_temp        (Eq. 9, docs/method.md; the weights are in the config)

A new term is a line in `generator_terms`, a row `loss.<name>` in `config.py`, and its function in `avd_jax/losses/`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp

from avd_jax.losses.adaptive_regression import LossHistory, update_history, weights_and_update
from avd_jax.losses.distribution_matching import distribution_matching_loss
from avd_jax.losses.temporal import temporal_loss
from avd_jax.methods import students
from avd_jax.methods.meters import latent_metrics, latent_shares
from avd_jax.methods.students import ScoreTimesteps, Student
from avd_jax.training.method import Draw, Made, Term, Update, Value, active


def generator_terms(weights) -> tuple[Term, ...]:
    """Return the terms of L_G; `weights` is the config's `loss`, with a weight by each term's name."""
    return (
        Term(
            "distribution_matching",
            weights.distribution_matching,
            ("x0", "scores"),
            lambda x0, scores: distribution_matching_loss(x0=x0, **scores),
        ),
        Term("temporal", weights.temporal, ("x0",), lambda x0: temporal_loss(x0, clip=weights.temporal_clip)),
        Term(
            "regression",
            weights.regression,
            ("regression_losses",),
            lambda regression_losses: regression_losses["loss"],
            weighted_by="regression_weight",
        ),
    )


def asks_for_fake_score(weights) -> bool:
    """Return whether a term of the generator compares with fake_score; without one there is no such network."""
    return any("scores" in term.inputs for term in active(generator_terms(weights)))


def generator_update(config, student: Student, teacher: Callable) -> Update:
    """Return the generator's update.

    It reads `prompts` and the size of the `canvas` for the student's samples, `latents` with their `captions` for the
    regression, and the parameters of `fake_score`, of the `teacher` and, with half-rate steps, of the `interpolator`.

    Args:
      config: of `config.FIELDS`.
      student: see its class.
      teacher: its network.
    """
    return Update(
        name="generator",
        network="generator",
        terms=generator_terms(config.loss),
        values=(
            _samples(student),
            students.scores_value(student.network, teacher, score_timesteps(config), config.guidance_scale),
            Value(
                "regression_losses",
                ("generator", "latents", "captions", "keys", "stop"),
                lambda generator, latents, captions, keys, stop: student.regression(
                    generator, latents, captions, keys, stop
                ),
            ),
            Value("regression_weight", ("regression_losses", "history"), _regression_weight(config.loss)),
        ),
        watch=(latent_shares(),),
        reports=("regression_losses", "regression_weight"),
        draws=(_stop(student),),
        metrics=_generator_metrics,
        extras=partial(_history_after, alpha=config.loss.adaptive_alpha),
    )


def fake_score_update(config, student: Student) -> Update:
    """Return fake_score's update: flow matching on the student's samples for `prompts`.

    With `fake_score_samples` "a_cycle" the samples are made once for all updates of a cycle.
    """
    shared = config.fake_score_samples == "a_cycle"
    timesteps = score_timesteps(config)

    def loss(fake_score, x0, prompts, keys):
        return students.fake_score_loss(
            student.network, timesteps, params=fake_score, x0=x0, conditions=prompts, keys=keys
        )

    return Update(
        name="fake_score",
        network="fake_score",
        terms=(Term("fake_score", 1.0, ("fake_score", "x0", "prompts", "keys"), loss),),
        values=() if shared else (_samples(student),),
        shared=(_samples_of_a_cycle(student, config.fake_score_updates),) if shared else (),
        draws=() if shared else (_stop(student),),
        times=config.fake_score_updates,
    )


def score_timesteps(config) -> ScoreTimesteps:
    """Return the random timesteps of the scores that a config names."""
    return ScoreTimesteps(config.score.shift, config.score.min_timestep, config.score.max_timestep)


def _stop(student: Student) -> Draw:
    return Draw("stop", lambda key, extras: student.stop_step(key), outcomes=tuple(range(len(student.timesteps))))


def _samples(student: Student) -> Value:
    interpolator = ("interpolator",) if student.half_rate_steps else ()

    def x0(generator, prompts, canvas, keys, stop, interpolator=None):
        return student.x0(generator, prompts, keys, stop, interpolator, shape=canvas.shape[2:])

    return Value("x0", ("generator", "prompts", "canvas", "keys", "stop", *interpolator), x0)


def _samples_of_a_cycle(student: Student, times: int) -> Value:
    interpolator = ("interpolator",) if student.half_rate_steps else ()

    def x0(generator, prompts, canvas, keys, interpolator=None):
        return student.samples(generator, prompts, keys, interpolator, shape=canvas.shape[2:], times=times)

    return Value("x0", ("generator", "prompts", "canvas", "keys", *interpolator), x0)


def _regression_weight(loss) -> Callable:
    settings = {"alpha": loss.adaptive_alpha, "k": loss.adaptive_k, "uses": loss.adaptive_uses}

    def weight(regression_losses, history):
        found = regression_losses
        return regression_weight(loss.regression_weighting, found["loss"], found["index"], history, **settings)

    return weight


def regression_weight(weighting: str, loss, index, history: LossHistory, *, alpha: float, k: float, uses: str):
    """Return the weight of each example's L_reg, [B] (Eqs. 6 and 7); 1 if `weighting` is 'fixed'."""
    if weighting == "fixed":
        return jnp.ones_like(loss)
    return weights_and_update(history, loss, index, alpha=alpha, k=k, weight_uses=uses)[0]


def _history_after(extras: Mapping, made: Made, *, alpha: float) -> Mapping:
    """Return the extras with the history after the batch (Eq. 6)."""
    if "regression_losses" not in made.values:
        return extras
    losses = made.values["regression_losses"]
    history = update_history(extras["history"], losses["loss"], losses["index"], alpha=alpha)
    return {**extras, "history": history}


def _generator_metrics(made: Made, extras: Mapping) -> dict:
    """Return the numbers of the regression and of the latent meters, 0 and nan if they are switched off."""
    weight = made.values.get("regression_weight", jnp.zeros(made.examples))
    losses = made.values.get("regression_losses", {"index": jnp.zeros(made.examples, jnp.int32)})
    metrics = {
        "regression/weight": jnp.mean(weight),
        "regression_weight": weight,
        "timestep_index": losses["index"],
    }
    metrics |= {f"regression/ema_{i}": mean for i, mean in enumerate(extras["history"].mean)}
    return metrics | latent_metrics(made)

"""Distillation that knows half-rate steps: what the student is given at each step, and the run that keeps its parts."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import (
    LATENTS_SHAPE,
    generator_loss,
    linear_network,
    linear_params,
    make_batch,
    make_config,
    make_frozen,
    make_student,
    recording,
    train,
    use_devices,
    write_sets,
    write_weights,
)

from avd_jax import convert
from avd_jax.convert.shipping import write_interpolator
from avd_jax.errors import UserError
from avd_jax.losses.adaptive_regression import LossHistory
from avd_jax.methods.avd import RECIPE
from avd_jax.methods.avd.config import validate
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.training.update import example_keys

GENERATOR, FAKE_SCORE, TEACHER = linear_params(0), linear_params(1), linear_params(2)
TIMES = (1000.0, 900.0, 757.0, 522.0)
BATCH = make_batch(3)
PROMPTS, CAPTIONS = BATCH["prompts"]["prompt_embeds"], BATCH["captions"]["prompt_embeds"]
FROZEN = make_frozen(TEACHER, np.zeros((8, 16), np.float32), interpolator={"factor": jnp.float32(0.5)})
HALF = {"half_rate__steps": 2, "half_rate__interpolator": "given", "half_rate__positions": "consecutive"}
HALF |= {"loss__temporal": 0.0}


def double(params, latents):
    """Interpolate by the sum of both frames times a factor."""
    made = params["factor"] * (latents[:, :-1] + latents[:, 1:])
    longer = jnp.zeros((latents.shape[0], 2 * latents.shape[1] - 1, *latents.shape[2:]))
    return longer.at[:, ::2].set(latents).at[:, 1::2].set(made)


def x0_of(call):
    _, _, latents, timesteps, _, velocity = call
    return latents - (timesteps / 1000)[:, None, None, None, None] * velocity


@pytest.fixture(scope="module")
def evaluate():
    """Return a function from the stop to (parts, gradient, the student's rollout, its regression, the teacher)."""
    calls, config = [], make_config(**HALF)
    network, teacher = (recording(linear_network, calls, name) for name in ("student", "teacher"))
    student = make_student(config, network, double)
    history, keys = LossHistory.init(4), example_keys(jax.random.key(0), jnp.arange(3))

    @jax.jit
    def compute(params, stop):
        def loss(params):
            return generator_loss(config, student, teacher, params, FAKE_SCORE, FROZEN, history, BATCH, keys, stop)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def run(stop):
        calls.clear()
        (_, parts), gradient = compute(GENERATOR, jnp.asarray(stop))
        jax.effects_barrier()
        mine = [call for call in calls if call[0] == "student" and np.array_equal(call[1]["mix"], GENERATOR["mix"])]
        rollout = [call for call in mine if np.array_equal(call[4], PROMPTS)]
        regression = [call for call in mine if np.array_equal(call[4], CAPTIONS)]
        rollout.sort(key=lambda call: -call[3][0])
        return parts, gradient, rollout, regression, [call for call in calls if call[0] == "teacher"]

    return run


@pytest.mark.parametrize("stop", range(4))
def test_the_rollout_is_at_half_rate_first_and_is_judged_at_the_full_one(evaluate, stop):
    parts, gradient, rollout, _, teacher = evaluate(stop)
    frames = LATENTS_SHAPE[0]
    assert [call[2].shape[1] for call in rollout] == [2, 2, frames, frames][: stop + 1]
    assert [call[3][0] for call in rollout] == list(np.float32(TIMES[: stop + 1]))
    assert all(call[2].shape[1] == frames for call in teacher)
    assert np.isfinite(parts["distribution_matching"]).all()
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_interpolation_carries_the_gradient_of_all_frames():
    config, keys = make_config(**HALF), example_keys(jax.random.key(0), jnp.arange(3))
    weights = np.random.default_rng(0).standard_normal((3, *LATENTS_SHAPE))

    def value(params, factor, stop=1):
        student = make_student(config, interpolator=double)
        x0 = student.x0(params, BATCH["prompts"], keys, stop, {"factor": factor})
        return jnp.sum(weights * x0)

    def gradient(factor):
        return np.asarray(jax.grad(value)(GENERATOR, factor)["mix"])

    # x0 is linear in the factor, the input of the last step does not depend on it: so is the gradient.
    np.testing.assert_allclose(gradient(2.0) - gradient(1.0), gradient(1.0) - gradient(0.0), rtol=1e-3, atol=1e-4)
    assert np.abs(gradient(1.0) - gradient(0.0)).max() > 0.1


@pytest.mark.parametrize("stop", range(4))
def test_regression_is_at_the_rate_of_its_timesteps(evaluate, stop):
    parts, _, _, (regression,), _ = evaluate(stop)
    _, _, xt, timesteps, _, velocity = regression
    half = stop < 2
    latents = np.asarray(BATCH["latents"])[:, :: 2 if half else 1]
    assert xt.shape == latents.shape
    assert set(timesteps) <= set(np.float32(TIMES[:2] if half else TIMES[2:]))
    sigmas = (timesteps / 1000)[:, None, None, None, None]
    noise = (xt - (1 - sigmas) * latents) / sigmas
    expected = np.mean((velocity - (noise - latents)) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(parts["regression"], expected, rtol=1e-3)
    np.testing.assert_array_equal(np.float32(TIMES)[parts["timestep_index"]], timesteps)


def test_a_run_keeps_its_interpolator_and_says_how_it_is_sampled(tmp_path, monkeypatch):
    use_devices(monkeypatch.setattr, 1)  # a quarter of the time to compile
    latents, prompts = write_sets(tmp_path / "sets")
    write_interpolator(Interpolator(InterpolatorConfig(4, (8, 8, 8)), nnx.Rngs(0)), tmp_path / "made")
    config = make_config(
        init_from=str(write_weights(tmp_path / "wan")),
        data__latents=str(latents),
        data__prompts=str(prompts),
        batch_size=1,
        num_steps=1,
        fake_score_updates=1,
        sample_every=0,
        loss__distribution_matching=0.0,  # whose updates are large: one network is enough
        half_rate__steps=2,
        half_rate__positions="strided",
        half_rate__interpolator=str(tmp_path / "made"),
    )
    assert train(config, tmp_path / "run") == 0
    student = convert.student_settings(tmp_path / "run")
    assert (student["half_rate_steps"], student["half_rate_positions"]) == (2, "strided")
    assert convert.open_interpolator_of(tmp_path / "run").config.widths == (8, 8, 8)
    assert convert.open_interpolator_of(tmp_path / "run" / "checkpoints" / "1") is not None
    convert.export_dit(tmp_path / "run", tmp_path / "out", layout="native")
    assert convert.load_interpolator(tmp_path / "out").config.channels == 4
    assert json.loads((tmp_path / "out" / "avd_student.json").read_text())["half_rate_steps"] == 2

    for change, message in (
        ({"data__latents": str(write_sets(tmp_path / "even", shape=(4, 4, 4, 4))[0])}, "4 latent frames have no half"),
        ({"half_rate__interpolator": str(tmp_path / "wan")}, "holds a diffusion transformer, not a frame interpolator"),
    ):
        for name, value in change.items():
            node, _, leaf = name.partition("__")
            config[node][leaf] = value
        with pytest.raises(UserError, match=re.escape(message)):
            RECIPE.build(config)


def test_bad_settings():
    for change, message in (
        ({"half_rate__steps": 5}, "config.half_rate.steps=5 must be 0 to 4"),
        ({"half_rate__steps": 2}, "config.half_rate.interpolator is empty: give weights"),
        ({"half_rate__positions": "odd"}, "config.half_rate.positions='odd' must be one of consecutive, strided"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            validate(make_config(init_from="a", data__latents="b", **change))

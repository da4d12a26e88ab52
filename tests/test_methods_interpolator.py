"""Training the interpolator: loss and baselines by hand, the average as start, held-out clips, resumption, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import run_method, use_devices, write_sets

from avd_jax import convert
from avd_jax.convert.shipping import write_interpolator
from avd_jax.convert.state import flat_state
from avd_jax.data.latents import EncodedSet
from avd_jax.data.pipeline import held_out_indices, training_batches
from avd_jax.errors import UserError
from avd_jax.fields import config_from
from avd_jax.methods import transformers
from avd_jax.methods.interpolator import FIELDS, RECIPE
from avd_jax.methods.interpolator.method import (
    baseline_errors,
    interpolation_loss,
    new_interpolator,
    split_frames,
    trained_interpolator,
)
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig

SHAPE = 5, 4, 4, 4


@pytest.fixture(scope="module")
def latents_dir(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"), clips=11, shape=SHAPE)[0]


def config_for(latents_dir, **changes):
    config = config_from(FIELDS)
    config.data.latents, config.data.held_out, config.model.widths = str(latents_dir), 3, (8, 8, 8)
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 4, 8, 1, 2
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 0, 1e-3
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    use_devices(monkeypatch.setattr, 2, transformers)


def test_loss_and_baselines_by_hand():
    latents = jnp.arange(5.0)[None, :, None, None, None] ** 2 * jnp.ones((2, 1, 4, 4, 4))  # 0 1 4 9 16
    left, missing, right = split_frames(latents)
    np.testing.assert_array_equal(left[0, :, 0, 0, 0], [0, 4])
    np.testing.assert_array_equal(missing[0, :, 0, 0, 0], [1, 9])
    np.testing.assert_array_equal(right[0, :, 0, 0, 0], [4, 16])
    errors = baseline_errors(latents)
    np.testing.assert_allclose(errors["copy left"], (1**2 + 5**2) / 2)
    np.testing.assert_allclose(errors["average"], 1)  # of 2 for 1, and 10 for 9
    unet = Interpolator(InterpolatorConfig(4, (8, 8, 8)), nnx.Rngs(0))
    unet.out_conv.kernel[...] = jnp.zeros_like(unet.out_conv.kernel[...])
    unet.out_conv.bias[...] = jnp.full(4, 5.0)  # always 5: 4 away from both
    np.testing.assert_allclose(nnx.jit(interpolation_loss)(unet, latents), 16, rtol=1e-6)


def test_a_wide_network_starts_as_the_average_and_still_sees_both_frames():
    latents = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 4)).astype(np.float32)
    unet = new_interpolator(InterpolatorConfig(4, (16, 8, 8)), seed=1)
    forward = nnx.jit(lambda unet: unet(latents))
    np.testing.assert_allclose(forward(unet)[:, 1::2], (latents[:, :-1] + latents[:, 1:]) / 2, atol=1e-4)
    graphdef, state = nnx.split(unet)
    gradient = jax.jit(jax.grad(lambda state: interpolation_loss(nnx.merge(graphdef, state), latents)))(state)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(nnx.filter_state(gradient["out_conv"], nnx.Param)))
    narrow = new_interpolator(InterpolatorConfig(4, (4, 8, 8)), seed=1)
    assert np.abs(forward(narrow)[:, 1::2] - (latents[:, :-1] + latents[:, 1:]) / 2).max() > 0.1


def test_held_out_clips_are_spread_and_never_seen(latents_dir):
    assert held_out_indices([11], 3) == [[1, 5, 9]]
    assert held_out_indices([4], 2) == [[1, 3]]
    assert held_out_indices([3, 8], 3) == [[1], [2, 6]], "as if they were one set"
    records = EncodedSet(latents_dir, "latents")
    held = [np.asarray(records[i]["latents"]) for i in held_out_indices([11], 3)[0]]
    batches = training_batches(latents_dir, None, batch_size=4, prompt_batches=1, seed=0, text_len=1, held_out=3)
    seen = np.concatenate([next(batches)["latents"] for _ in range(4)])
    assert not any((clip == row).all() for clip in held for row in seen)
    assert len({row.tobytes() for row in seen}) == 8  # all others
    with pytest.raises(UserError, match="11 records are to be held out of a set of 11"):
        held_out_indices([11], 11)


def test_it_trains_resumes_bit_for_bit_and_tells_the_held_out_error(latents_dir, tmp_path):
    config = config_for(latents_dir)
    run = run_method(RECIPE, config, tmp_path / "run")
    whole = run.state.networks["interpolator"]
    unet = trained_interpolator(run.method, whole.ema)
    assert (run.status, unet.config) == (0, InterpolatorConfig(4, (8, 8, 8)))
    table = (tmp_path / "run" / "held_out.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table] == ["step", "---", "2", "4"]

    clips = EncodedSet(latents_dir, "latents")
    held = jnp.stack([jnp.asarray(clips[i]["latents"], jnp.float32) for i in held_out_indices([11], 3)[0]])
    expected = [baseline_errors(held)[name] for name in ("copy left", "average")]
    expected.append(nnx.jit(interpolation_loss)(unet, held))
    np.testing.assert_allclose([float(cell) for cell in table[-1].split("|")[2:5]], expected, atol=1e-3)

    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "gone")  # as if it had been killed after step 2
    resumed = run_method(RECIPE, config, tmp_path / "run").state
    jax.tree.map(np.testing.assert_array_equal, resumed, run.state)
    assert (tmp_path / "run" / "held_out.md").read_text().splitlines() == table

    write_interpolator(unet, tmp_path / "student")
    for path, key in ((tmp_path / "run", "ema"), (tmp_path / "student", "generator")):
        for name, leaf in flat_state(nnx.state(convert.load_interpolator(path, key=key))).items():
            np.testing.assert_array_equal(leaf, flat_state(nnx.state(unet))[name])
    for name, leaf in flat_state(whole.params).items():  # statistics stay
        if name.endswith((".mean", ".var")):
            np.testing.assert_array_equal(leaf, float(name.endswith(".var")))

    tuned = config_for(latents_dir, init_from=str(tmp_path / "student"), num_steps=1)
    assert int(run_method(RECIPE, tuned, tmp_path / "further").state.step) == 1


def test_more_updates_lower_the_error_on_a_world_that_can_be_learnt(tmp_path):
    latents = np.random.default_rng(0).standard_normal((64, 2, 4, 4, 4)).astype(np.float32)
    left, right = latents[:, :1], latents[:, 1:]
    clip = jnp.concatenate([left, jnp.maximum(left, right), right], axis=1)  # which no average gives
    unet = new_interpolator(InterpolatorConfig(4, (16, 16, 16)), seed=0)
    graphdef, state = nnx.split(unet)

    @jax.jit
    def step(state):
        value, gradient = jax.value_and_grad(lambda state: interpolation_loss(nnx.merge(graphdef, state), clip))(state)
        return jax.tree.map(lambda leaf, grad: leaf - 0.3 * grad, state, gradient), value

    for _ in range(60):
        state, value = step(state)
    assert value < 0.75 * baseline_errors(clip)["average"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.latents": ""}, "config.data.latents is empty"),
        ({"data.held_out": 0}, "config.data.held_out=0 must be at least 1"),
        ({"sample.clips": -1}, "config.sample.clips=-1 must be at least 0"),
        ({"optimizer.weight_decay": 0.1}, "config.optimizer.weight_decay must be 0"),
        ({"model.widths": (8, 8)}, "widths=(8, 8) and channels=16 must be three"),
        ({"batch_size": 3}, "config.batch_size=3 must be a multiple of 2 shards"),
        ({"data.held_out": 11}, "11 records are to be held out of a set of 11"),
    ],
)
def test_bad_settings(latents_dir, tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_method(RECIPE, config_for(latents_dir, **change), tmp_path)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_clips_of_which_no_frame_can_be_left_out(tmp_path, frames):
    latents_dir, _ = write_sets(tmp_path, shape=(frames, 4, 4, 4))
    with pytest.raises(UserError, match=f"its clips have {frames} latent frames; every second one can be left out of"):
        run_method(RECIPE, config_for(latents_dir), tmp_path / "run")


def test_an_interpolator_of_another_vae(latents_dir, tmp_path):
    write_interpolator(Interpolator(InterpolatorConfig(16, (8, 8, 8)), nnx.Rngs(0)), tmp_path)
    with pytest.raises(UserError, match="takes latents of 16 channels, the set has 4"):
        run_method(RECIPE, config_for(latents_dir, init_from=str(tmp_path)), tmp_path / "run")

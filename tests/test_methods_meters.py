"""Collapse meters: shares of the real data's, warnings at the edges of the bands, histograms of the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.evaluation.suite import measure
from avd_jax.methods.meters import BINS, JUDGED_EXAMPLES, WEIGHTS_A_HISTOGRAM, Meters, latent_meters

TIMESTEPS = (1000.0, 900.0)


def metrics(variance=1.0, spread=1.0, stop=1, weights=(), index=()):
    return {
        "meter/latent_temporal_variance": np.float32(variance),
        "meter/latent_spread": np.float32(spread),
        "rollout_stop": np.int32(stop),
        "regression_weight": np.asarray(weights, np.float32),
        "timestep_index": np.asarray(index, np.int32),
        "loss/generator": np.float32(1.0),
    }


def make(batch_size=JUDGED_EXAMPLES, **bands):
    lines = []
    return Meters(bands, TIMESTEPS, lines.append, batch_size=batch_size), lines


def test_latent_meters_know_frozen_and_stretched_ones():
    latents = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 3))
    real = latent_meters(latents)
    frozen = latent_meters(jnp.repeat(latents[:, :1], 5, axis=1))
    stretched = latent_meters(1.5 * latents)
    np.testing.assert_allclose(real["latent_temporal_variance"], 1, atol=0.3)
    np.testing.assert_allclose(real["latent_spread"], 1, atol=0.2)
    np.testing.assert_allclose(frozen["latent_temporal_variance"], 0, atol=1e-6)
    np.testing.assert_allclose(stretched["latent_spread"], 1.5 * real["latent_spread"], rtol=1e-5)
    np.testing.assert_allclose(
        stretched["latent_temporal_variance"], 2.25 * real["latent_temporal_variance"], rtol=1e-5
    )


def test_only_the_last_step_of_the_rollout_is_metered():
    meters, _ = make()
    early, late = metrics(variance=0.2, stop=0), metrics(variance=0.8)
    meters.after_update(1, early)
    assert early == {"loss/generator": 1.0}
    assert np.isnan(meters.values["meter/latent_temporal_variance"])
    meters.after_update(2, late)
    assert late["meter/latent_temporal_variance"] == pytest.approx(0.8)
    assert meters.values["meter/latent_temporal_variance"] == pytest.approx(0.8)


def test_a_meter_warns_once_when_it_leaves_its_band_and_once_when_it_is_back():
    meters, lines = make(latent_temporal_variance=(0.5, 2.0), latent_spread=(0.7, 1.4))
    for step, variance in enumerate((1.0, 0.4, 0.3, 0.6, 2.5)):
        meters.after_update(step, metrics(variance=variance))
    assert len(lines) == 3
    assert lines[0].startswith("warning: step 1: meter/latent_temporal_variance is 0.40")
    assert "0.5..2: motion freezes" in lines[0]
    assert lines[1] == "step 3: meter/latent_temporal_variance is back in its band 0.5..2: 0.60 of the real data's"
    assert "frames jump" in lines[2]


def test_small_batches_are_judged_together():
    meters, lines = make(batch_size=JUDGED_EXAMPLES // 4, latent_temporal_variance=(0.5, 2.0))
    logged = []
    for step, variance in enumerate((0.1, 1.9, 0.1, 1.9, 0.3, 0.3, 0.1)):  # means of four: 1, 1.05, 0.65, 0.65
        values = metrics(variance=variance)
        meters.after_update(step, values)
        logged.append(values["meter/latent_temporal_variance"])
    assert lines == []
    assert logged == pytest.approx([0.1, 1.9, 0.1, 1.9, 0.3, 0.3, 0.1]), "each update's own"
    meters.after_update(7, metrics(variance=0.1))
    assert lines == [
        "warning: step 7: meter/latent_temporal_variance is 0.20 of the real data's, outside "
        "config.meters.latent_temporal_variance=0.5..2: motion freezes"
    ]


def test_histograms_come_a_timestep_with_every_weight_once():
    meters, _ = make()
    size, got = 32, []
    for step in range(WEIGHTS_A_HISTOGRAM // size + 1):
        weights = np.full(size, 0.25)
        weights[0] = 0.95
        index = np.arange(size) % 2
        got.append(meters.after_update(step, metrics(weights=weights, index=index)))
    full = [histogram for histogram in got if histogram]
    assert len(full) == 1
    assert set(full[0]) == {"regression/weight_histogram_t1000", "regression/weight_histogram_t900"}
    first, second = full[0].values()
    assert len(first) == len(BINS) - 1
    assert sum(first) + sum(second) == WEIGHTS_A_HISTOGRAM
    assert first[9] == WEIGHTS_A_HISTOGRAM // size
    assert second[2] == WEIGHTS_A_HISTOGRAM // 2


def test_a_timestep_without_weights_has_no_histogram():
    """TensorBoard's writer refuses one of nothing; without a regression all weights are stand-ins, and 0."""
    meters, _ = make()
    size = WEIGHTS_A_HISTOGRAM
    got = meters.after_update(1, metrics(weights=np.full(size, 0.25), index=np.zeros(size)))
    assert set(got) == {"regression/weight_histogram_t1000"}
    assert meters.after_update(2, metrics(weights=np.zeros(size), index=np.zeros(size))) == {}
    later = metrics(weights=np.full(size, 0.25), index=np.ones(size))
    assert set(meters.after_update(3, later)) == {"regression/weight_histogram_t900"}


def test_samples_are_measured_beside_real_clips_and_the_teacher():
    clips = [shapes_world.clip(i, frames=9, height=64, width=64) for i in range(4)]
    real = [measure(video, caption) for video, caption in clips]
    frozen = [measure(np.repeat(video[:1], 9, axis=0), caption) for video, caption in clips]
    meters, lines = make(temporal_variance=(0.5, 2.0))
    meters.expect_samples(real[0])
    assert "samples/alignment" in meters.values
    values = meters.after_samples(10, frozen, real, real)
    assert values["meter/temporal_variance"] == pytest.approx(0)
    assert values["meter/teacher_temporal_variance"] == pytest.approx(1)
    assert values["meter/saturation"] == pytest.approx(1, abs=0.2)
    assert values["samples/dynamic_degree"] == 0
    assert values["samples/dynamic_degree"] == meters.values["samples/dynamic_degree"]
    assert len(lines) == 1
    assert "motion freezes" in lines[0]
    assert not any("teacher" in name for name in make()[0].after_samples(0, real, [], real))


def test_a_student_like_its_teacher_has_not_collapsed():
    """Four captions' colours may be stronger than four other clips': the teacher's videos of the same ones say so."""
    clips = [shapes_world.clip(i, frames=9, height=64, width=64) for i in range(4)]
    real = [measure(video, caption) for video, caption in clips]
    vivid = [row | {"saturation": 1.6 * row["saturation"]} for row in real]
    meters, lines = make(saturation=(0.7, 1.4))
    values = meters.after_samples(10, vivid, vivid, real)
    assert values["meter/saturation"] == pytest.approx(values["meter/teacher_saturation"]) == pytest.approx(1.6)
    assert lines == []
    meters.after_samples(20, vivid, real, real)
    assert len(lines) == 1
    assert "meter/saturation is 1.60 of the real data's and 1.60 of the teacher's, outside" in lines[0]
    meters, lines = make(saturation=(0.7, 1.4))
    meters.after_samples(10, vivid, [], real)
    assert "meter/saturation is 1.60 of the real data's, outside" in lines[0]

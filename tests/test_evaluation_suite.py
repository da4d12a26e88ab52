"""All metrics of one video and the means over many."""

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.evaluation.suite import measure, summarise


def test_a_clip_of_the_world_has_all_metrics_and_another_video_those_that_need_no_scene():
    video, caption = shapes_world.clip(3, frames=9, height=64, width=64)
    row, plain = measure(video, caption), measure(video, "A panda plays the guitar.")
    assert row["alignment"] == row["instance_preservation"] == row["dynamic_degree"] == 1.0
    assert {"alignment/shape", "alignment/colour", "alignment/direction"} <= row.keys()
    assert plain == {name: row[name] for name in plain}
    assert row.keys() - plain.keys() == {
        *("alignment", "alignment/shape", "alignment/colour", "alignment/direction"),
        *("instance_preservation", "dynamic_degree"),
    }
    assert all(np.isfinite(value) for value in row.values())


def test_means_and_shares_of_the_real_mean():
    rows = [
        {"alignment": 1.0, "saturation": 0.3, "colourfulness": 30.0, "temporal_variance": 0.1},
        {"saturation": 0.6, "colourfulness": 60.0, "temporal_variance": 0.3},
    ]
    real = [{"saturation": 0.3, "colourfulness": 15.0, "temporal_variance": 0.4}]
    means = summarise(rows, real)
    assert means["alignment"] == 1.0
    assert means["saturation"] == pytest.approx(0.45)
    assert means["saturation/relative"] == pytest.approx(1.5)
    assert means["colourfulness/relative"] == pytest.approx(3.0)
    assert means["temporal_variance/relative"] == pytest.approx(0.5)
    assert not any(name.endswith("/relative") for name in summarise(rows))

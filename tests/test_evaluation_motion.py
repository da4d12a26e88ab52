"""Motion and flicker: known answers, and what is frozen or still has none."""

import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.evaluation import motion


def texture(shift, size=96):
    y, x = np.mgrid[0:size, 0:size]
    picture = np.sin((x - shift) / 3.0) * np.cos(y / 4.0) * 0.4 + np.sin((x - shift + y) / 9.0) * 0.4
    return np.repeat(picture[..., None], 3, axis=-1).astype(np.float32)


def moving(pixels_a_frame, frames=17):
    return np.stack([texture(pixels_a_frame * i) for i in range(frames)])


def test_temporal_variance_is_the_variance_along_frames():
    video = np.random.default_rng(0).normal(size=(5, 4, 6, 3))
    assert motion.temporal_variance(video) == pytest.approx(video.var(axis=0).mean())
    assert motion.temporal_variance(np.repeat(video[:1], 5, axis=0)) == pytest.approx(0)


def test_flicker_is_one_minus_the_mean_change():
    video = np.zeros((4, 2, 2, 3))
    video[1::2] = 1.0  # half of the range, each time
    assert motion.flicker(video) == pytest.approx(0.5)
    assert motion.flicker(np.zeros((4, 2, 2, 3))) == 1.0


def test_flow_tells_moving_videos_from_still_and_slow_ones():
    # At 16 frames a second every second frame counts, and the threshold is 6/256 of 96 pixels: 2.25 in two frames.
    assert motion.flow_dynamic_degree(moving(2.0), fps=16) == 1.0
    assert motion.flow_dynamic_degree(moving(0.3), fps=16) == 0.0
    assert motion.flow_dynamic_degree(moving(0.0), fps=16) == 0.0


def test_flow_must_last_for_a_quarter_of_the_time():
    video = np.concatenate([np.repeat(moving(0.0), 2, axis=0), moving(2.0, frames=5)])
    assert motion.flow_dynamic_degree(video, fps=16) == 0.0
    assert motion.flow_dynamic_degree(np.concatenate([video, moving(2.0)]), fps=16) == 1.0


def test_one_frame_has_no_motion():
    for metric in (motion.flicker, lambda video: motion.flow_dynamic_degree(video, 16)):
        with pytest.raises(UserError, match="1 frame"):
            metric(np.zeros((1, 8, 8, 3)))

"""Saturation and colourfulness: known answers, and they rise if colours are stretched."""

import colorsys

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.evaluation import colour


def flat(rgb):
    return np.broadcast_to(2 * np.asarray(rgb, np.float32) - 1, (3, 8, 8, 3))


@pytest.mark.parametrize("rgb", [(0.2, 0.4, 0.9), (0.5, 0.5, 0.5), (0.9, 0.1, 0.3)])
def test_known_answers_on_one_colour(rgb):
    assert colour.saturation(flat(rgb)) == pytest.approx(colorsys.rgb_to_hsv(*rgb)[1], abs=1e-5)
    red, green, blue = (255 * channel for channel in rgb)
    offset = np.hypot(red - green, 0.5 * (red + green) - blue)
    assert colour.colourfulness(flat(rgb)) == pytest.approx(0.3 * offset, rel=1e-4, abs=1e-4)


def test_colourfulness_of_a_checkerboard():
    video = np.array(flat((1.0, 0.0, 0.0)))
    video[:, ::2] = flat((0.0, 1.0, 0.0))[:, ::2]
    # red - green is +-255 half of the time; 0.5 (red + green) - blue is always 127.5
    assert colour.colourfulness(video) == pytest.approx(255 + 0.3 * 127.5, rel=1e-4)


def test_both_rise_with_stretched_colours_and_fall_to_grey():
    for index in range(10):
        video, _ = shapes_world.clip(index, frames=3, height=32, width=32)
        grey = video.mean(-1, keepdims=True)
        stretched, pale = np.clip(grey + 1.5 * (video - grey), -1, 1), grey + 0.5 * (video - grey)
        for metric in (colour.saturation, colour.colourfulness):
            assert metric(pale) < 0.8 * metric(video)
            assert metric(stretched) > 1.05 * metric(video)
            assert metric(np.repeat(grey, 3, axis=-1)) == pytest.approx(0, abs=1e-4)

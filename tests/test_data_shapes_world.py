"""The procedural world: same clip for an index everywhere, and captions that tell the truth."""

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.data.shapes_world import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, TEXTURES


def shape_mask(index, frame, size=96):
    """Where the picture shows the shape: the pixels whose hue is not the background's."""
    video, _ = shapes_world.clip(index, frames=5, height=size, width=size)
    picture = (video[frame] + 1) / 2
    background = np.asarray(shapes_world.BACKGROUNDS[shapes_world.scene(index).background])
    background = background * (1.1 - 0.2 * np.arange(size) / size)[:, None, None]
    return np.abs(picture - np.clip(background, 0, 1)).max(-1) > 0.04


def first_with(count=1, **words):
    found = (i for i in range(2000) if all(getattr(shapes_world.scene(i), k) == v for k, v in words.items()))
    return [next(found) for _ in range(count)]


def test_range_shape_and_dtype():
    video, caption = shapes_world.clip(3, frames=17, height=64, width=96)
    assert video.shape == (17, 64, 96, 3)
    assert video.dtype == np.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert caption == shapes_world.caption(3)


def test_the_draws_are_fixed():
    # Philox' raw output is the same in every version of NumPy, so that these scenes must not change either.
    assert shapes_world.caption(0) == (
        "A large striped red triangle moves slowly diagonally up to the right across a sandy background."
    )
    assert shapes_world.caption(5) == (
        "A medium checkered pink triangle moves slowly diagonally up to the right across a grey background."
    )
    first, _ = shapes_world.clip(7, frames=5, height=32, width=32)
    again, _ = shapes_world.clip(7, frames=5, height=32, width=32)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(shapes_world.clip(7, frames=9, height=32, width=32)[0][::2], first)


def test_captions_vary_over_all_words():
    captions = [shapes_world.caption(i) for i in range(300)]
    assert len(set(captions)) > 250
    words = [*SHAPES, *COLOURS, *SIZES, *SPEEDS, *DIRECTIONS, *shapes_world.BACKGROUNDS, *TEXTURES[1:]]
    for word in words:
        assert any(word in caption for caption in captions), word


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_moves_as_the_caption_says(direction, speed):
    (index,) = first_with(direction=direction, speed=speed, size="small")
    (y0, x0), (y1, x1) = (np.argwhere(shape_mask(index, frame)).mean(0) for frame in (0, 4))
    expected = 96 * SPEEDS[speed] * np.asarray(DIRECTIONS[direction])
    np.testing.assert_allclose([y1 - y0, x1 - x0], expected, atol=1.5)


@pytest.mark.parametrize("colour", COLOURS)
def test_has_the_colour_it_is_said_to_have(colour):
    (index,) = first_with(colour=colour, texture="plain")
    video, _ = shapes_world.clip(index, frames=5, height=96, width=96)
    shown = np.median(((video[2] + 1) / 2)[shape_mask(index, 2)], axis=0)
    np.testing.assert_allclose(shown, COLOURS[colour], atol=0.02)


def test_outlines_have_the_area_and_width_of_their_kind():
    for shape, share in (("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)):
        (index,) = first_with(shape=shape, size="medium")
        mask = shape_mask(index, 2)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert mask.sum() / box == pytest.approx(share, abs=0.06), shape


def test_sizes_are_ordered_and_textures_differ():
    areas = [shape_mask(first_with(shape="circle", size=size)[0], 2).sum() for size in SIZES]
    assert areas[0] * 1.5 < areas[1]
    assert areas[1] * 1.5 < areas[2]
    spread = {}
    for texture in TEXTURES:
        (index,) = first_with(texture=texture, colour="white", size="large")
        video, _ = shapes_world.clip(index, frames=5, height=96, width=96)
        spread[texture] = video[2][shape_mask(index, 2)].std()
    assert spread["plain"] < 0.1 < min(spread["striped"], spread["checkered"])


def test_every_clip_moves_and_no_two_are_alike():
    videos = [shapes_world.clip(i, frames=5, height=32, width=48)[0] for i in range(20)]
    assert min(np.abs(np.diff(v, axis=0)).mean() for v in videos) > 0.005
    flat = np.stack(videos).reshape(20, -1)
    distances = np.abs(flat[:, None] - flat[None]).mean(-1) + np.eye(20)
    assert distances.min() > 0.01

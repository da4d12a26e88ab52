"""The procedural world: same clip for an index everywhere, and captions that tell the truth."""

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.data.shapes_world import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, STILL, TEXTURES, TONES


def shape_mask(index, frame, size=96):
    """Where the picture differs from the background."""
    video, _ = shapes_world.clip(index, frames=5, height=size, width=size)
    behind = shapes_world.background(shapes_world.scene(index), height=size, width=size)
    return np.abs((video[frame] + 1) / 2 - behind).max(-1) > 0.03


def first_with(count=1, **words):
    found = (i for i in range(20000) if all(getattr(shapes_world.scene(i), k) == v for k, v in words.items()))
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
    assert (
        shapes_world.caption(0) == "A large checkered red triangle moves quickly downwards across a mossy background."
    )
    assert (
        shapes_world.caption(5)
        == "The video shows a small muted pink triangle that moves quickly downwards; the background is mossy."
    )
    first, _ = shapes_world.clip(7, frames=5, height=32, width=32)
    again, _ = shapes_world.clip(7, frames=5, height=32, width=32)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(shapes_world.clip(7, frames=9, height=32, width=32)[0][::2], first)


def test_captions_vary_over_all_words():
    captions = [shapes_world.caption(i) for i in range(300)]
    assert len(set(captions)) > 250
    words = [*SHAPES, *COLOURS, *SIZES, *SPEEDS, *DIRECTIONS, *shapes_world.BACKGROUNDS, *TEXTURES, *TONES]
    unsaid = {STILL, "plain", "vivid"}
    for word in set(words) - unsaid:
        assert any(word in caption for caption in captions), word
    for word in unsaid:
        assert not any(word in caption for caption in captions), word


@pytest.mark.parametrize("phrasing", shapes_world.PHRASINGS)
def test_every_phrasing_says_everything_in_sound_english(phrasing):
    for direction in (STILL, "upwards"):
        (index,) = first_with(phrasing=phrasing, direction=direction, texture="striped", tone="muted", colour="orange")
        scene, caption = shapes_world.scene(index), shapes_world.caption(index)
        for word in ("striped muted orange", scene.shape, scene.size, scene.background):
            assert word in caption
        assert (f"moves {scene.speed} upwards" in caption) == (direction != STILL)
        assert ("stays still" in caption) == (direction == STILL)
        assert "still across" not in caption
        assert " a o" not in caption.lower()
        assert caption.endswith(".")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_moves_as_the_caption_says(direction, speed):
    (index,) = first_with(direction=direction, speed=speed, size="small", texture="plain", tone="vivid")
    (y0, x0), (y1, x1) = (np.argwhere(shape_mask(index, frame)).mean(0) for frame in (1, 3))
    expected = 96 * SPEEDS[speed] * np.asarray(DIRECTIONS[direction]) / 2  # half of the way
    np.testing.assert_allclose([y1 - y0, x1 - x0], expected, atol=1.5)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("tone", TONES)
def test_has_the_colour_it_is_said_to_have(colour, tone):
    (index,) = first_with(colour=colour, tone=tone, texture="plain")
    video, _ = shapes_world.clip(index, frames=5, height=96, width=96)
    shown = np.median(((video[2] + 1) / 2)[shape_mask(index, 2)], axis=0)
    mix = TONES[tone]
    np.testing.assert_allclose(shown, (1 - mix) * np.asarray(COLOURS[colour]) + mix * 0.5, atol=0.02)


def test_backgrounds_are_textured_but_softly():
    for index in range(20):
        behind = shapes_world.background(shapes_world.scene(index), height=64, width=64)
        assert 0.02 < behind.std((0, 1)).max() / behind.mean() < 0.3
        assert np.abs(np.diff(behind, axis=0)).max() < 0.05


def test_outlines_have_the_area_and_width_of_their_kind():
    for shape, share in (("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)):
        (index,) = first_with(shape=shape, size="medium", speed="slowly", texture="plain", background="dark")
        mask = shape_mask(index, 2)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert mask.sum() / box == pytest.approx(share, abs=0.06), shape


def test_sizes_are_ordered_and_textures_differ():
    whole = {"shape": "circle", "speed": "slowly", "texture": "plain", "background": "dark"}
    areas = [shape_mask(first_with(size=size, **whole)[0], 2).sum() for size in SIZES]
    assert areas[0] * 1.5 < areas[1]
    assert areas[1] * 1.5 < areas[2]
    spread = {}
    for texture in TEXTURES:
        (index,) = first_with(texture=texture, colour="white", size="large", tone="vivid")
        video, _ = shapes_world.clip(index, frames=5, height=96, width=96)
        spread[texture] = video[2][shape_mask(index, 2)].std()
    assert spread["plain"] < 0.2 < min(spread["striped"], spread["checkered"])


def test_no_two_clips_are_alike_and_only_still_ones_stand_still():
    videos = [shapes_world.clip(i, frames=5, height=32, width=48)[0] for i in range(30)]
    motion = [np.abs(np.diff(video, axis=0)).mean() for video in videos]
    for i, amount in enumerate(motion):
        assert amount == 0 if shapes_world.scene(i).direction == STILL else amount > 0.003
    flat = np.stack(videos).reshape(30, -1)
    distances = np.abs(flat[:, None] - flat[None]).mean(-1) + np.eye(30)
    assert distances.min() > 0.01

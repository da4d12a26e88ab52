"""The procedural world: same clip for an index everywhere, and captions that tell the truth."""

import dataclasses

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.data.shapes_world import ACTIONS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, TEXTURES, TONES, VERBS, Thing

PLAIN = Thing(
    shape="disc",
    colour="red",
    tone="vivid",
    texture="plain",
    size="medium",
    action="rest",
    direction="upwards",
    speed="slowly",
    verb="rests",
    offset=(0.0, 0.0),
    grey=0.0,
)


def scene_of(*things, pan="", background="dark", phrasing=0):
    waves = ((1.0, 2.0, 0.1), (-1.0, 0.5, 0.3), (2.0, -2.0, 0.7))
    return shapes_world.Scene(things, background, pan, shapes_world.PHRASINGS[phrasing], waves)


def draw(*things, size=96, frames=5, style="painted", **rest):
    return (shapes_world.draw(scene_of(*things, **rest), frames=frames, height=size, width=size, style=style) + 1) / 2


def mask_of(thing, frame, **size):
    """Where the picture differs from the one without the thing."""
    return np.abs(draw(thing, **size)[frame] - draw(**size)[frame]).max(-1) > 0.05


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
        shapes_world.caption(0)
        == "In this video a small striped purple bar glides quickly downwards; the background is sandy."
    )
    assert shapes_world.caption(12) == "A small striped orange disc moves slowly upwards. Everything behind is grey."
    first, _ = shapes_world.clip(7, frames=5, height=32, width=32)
    again, _ = shapes_world.clip(7, frames=5, height=32, width=32)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(shapes_world.clip(7, frames=9, height=32, width=32)[0][::2], first)


def test_captions_vary_over_all_words_and_numbers_of_objects():
    scenes = [shapes_world.scene(i) for i in range(600)]
    captions = [scene.caption for scene in scenes]
    assert len(set(captions)) > 550
    verbs = [verb for verbs in VERBS.values() for verb in verbs]
    for word in [*SHAPES, *COLOURS, *SIZES, *SPEEDS, *DIRECTIONS, *shapes_world.BACKGROUNDS, *TEXTURES, *TONES, *verbs]:
        said = word not in ("plain", "vivid")
        assert any(word in caption for caption in captions) == said, word
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert {thing.action for scene in scenes for thing in scene.things} == set(ACTIONS)
    assert {scene.pan for scene in scenes} == set(shapes_world.PANS)


def test_objects_of_a_scene_can_be_told_apart():
    for scene in map(shapes_world.scene, range(300)):
        colours = [thing.colour for thing in scene.things]
        assert len(set(colours)) == len(colours)
        for thing in scene.things[:2]:
            contrast = np.linalg.norm(thing.rgb - shapes_world.BACKGROUNDS[scene.background])
            assert contrast > shapes_world.CONTRAST
            assert not (thing.action == "turn" and thing.shape == "disc")


@pytest.mark.parametrize("phrasing", range(len(shapes_world.PHRASINGS)))
def test_every_phrasing_says_everything_in_sound_english(phrasing):
    moving = dataclasses.replace(PLAIN, action="move", verb="glides", texture="striped", tone="muted", size="small")
    caption = scene_of(moving, PLAIN, pan="left", phrasing=phrasing).caption
    assert "small striped muted red disc glides slowly upwards and a medium red disc rests" in caption
    assert "dark" in caption
    assert caption.endswith(". The camera pans to the left.")
    assert caption[0].isupper()
    assert "  " not in caption


def test_parse_caption_reads_what_a_scene_says():
    for scene in map(shapes_world.scene, range(300)):
        said = [
            (thing.shape, thing.colour, thing.direction if thing.action == "move" else "") for thing in scene.things
        ]
        named = shapes_world.parse_caption(scene.caption)
        assert [(thing.shape, thing.colour, thing.direction) for thing in named] == said
    assert shapes_world.parse_caption("A panda plays the guitar.") == ()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_moves_as_the_caption_says(direction, speed):
    thing = dataclasses.replace(PLAIN, action="move", direction=direction, speed=speed)
    (y0, x0), (y1, x1) = (np.argwhere(mask_of(thing, frame)).mean(0) for frame in (1, 3))
    expected = 96 * SPEEDS[speed] * np.asarray(DIRECTIONS[direction]) / 2  # half of the way
    np.testing.assert_allclose([y1 - y0, x1 - x0], expected, atol=1.0)


def test_grows_shrinks_turns_and_rests():
    area = {
        action: [mask_of(dataclasses.replace(PLAIN, action=action), frame).sum() for frame in (0, 4)]
        for action in ("grow", "shrink", "rest")
    }
    assert area["grow"][1] > 2.5 * area["grow"][0]
    assert area["shrink"][0] > 2.5 * area["shrink"][1]
    assert area["rest"][0] == area["rest"][1]
    bar = dataclasses.replace(PLAIN, shape="bar")
    turned = mask_of(dataclasses.replace(bar, action="turn"), 1)
    assert turned.sum() == pytest.approx(mask_of(bar, 1).sum(), rel=0.06)
    assert (turned != mask_of(bar, 1)).mean() > 0.02


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("grey", [0.0, 0.5])
def test_has_the_colour_it_is_said_to_have(colour, grey):
    thing = dataclasses.replace(PLAIN, colour=colour, grey=grey)
    shown = np.median(draw(thing)[2][mask_of(thing, 2)], axis=0)
    np.testing.assert_allclose(shown, (1 - grey) * np.asarray(COLOURS[colour]) + grey * 0.5, atol=0.01)


def test_the_first_thing_hides_the_others():
    front, behind = PLAIN, dataclasses.replace(PLAIN, colour="blue", size="large")
    video = draw(front, behind)
    np.testing.assert_allclose(video[0, 48, 48], COLOURS["red"], atol=0.01)
    np.testing.assert_allclose(video[0, 48, 48 + 24], COLOURS["blue"], atol=0.01)


def test_backgrounds_are_textured_but_softly_and_pan():
    still, panned = draw(), draw(pan="left")
    assert 0.02 < still[0].std((0, 1)).max() / still[0].mean() < 0.3
    assert np.abs(np.diff(still[0], axis=0)).max() < 0.05
    np.testing.assert_array_equal(still[0], still[4])
    # The camera pans to the left: what is behind moves to the right, by 0.3 of the width.
    np.testing.assert_allclose(panned[4, :, 29:], panned[0, :, :67], atol=0.01)


def test_outlines_have_the_area_and_width_of_their_kind():
    for shape, share in (("disc", np.pi / 4), ("bar", 1.0), ("cross", 7 / 16)):
        mask = mask_of(dataclasses.replace(PLAIN, shape=shape), 2)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert mask.sum() / box == pytest.approx(share, abs=0.06), shape


def test_sizes_are_ordered_and_textures_differ():
    areas = [mask_of(dataclasses.replace(PLAIN, size=size), 2).sum() for size in SIZES]
    assert areas[0] * 1.5 < areas[1]
    assert areas[1] * 1.5 < areas[2]
    inside = mask_of(dataclasses.replace(PLAIN, size="small"), 2)
    spread = {
        texture: draw(dataclasses.replace(PLAIN, size="large", texture=texture))[2][inside][:, 0].std()
        for texture in TEXTURES
    }
    assert spread["plain"] < 0.01
    assert min(spread["striped"], spread["spotted"]) > 0.08


def test_the_outline_style_draws_lines_in_other_colours_on_paper():
    video = draw(dataclasses.replace(PLAIN, size="large"), style="outline")
    np.testing.assert_allclose(video[0].max((0, 1)), shapes_world.PAPER, atol=0.12)
    ink = np.abs(video[0] - shapes_world.OUTLINE_COLOURS["red"]).max(-1) < 0.05
    assert 0.03 < ink.mean() < 0.15
    assert not ink[48, 48]  # hollow


def test_no_two_clips_are_alike_and_only_resting_ones_stand_still():
    videos = [shapes_world.clip(i, frames=5, height=32, width=48)[0] for i in range(30)]
    for i, video in enumerate(videos):
        scene = shapes_world.scene(i)
        moves = scene.pan or any(thing.action != "rest" for thing in scene.things)
        assert (np.abs(np.diff(video, axis=0)).max() > 0.01) == bool(moves)
    flat = np.stack(videos).reshape(30, -1)
    distances = np.abs(flat[:, None] - flat[None]).mean(-1) + np.eye(30)
    assert distances.min() > 0.01

"""The metrics that know the scene: right on real clips, and each falls on clips that are broken in just its way."""

import dataclasses

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.evaluation import scenes

COUNT = 60


@pytest.fixture(scope="module")
def clips():
    return [shapes_world.clip(i, frames=17, height=64, width=64) for i in range(9000, 9000 + COUNT)]


@pytest.fixture(scope="module")
def readings(clips):
    return [scenes.read(video) for video, _ in clips]


def mean_alignment(readings, captions):
    scores = [scenes.alignment(reading, caption) for reading, caption in zip(readings, captions, strict=True)]
    return {name: np.mean([score[name] for score in scores]) for name in scores[0]}


def test_real_clips_are_aligned_and_shuffled_captions_are_not(clips, readings):
    captions = [caption for _, caption in clips]
    real = mean_alignment(readings, captions)
    assert min(real.values()) >= 0.98
    shuffled = mean_alignment(readings, captions[1:] + captions[:1])
    assert max(shuffled.values()) < 0.5


def test_directions_are_lost_if_clips_are_frozen_and_turned_if_they_run_backwards(clips):
    moving = [i for i in range(COUNT) if all(t.direction for t in shapes_world.parse_caption(clips[i][1]))][:15]
    captions = [clips[i][1] for i in moving]
    for broken in (lambda video: np.repeat(video[8:9], 17, axis=0), lambda video: video[::-1]):
        scores = mean_alignment([scenes.read(broken(clips[i][0])) for i in moving], captions)
        assert scores["direction"] < 0.1
        assert scores["colour"] > 0.95


def test_shapes_are_lost_if_they_are_blown_up_to_boxes(clips):
    crosses = [i for i in range(COUNT) if {t.shape for t in shapes_world.parse_caption(clips[i][1])} == {"cross"}][:8]
    boxes = []
    for i in crosses:
        broken = clips[i][0].copy()
        for track in scenes.read(broken).tracks:
            for frame in np.flatnonzero(track.parts):
                places = np.argwhere(track.masks[frame])
                (top, left), (bottom, right) = places.min(0), places.max(0) + 1
                broken[frame, top:bottom, left:right] = np.median(broken[frame][track.masks[frame]], axis=0)
        boxes.append(scenes.read(broken))
    assert len(crosses) >= 4
    assert mean_alignment(boxes, [clips[i][1] for i in crosses])["shape"] < 0.4


def test_instances_are_preserved_in_real_clips(readings):
    assert np.mean([scenes.instance_preservation(reading) for reading in readings]) >= 0.98


def vanish(scene, video):
    empty = draw(dataclasses.replace(scene, things=()))
    return np.concatenate([video[:9], empty[9:13], video[13:]])


def teleport(scene, video):
    return np.stack([np.roll(frame, 32 * (i // 4 % 2), axis=1) for i, frame in enumerate(video)])


def merge(scene, video):
    return np.concatenate([video[:8], draw(dataclasses.replace(scene, things=scene.things[:1]))[8:]])


def split(scene, video):
    empty = draw(dataclasses.replace(scene, things=()))
    twin = np.roll(video, 32, axis=2)
    return np.concatenate([video[:8], np.where(np.abs(twin - np.roll(empty, 32, axis=2)) > 0.1, twin, video)[8:]])


def draw(scene):
    return shapes_world.draw(scene, frames=17, height=64, width=64)


@pytest.mark.parametrize("break_clip", [vanish, teleport, merge, split])
def test_instances_are_not_preserved_in_broken_clips(break_clip):
    scenes_of = {True: [], False: []}  # with several things, with one
    for scene in map(shapes_world.scene, range(9000, 9100)):
        if not scene.pan:
            scenes_of[len(scene.things) > 1].append(scene)
    scores = []
    for scene in scenes_of[break_clip is merge][:10]:
        video = draw(scene)
        scores.append(scenes.instance_preservation(scenes.read(break_clip(scene, video))))
    assert np.mean(scores) < 0.85


def test_an_object_that_appears_for_a_while_is_not_preserved():
    scene = shapes_world.scene(9000)
    whole = shapes_world.draw(scene, frames=17, height=64, width=64)
    broken = whole.copy()
    rows = slice(2, 12) if np.abs(scene.things[0].offset[0]) < 0.2 else slice(30, 40)
    broken[4:8, rows, 2:12] = 2 * np.asarray(shapes_world.COLOURS["purple"]) - 1
    assert scenes.instance_preservation(scenes.read(broken)) <= 13 / 17
    assert scenes.instance_preservation(scenes.read(whole)) == 1.0


def test_noise_holds_no_instances():
    noise = np.random.default_rng(0).uniform(-1, 1, (17, 64, 64, 3))
    assert scenes.instance_preservation(scenes.read(noise)) == 0.0


def test_dynamic_degree_tells_moving_clips_from_resting_and_frozen_ones(clips):
    moves = [any(thing.action != "rest" for thing in shapes_world.scene(9000 + i).things) for i in range(COUNT)]
    degrees = [scenes.dynamic_degree(video) for video, _ in clips]
    assert np.mean(np.asarray(degrees) == moves) >= 0.98
    assert 0.7 < np.mean(moves) < 1
    assert all(scenes.dynamic_degree(np.repeat(video[:1], 17, axis=0)) == 0 for video, _ in clips[:10])


def test_a_caption_of_another_world_is_refused(readings):
    with pytest.raises(ValueError, match="panda"):
        scenes.alignment(readings[0], "A panda plays the guitar.")

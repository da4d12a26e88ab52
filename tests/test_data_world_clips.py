"""Which clips of the built-in world are for what: the numbers, the clips and prompts of training, and its limit."""

import numpy as np
import pytest

from avd_jax.data import shapes_world, world_clips
from avd_jax.data.world_clips import training_clips, training_prompts
from avd_jax.errors import UserError

SIZE = {"frames": 5, "height": 16, "width": 32}


def test_the_numbers_are_fixed_and_named_in_the_table():
    # What was trained and measured before depends on them.
    names = ("TRAINING_CLIP", "HELD_OUT_CLIP", "VAE_CLIP", "TEXT_ENCODER_CAPTION")
    first = {name: getattr(world_clips, f"FIRST_{name}") for name in names}
    assert list(first.values()) == [0, 500_000, 1_000_000, 2_000_000]
    for name, number in first.items():
        assert any(
            line.startswith(f"| {number:,} ") and line.endswith(f"FIRST_{name} |")
            for line in world_clips.__doc__.splitlines()
        )
    statistics = first["VAE_CLIP"] - world_clips.VAE_STATISTICS_CLIPS
    assert f"| {statistics:,} to {first['VAE_CLIP'] - 1:,} |" in world_clips.__doc__


def test_training_clips_are_the_first_ones_and_drawn_when_read():
    clips = training_clips(3, **SIZE)
    assert [clip.clip_id for clip in clips] == ["shapes_world@000000", "shapes_world@000001", "shapes_world@000002"]
    assert {clip.source for clip in clips} == {"shapes_world"}
    assert [clip.caption for clip in clips] == [shapes_world.caption(i) for i in range(3)]
    np.testing.assert_array_equal(clips[2].read(), shapes_world.clip(2, **SIZE)[0])
    outline = training_clips(3, **SIZE, style="outline")
    assert [clip.clip_id for clip in outline] == [f"shapes_world_outline@00000{i}" for i in range(3)]
    assert [clip.caption for clip in outline] == [clip.caption for clip in clips]
    np.testing.assert_array_equal(outline[2].read(), shapes_world.clip(2, **SIZE, style="outline")[0])


def test_prompts_are_the_captions_behind_the_clips_each_once():
    assert training_prompts(0, clips=5) == []
    assert training_prompts(7, clips=5) == [shapes_world.caption(i) for i in range(5, 12)]
    assert shapes_world.caption(201) == shapes_world.caption(870)
    captions = [shapes_world.caption(i) for i in range(200, 900)]
    found = training_prompts(700, clips=200)
    assert len(found) == len(set(captions)) < 700
    assert found == sorted(found, key=captions.index)


def test_training_does_not_reach_into_what_is_held_out():
    assert len(training_prompts(2, clips=499_998)) == 2
    for ask in (lambda: training_prompts(3, clips=499_998), lambda: training_clips(500_001, **SIZE)):
        with pytest.raises(UserError, match=r"500001 clips and prompts .* too many: from 500000 on they are held out"):
            ask()

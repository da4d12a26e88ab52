"""Videos of several folders matched: by prompt and seed, by file name, by prompt."""

import json

import pytest

from avd_jax.data.prompts import file_stem
from avd_jax.errors import UserError
from avd_jax.experiments.video_sets import Shown, matched, read_set


def put(folder, name, **record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.mp4").write_bytes(b"")
    if record:
        (folder / f"{name}.json").write_text(json.dumps(record))


def pairs(rows):
    return [{name: video.name for name, video in row.videos.items()} for row in rows]


def test_prompt_and_seed_decide_where_both_are_known(tmp_path):
    put(tmp_path / "a", "x-1", prompt="a dog", seed=0)
    put(tmp_path / "a", "x-2", prompt="a dog", seed=1)
    put(tmp_path / "b", "x-1", prompt="a dog", seed=1)
    put(tmp_path / "b", "y", prompt="a cat", seed=0)
    rows = matched({name: read_set(tmp_path / name) for name in "ab"})
    assert pairs(rows) == [{"a": "x-1"}, {"a": "x-2", "b": "x-1"}, {"b": "y"}]
    assert [(row.text, row.seed) for row in rows] == [("a dog", 0), ("a dog", 1), ("a cat", 0)]


def test_file_names_and_then_prompts_decide_for_videos_of_others(tmp_path):
    put(tmp_path / "a", "a dog runs-0", prompt="a dog runs", seed=4)
    put(tmp_path / "a", "other", prompt="a cat", seed=1)
    put(tmp_path / "b", "a dog runs-0")
    put(tmp_path / "b", "one more", prompt="a cat")
    rows = matched({name: read_set(tmp_path / name) for name in "ab"})
    assert pairs(rows) == [{"a": "a dog runs-0", "b": "a dog runs-0"}, {"a": "other", "b": "one more"}]


def test_a_row_is_told_by_the_same_whatever_the_order_of_the_folders():
    sets = {"a": [Shown("a.mp4", "n", "a dog", 3)], "b": [Shown("b.mp4", "m", "a dog", 3)]}
    keys = {row.key for order in (sets, dict(reversed(sets.items()))) for row in matched(order)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (file_stem("A red square glides", 3) + "-0123abcd", "A red square glides"),
        ("2_" + file_stem("A red square"), "A red square"),
        ("In a still frame, a stop sign-4", "In a still frame, a stop sign"),
        ("clip_004", "clip_004"),
        ("folder/clip", "clip"),
        ("x-y-1a", "x-y-1a"),
    ],
)
def test_a_name_tells_the_prompt_if_nobody_else_does(name, text):
    assert Shown("x.mp4", name).text == text


def test_a_folder_of_several_methods_is_refused(tmp_path):
    put(tmp_path / "a", "x-1", prompt="a dog", seed=0)
    put(tmp_path / "a", "x-2", prompt="a dog", seed=0)
    with pytest.raises(UserError, match=r"x-1.mp4 and x-2.mp4 have the same prompt and seed"):
        read_set(tmp_path / "a")

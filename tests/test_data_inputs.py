"""Captions and clips from a user's files, and the line that is wrong."""

import json
import re

import numpy as np
import pytest

from avd_jax.data import inputs
from avd_jax.data.video import write_video
from avd_jax.errors import UserError

SIZE = {"frames": 5, "fps": 10.0, "height": 16, "width": 16}


def captions_file(tmp_path, *lines):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "--frames 0 is not 4n+1; try 1."),
        ({"frames": 16}, "--frames 16 is not 4n+1; try 17."),
        ({"height": 100}, "--height 100 is not a multiple of 16; try 96."),
        ({"width": 8}, "--width 8 is not a multiple of 16; try 16."),
    ],
)
def test_a_size_that_the_networks_cannot_take_is_named(changes, message):
    size = {"frames": 5, "height": 16, "width": 32}
    inputs.check_clip_size(**size)
    with pytest.raises(UserError, match=re.escape(message)):
        inputs.check_clip_size(**{**size, **changes}, prefix="--")


def test_captions_in_order(tmp_path):
    path = captions_file(
        tmp_path,
        {"file": "b.mp4", "caption": " a “dog”\u2028 runs "},
        "",
        {"file": "./sub//a.mp4", "caption": "x", "more": 1},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(inputs.read_captions(path).items()) == [("b.mp4", "a “dog”\u2028 runs"), ("sub/a.mp4", "x")]


GOOD = {"file": "a.mp4", "caption": "x"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"captions\.jsonl:2: is not a JSON object"),
        ('["a.mp4", "x"]', r"captions\.jsonl:2: is not a JSON object"),
        ({"flie": "a.mp4", "caption": "x"}, r"jsonl:2: has no 'file' \(did you mean 'flie'\?\)"),
        ({"file": "b.mp4"}, r"jsonl:2: has no 'caption'"),
        ({"file": "b.mp4", "caption": 3}, r"jsonl:2: 'caption' is not a text"),
        ({"file": "b.mp4", "caption": "  "}, r"jsonl:2: 'caption' is not a text, or is empty"),
        ({"file": "./a.mp4", "caption": "y"}, r"jsonl:2: \./a\.mp4 has a caption already"),
    ],
)
def test_bad_lines_are_numbered(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        inputs.read_captions(captions_file(tmp_path, GOOD, bad))


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="none: cannot be read"):
        inputs.read_captions(tmp_path / "none")
    with pytest.raises(UserError, match="holds no captions"):
        inputs.read_captions(captions_file(tmp_path, "", ""))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: is not UTF-8"):
        inputs.read_captions(tmp_path / "latin.txt")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "videos"
    levels = np.linspace(-0.9, 0.9, 23)
    write_video(folder / "a.mp4", np.broadcast_to(levels[:, None, None, None], (23, 16, 16, 3)), fps=10, quality=10)
    write_video(folder / "sub" / "b.MP4", np.zeros((3, 16, 16, 3)), fps=10)
    write_video(folder / "c.mp4", np.zeros((5, 16, 16, 3)), fps=10)
    (folder / "notes.txt").write_text("not a video")
    return folder


def test_clips_in_the_order_of_the_captions(folder):
    captions = {"c.mp4": "C", "gone.mp4": "G", "a.mp4": "A"}
    clips, uncaptioned = inputs.clips_from_folder(folder, captions, **SIZE)
    assert [(c.clip_id, c.caption, c.source) for c in clips] == [
        ("c.mp4@0.000", "C", "c.mp4"),
        ("gone.mp4@0.000", "G", "gone.mp4"),
        ("a.mp4@0.000", "A", "a.mp4"),
    ]
    assert uncaptioned == ["sub/b.MP4"]
    assert clips[0].read().shape == (5, 16, 16, 3)
    with pytest.raises(UserError, match=r"gone\.mp4: cannot be read as a video"):
        clips[1].read()
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        inputs.clips_from_folder(folder / "nowhere", captions, **SIZE)


@pytest.mark.parametrize(("most", "starts"), [(1, [0.0]), (2, [0.0, 1.8]), (4, [0.0, 0.6, 1.2, 1.8]), (9, None)])
def test_several_clips_of_a_video_do_not_overlap(folder, most, starts):
    captions = {"a.mp4": "A", "sub/b.MP4": "B", "gone.mp4": "G"}
    clips, _ = inputs.clips_from_folder(folder, captions, **SIZE, clips_per_video=most)
    of_a = [clip for clip in clips if clip.source == "a.mp4"]
    # 2.3 s hold four clips of 0.5 s.
    starts = starts or [0.0, 0.6, 1.2, 1.8]
    assert [clip.clip_id for clip in of_a] == [f"a.mp4@{start:.3f}" for start in starts]
    levels = np.concatenate([clip.read().mean((1, 2, 3)) for clip in of_a])
    assert (np.diff(levels) > 0.02).all(), "each frame appears once, in order"
    assert [clip.clip_id for clip in clips if clip not in of_a] == ["sub/b.MP4@0.000", "gone.mp4@0.000"]

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
        ("{", r"captions\.jsonl:2: is not JSON"),
        ('["a.mp4", "x"]', r"captions\.jsonl:2: is not a JSON object"),
        ({"flie": "a.mp4", "caption": "x"}, r"jsonl:2: has no 'file' \(did you mean 'flie'\?\)"),
        ({"file": "b.mp4"}, r"jsonl:2: has no 'caption'"),
        ({"file": "b.mp4", "caption": 3}, r"jsonl:2: 'caption' is not a text"),
        ({"file": "b.mp4", "caption": "  "}, r"jsonl:2: 'caption' is not a text, or is empty"),
        ({"file": "./a.mp4", "caption": "y"}, r"jsonl:2: \./a\.mp4 has a caption already, in .*jsonl:1"),
        ({"file": "b.mp4", "caption": "an emoji \ud83d"}, r"jsonl:2: the caption is no UTF-8 \(.ud83d is half a"),
        ({"file": "\udce9.mp4", "caption": "x"}, r"jsonl:2: the name is no UTF-8 \(.udce9 is half a"),
        ({"file": "gs://bucket/b.mp4", "caption": "x"}, r"jsonl:2: gs://bucket/b\.mp4: gs:// is not supported"),
        ({"file": "b.mp4", "cap": ["x", "y"]}, r"jsonl:2: 'cap' is not a text"),
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
    (tmp_path / "prose.txt").write_text("a.mp4 shows a cat")
    with pytest.raises(UserError, match="is no list of captions"):
        inputs.read_captions(tmp_path / "prose.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: is not UTF-8"):
        inputs.read_captions(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "A"}\n{"file_name": "b.mp4", "text": "B"}'),
        ("data.jsonl", '{"video_path": "a.mp4", "caption": "A"}\n{"video_path": "b.mp4", "caption": "B"}'),
        ("videos2caption.json", '[{"path": "a.mp4", "cap": ["A"]},\n {"path": "b.mp4", "cap": "B"}]'),
        ("metadata.csv", "video,prompt\na.mp4,A\nb.mp4,B\n"),
        ("OpenVid.csv", 'Video,Caption,fps\na.mp4,"A",24\nb.mp4,B,\n'),
        ("list.tsv", "file_name\ttext\na.mp4\tA\nb.mp4\tB\n"),
    ],
)
def test_layouts_of_others(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert inputs.read_captions(tmp_path / name) == {"a.mp4": "A", "b.mp4": "B"}


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


COMPOSED, APART = "m\u00fcller.mp4", "mu\u0308ller.mp4"


@pytest.mark.parametrize(("written", "on_disk"), [(COMPOSED, APART), (APART, COMPOSED), (COMPOSED, COMPOSED)])
def test_names_match_however_they_are_composed(folder, tmp_path, written, on_disk):
    (folder / "sub" / on_disk).write_bytes((folder / "a.mp4").read_bytes())
    captions = inputs.read_captions(captions_file(tmp_path, {"file": f"sub/{written}", "caption": "x"}), folder)
    clips, uncaptioned = inputs.clips_from_folder(folder, captions, **SIZE)
    assert [clip.source for clip in clips] == [f"sub/{on_disk}"]
    assert clips[0].read().shape == (5, 16, 16, 3)
    assert uncaptioned == ["a.mp4", "c.mp4", "sub/b.MP4"]


def test_names_of_every_kind_are_those_in_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "link").symlink_to(folder)
    for written in (r"sub\b.MP4", folder / "sub" / "b.MP4", f"file://{folder}/sub/b.MP4", "~/sub/b.MP4", "./sub/b.MP4"):
        path = captions_file(tmp_path, {"file": str(written), "caption": "x"})
        assert inputs.read_captions(path, folder) == {"sub/b.MP4": "x"}
        assert inputs.read_captions(path, tmp_path / "link") == {"sub/b.MP4": "x"}
    path = captions_file(tmp_path, {"file": "../videos/a.mp4", "caption": "x"})
    assert inputs.read_captions(path, folder) == {"a.mp4": "x"}
    other = tmp_path / "elsewhere.mp4"
    path = captions_file(tmp_path, {"file": str(other), "caption": "x"})
    assert inputs.read_captions(path, folder) == {str(other): "x"}


def test_an_absolute_name_alone_has_a_caption(folder, tmp_path):
    path = captions_file(tmp_path, {"file": str(folder / "a.mp4"), "caption": "x"})
    clips, uncaptioned = inputs.clips_from_folder(folder, inputs.read_captions(path, folder), **SIZE)
    assert [clip.clip_id for clip in clips] == ["a.mp4@0.000"]
    assert uncaptioned == ["c.mp4", "sub/b.MP4"]


def test_two_names_of_one_video_are_refused_with_both_lines(folder, tmp_path):
    (folder / APART).write_bytes(b"")
    for first, second in (
        (folder / "a.mp4", "./a.mp4"),
        ("a.mp4", folder / "a.mp4"),
        (r"sub\b.MP4", "sub/b.MP4"),
        (COMPOSED, APART),
    ):
        path = captions_file(tmp_path, *({"file": str(name), "caption": "x"} for name in (first, second)))
        with pytest.raises(UserError, match=r"jsonl:2: .* has a caption already, in .*jsonl:1"):
            inputs.read_captions(path, folder)


def test_text_files_beside_the_videos(folder):
    with pytest.raises(UserError, match="videos: no video has a caption; give --captions"):
        inputs.read_captions(None, folder)
    (folder / "a.txt").write_text(" a grey square\n", encoding="utf-8-sig")
    (folder / "c.txt").write_text("\n")
    (folder / "sub" / "b.txt").write_text("two\nlines")
    (folder / COMPOSED).write_bytes(b"")
    (folder / APART).with_suffix(".TXT").write_text("a name")
    captions = inputs.read_captions(None, folder)
    assert captions == {"a.mp4": "a grey square", COMPOSED: "a name", "sub/b.MP4": "two\nlines"}
    assert inputs.clips_from_folder(folder, captions, **SIZE)[1] == ["c.mp4"]
    with pytest.raises(UserError, match="none: is not a folder"):
        inputs.read_captions(None, folder / "none")


def test_a_name_on_disk_that_is_no_text(folder):
    name = "caf\udce9.mp4"  # as Python gives the bytes of Latin-1
    (folder / name).write_bytes(b"")
    assert inputs.clips_from_folder(folder, {"a.mp4": "A"}, **SIZE)[1] == ["c.mp4", r"caf\udce9.mp4", "sub/b.MP4"]
    (folder / name).with_suffix(".txt").write_text("x")
    with pytest.raises(UserError, match=r"caf.udce9\.mp4: its name is no UTF-8"):
        inputs.read_captions(None, folder)

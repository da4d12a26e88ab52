"""Captions and clips from a user's files, and the line that is wrong."""

import json
import re

import numpy as np
import pytest

from avd_jax.data import captions as lists
from avd_jax.data import inputs
from avd_jax.data.captions import Row
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
    assert read(path) == [("b.mp4", "a “dog”\u2028 runs"), ("sub/a.mp4", "x")]


def read(path, folder=None):
    return [(row.name, row.caption) for row in lists.read_captions(path, folder)]


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
        lists.read_captions(captions_file(tmp_path, GOOD, bad))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"start": -1}, "captions.jsonl:2: 'start' is -1; write seconds after the beginning of the video, as 12.5."),
        ({"start": float("nan")}, "captions.jsonl:2: 'start' is nan; write seconds"),
        ({"start": float("inf")}, "captions.jsonl:2: 'start' is inf; write seconds"),
        ({"start": "0:01"}, "captions.jsonl:2: 'start' is '0:01'; write seconds"),
        ({"start": True}, "captions.jsonl:2: 'start' is True; write seconds"),
        ({"start": 10**400}, "captions.jsonl:2: 'start' is 1000"),
        ({"end": [3]}, "captions.jsonl:2: 'end' is [3]; write seconds"),
        ({"start": 2, "end": 2.0}, "captions.jsonl:2: 'end' is 2 s, not after the start, 2 s."),
        ({"end": 0}, "captions.jsonl:2: 'end' is 0 s, not after the start, 0 s."),
        ({"duration_span": [1.5]}, "captions.jsonl:2: 'duration_span' is not [start, end] in seconds."),
        ({"duration_span": "1.5 to 2"}, "captions.jsonl:2: 'duration_span' is not [start, end] in seconds."),
        ({"scores": [1]}, "captions.jsonl:2: 'scores' is not an object of names and numbers."),
        ({"scores": {"motion": "fast"}}, "captions.jsonl:2: the score 'motion' is 'fast', not a number."),
        ({"scores": {"motion": float("nan")}}, "captions.jsonl:2: the score 'motion' is nan, not a number."),
        ({"scores": {"motion": {"value": float("nan")}}}, "captions.jsonl:2: the score 'motion' is nan, not a number."),
        ({"file": "a.mp4", "start": 0}, "captions.jsonl:2: a.mp4 at 0 s has a caption already, in "),
    ],
)
def test_a_bad_start_end_or_score_is_named_with_its_line(tmp_path, more, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        lists.read_captions(captions_file(tmp_path, GOOD, {"file": "b.mp4", "caption": "x", **more}))
    assert "\n" not in str(error.value)


def test_starts_ends_and_scores(tmp_path):
    scores = {"motion": {"value": 0.5, "method": "dis"}, "hash": {"value": ["00"]}, "gone": None, "colour": 1}
    path = captions_file(
        tmp_path,
        {"file": "a.mp4", "caption": "x", "start": 1.5, "end": 3, "scores": scores},
        {"file": "a.mp4", "caption": "x", "start": 3},
        {"file": "a.mp4", "caption": "x", "duration_span": [4.5, 6.0]},
        {"file": "b.mp4", "caption": "x", "start": None, "end": None},
    )
    rows = lists.read_captions(path)
    assert [(row.start, row.end) for row in rows] == [(1.5, 3.0), (3.0, None), (4.5, 6.0), (None, None)]
    assert [row.scores for row in rows] == [{"motion": 0.5, "colour": 1.0}, {}, {}, {}]
    assert rows[1].where == f"{path}:2"
    table = tmp_path / "clips.csv"
    table.write_text('video,caption,Start,end,scores\na.mp4,x, 1.5,3,"{""motion"": 0.25}"\nb.mp4,y,,,\n')
    rows = lists.read_captions(table)
    assert [(row.start, row.end, row.scores) for row in rows] == [(1.5, 3.0, {"motion": 0.25}), (None, None, {})]


def test_without_a_folder_names_are_relative_to_the_list(folder, tmp_path):
    (tmp_path / "curated").mkdir()
    path = captions_file(tmp_path / "curated", {"file": "../videos/sub/b.MP4", "caption": "x"})
    assert read(path) == [("../videos/sub/b.MP4", "x")]
    clips, _ = inputs.clips_of(lists.read_captions(path), path.parent, **{**SIZE, "frames": 1})
    assert clips[0].read().shape == (1, 16, 16, 3)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="none: cannot be read"):
        lists.read_captions(tmp_path / "none")
    with pytest.raises(UserError, match="holds no captions"):
        lists.read_captions(captions_file(tmp_path, "", ""))
    (tmp_path / "prose.txt").write_text("a.mp4 shows a cat")
    with pytest.raises(UserError, match="is no list of captions"):
        lists.read_captions(tmp_path / "prose.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: is not UTF-8"):
        lists.read_captions(tmp_path / "latin.txt")


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
    assert read(tmp_path / name) == [("a.mp4", "A"), ("b.mp4", "B")]


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
    rows = [Row("c.mp4", "C"), Row("gone.mp4", "G"), Row("a.mp4", "A", scores={"motion": 0.5})]
    clips, left_out = inputs.clips_of(rows, folder, **SIZE)
    assert [(c.clip_id, c.caption, c.source) for c in clips] == [
        ("c.mp4@0.000", "C", "c.mp4"),
        ("gone.mp4@0.000", "G", "gone.mp4"),
        ("a.mp4@0.000", "A", "a.mp4"),
    ]
    assert [c.scores for c in clips] == [{}, {}, {"motion": 0.5}]
    assert left_out == []
    assert lists.without_caption(folder, rows) == ["sub/b.MP4"]
    assert clips[0].read().shape == (5, 16, 16, 3)
    with pytest.raises(UserError, match=r"gone\.mp4: cannot be read as a video"):
        clips[1].read()
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        inputs.clips_of(rows, folder / "nowhere", **SIZE)


@pytest.mark.parametrize(("most", "starts"), [(1, [0.0]), (2, [0.0, 1.8]), (4, [0.0, 0.6, 1.2, 1.8]), (9, None)])
def test_several_clips_of_a_video_do_not_overlap(folder, most, starts):
    rows = [Row("a.mp4", "A"), Row("sub/b.MP4", "B"), Row("gone.mp4", "G")]
    clips, _ = inputs.clips_of(rows, folder, **SIZE, clips_per_video=most)
    of_a = [clip for clip in clips if clip.source == "a.mp4"]
    # 2.3 s hold four clips of 0.5 s.
    starts = starts or [0.0, 0.6, 1.2, 1.8]
    assert [clip.clip_id for clip in of_a] == [f"a.mp4@{start:.3f}" for start in starts]
    levels = np.concatenate([clip.read().mean((1, 2, 3)) for clip in of_a])
    assert (np.diff(levels) > 0.02).all(), "each frame appears once, in order"
    assert [clip.clip_id for clip in clips if clip not in of_a] == ["sub/b.MP4@0.000", "gone.mp4@0.000"]


def test_a_row_with_a_start_is_one_clip_and_keeps_off_what_lies_beyond_its_end(folder):
    rows = [
        Row("a.mp4", "A", start=0.6, end=1.1),
        Row("a.mp4", "B", start=1.1, where="list:2"),
        Row("a.mp4", "C", end=0.499, scores={"motion": 1.0}),
        Row("a.mp4", "D", start=1.0, end=1.4, where="list:4"),
    ]
    clips, left_out = inputs.clips_of(rows, folder, **SIZE)
    assert [(clip.clip_id, clip.caption) for clip in clips] == [
        ("a.mp4@0.600", "A"),
        ("a.mp4@1.100", "B"),
        ("a.mp4@0.000", "C"),
    ]
    assert left_out == ["a.mp4@1.000: a clip of 5 frames at 10 fps reaches beyond its end, 1.4 s (list:4)."]
    levels = np.linspace(-0.9, 0.9, 23)
    np.testing.assert_allclose(clips[0].read().mean((1, 2, 3)), levels[6:11], atol=0.02)
    np.testing.assert_allclose(clips[1].read().mean((1, 2, 3)), levels[11:16], atol=0.02)
    with pytest.raises(UserError, match="list:2: says where its clip lies, so it is one clip; leave out --clips_per"):
        inputs.clips_of(rows[1:], folder, **SIZE, clips_per_video=2)


@pytest.mark.parametrize("shift", [-0.0005, 0.0, 0.0005])
def test_no_frame_across_a_cut_however_slow_the_video_is(tmp_path, shift):
    """At 4 frames a second the frame nearest to the clip's last instant is the first of the next scene."""
    black_white_black = np.repeat([-1.0, 1.0, -1.0], 4)[:, None, None, None]
    write_video(tmp_path / "a.mp4", np.broadcast_to(black_white_black, (12, 16, 16, 3)), fps=4)
    row = Row("a.mp4", "A", start=1.0 + shift, end=2.0 + shift)
    (clip,), _ = inputs.clips_of([row], tmp_path, frames=17, fps=17.0, height=16, width=16)
    assert clip.read().min() > 0.9


def test_each_video_goes_to_the_size_of_the_nearest_aspect_ratio(tmp_path):
    sizes = inputs.read_sizes("480x832, 832X480,480x480", frames=81)
    assert sizes == [(480, 832), (832, 480), (480, 480)]
    for name, size in (("wide", (16, 48)), ("tall", (48, 16)), ("square", (32, 32)), ("5to4", (32, 40))):
        write_video(tmp_path / f"{name}.mp4", np.zeros((1, *size, 3)), fps=8)
    names = ["gone.mp4", "wide.mp4", "tall.mp4", "square.mp4", "5to4.mp4", "wide.mp4"]
    found = inputs.by_size([Row(name, str(i)) for i, name in enumerate(names)], tmp_path, sizes)
    assert {size: [row.caption for row in rows] for size, rows in found.items()} == {
        (480, 832): ["0", "1", "5"],
        (832, 480): ["2"],
        (480, 480): ["3", "4"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("480", "--sizes '480': write HEIGHTxWIDTH with commas between, as 480x832,832x480."),
        ("480x832,", "--sizes '': write HEIGHTxWIDTH"),
        ("480x-16", "--sizes '480x-16': write HEIGHTxWIDTH"),
        ("480x830", "--sizes width 830 is not a multiple of 16; try 816."),
        ("240x416,480x832", "--sizes 480x832 has the aspect ratio of 240x416; give one of the two."),
    ],
)
def test_sizes_that_are_none(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        inputs.read_sizes(text, frames=81)


COMPOSED, APART = "m\u00fcller.mp4", "mu\u0308ller.mp4"


@pytest.mark.parametrize(("written", "on_disk"), [(COMPOSED, APART), (APART, COMPOSED), (COMPOSED, COMPOSED)])
def test_names_match_however_they_are_composed(folder, tmp_path, written, on_disk):
    (folder / "sub" / on_disk).write_bytes((folder / "a.mp4").read_bytes())
    rows = lists.read_captions(captions_file(tmp_path, {"file": f"sub/{written}", "caption": "x"}), folder)
    clips, _ = inputs.clips_of(rows, folder, **SIZE)
    assert [clip.source for clip in clips] == [f"sub/{on_disk}"]
    assert clips[0].read().shape == (5, 16, 16, 3)
    assert lists.without_caption(folder, rows) == ["a.mp4", "c.mp4", "sub/b.MP4"]


def test_names_of_every_kind_are_those_in_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "link").symlink_to(folder)
    for written in (r"sub\b.MP4", folder / "sub" / "b.MP4", f"file://{folder}/sub/b.MP4", "~/sub/b.MP4", "./sub/b.MP4"):
        path = captions_file(tmp_path, {"file": str(written), "caption": "x"})
        assert read(path, folder) == [("sub/b.MP4", "x")]
        assert read(path, tmp_path / "link") == [("sub/b.MP4", "x")]
    path = captions_file(tmp_path, {"file": "../videos/a.mp4", "caption": "x"})
    assert read(path, folder) == [("a.mp4", "x")]
    other = tmp_path / "elsewhere.mp4"
    path = captions_file(tmp_path, {"file": str(other), "caption": "x"})
    assert read(path, folder) == [(str(other), "x")]


def test_an_absolute_name_alone_has_a_caption(folder, tmp_path):
    path = captions_file(tmp_path, {"file": str(folder / "a.mp4"), "caption": "x"})
    rows = lists.read_captions(path, folder)
    clips, _ = inputs.clips_of(rows, folder, **SIZE)
    assert [clip.clip_id for clip in clips] == ["a.mp4@0.000"]
    assert lists.without_caption(folder, rows) == ["c.mp4", "sub/b.MP4"]


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
            lists.read_captions(path, folder)


def test_text_files_beside_the_videos(folder):
    with pytest.raises(UserError, match="videos: no video has a caption; give --captions"):
        lists.read_captions(None, folder)
    (folder / "a.txt").write_text(" a grey square\n", encoding="utf-8-sig")
    (folder / "c.txt").write_text("\n")
    (folder / "sub" / "b.txt").write_text("two\nlines")
    (folder / COMPOSED).write_bytes(b"")
    (folder / APART).with_suffix(".TXT").write_text("a name")
    assert read(None, folder) == [("a.mp4", "a grey square"), (COMPOSED, "a name"), ("sub/b.MP4", "two\nlines")]
    assert lists.without_caption(folder, lists.read_captions(None, folder)) == ["c.mp4"]
    with pytest.raises(UserError, match="none: is not a folder"):
        lists.read_captions(None, folder / "none")


def test_a_name_on_disk_that_is_no_text(folder):
    name = "caf\udce9.mp4"  # as Python gives the bytes of Latin-1
    (folder / name).write_bytes(b"")
    assert lists.without_caption(folder, [Row("a.mp4", "A")]) == ["c.mp4", r"caf\udce9.mp4", "sub/b.MP4"]
    (folder / name).with_suffix(".txt").write_text("x")
    with pytest.raises(UserError, match=r"caf.udce9\.mp4: its name is no UTF-8"):
        lists.read_captions(None, folder)

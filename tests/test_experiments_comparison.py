"""Videos in folders: their captions, their metrics, the page; the style that a set of videos has."""

import json
import math

import numpy as np
import pytest

from avd_jax.data import shapes_world
from avd_jax.data.video import read_whole_video, write_video
from avd_jax.data.world_clips import FIRST_HELD_OUT_CLIP, WORLD_SIZE
from avd_jax.errors import UserError
from avd_jax.evaluation.style import style_features, style_position
from avd_jax.experiments.comparison import compare
from avd_jax.experiments.curves import training_charts
from avd_jax.experiments.held_out import captions, drawn_videos
from avd_jax.experiments.videos import measure_videos, videos_in

SIZE = {"frames": 17, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return drawn_videos(6, tmp_path_factory.mktemp("real"), **WORLD_SIZE)


def test_a_video_is_read_as_it_was_written(tmp_path):
    video, _ = shapes_world.clip(3, **SIZE)
    write_video(tmp_path / "a.mp4", video, fps=12.0)
    read, fps = read_whole_video(tmp_path / "a.mp4")
    assert (read.shape, fps) == (video.shape, 12.0)
    assert np.abs(read - video).mean() < 0.05
    assert np.abs(read).max() <= 1


def test_held_out_captions_are_those_of_the_drawn_videos(drawn):
    assert [video.caption for video in drawn] == captions(6)
    assert captions(1) == [shapes_world.caption(FIRST_HELD_OUT_CLIP)]
    pixels, _ = read_whole_video(drawn[0].file)
    assert np.abs(pixels - shapes_world.clip(FIRST_HELD_OUT_CLIP, **SIZE)[0]).mean() < 0.05


def test_drawn_videos_have_good_metrics_through_their_files(drawn):
    rows = measure_videos(drawn)
    for name in ("alignment", "instance_preservation"):
        assert np.mean([row[name] for row in rows]) > 0.95


def test_captions_come_from_the_json_beside_or_from_a_list(tmp_path):
    video, text = shapes_world.clip(0, **SIZE)
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", video, fps=16.0)
    (tmp_path / "a.json").write_text(json.dumps({"prompt": text}))
    assert [found.caption for found in videos_in(tmp_path)] == [text, ""]
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"file": "b.mp4", "caption": "listed"}))
    assert [found.caption for found in videos_in(tmp_path, listed)] == ["", "listed"]
    listed.rename(tmp_path / "captions.jsonl")
    assert [found.caption for found in videos_in(tmp_path)] == ["", "listed"]
    rows = measure_videos(videos_in(tmp_path))
    assert "alignment" not in rows[0]
    assert "saturation" in rows[0]


def test_what_is_no_utf8_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.json").write_text('{"prompt": "half \\ud83d"}')
    with pytest.raises(UserError, match=r"a\.json: the prompt is no UTF-8"):
        videos_in(tmp_path)
    (tmp_path / "caf\udce9.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"caf.udce9\.mp4: its name is no UTF-8"):
        videos_in(tmp_path)


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere: is not a folder of videos"):
        videos_in(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no videos"):
        videos_in(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(UserError, match=r"a\.mp4: cannot be read as a video"):
        measure_videos(videos_in(tmp_path))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        videos_in(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="has no text 'prompt'"):
        videos_in(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file": "b.mp4", "caption": "b"}')
    with pytest.raises(UserError, match=r"names b\.mp4, which is not in"):
        videos_in(tmp_path)
    write_video(tmp_path / "still" / "a.mp4", np.zeros((1, 16, 16, 3)), fps=16.0)
    with pytest.raises(UserError, match=r"a\.mp4: a video of 1 frame"):
        measure_videos(videos_in(tmp_path / "still"))


def test_a_comparison_shows_what_it_measured(drawn, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/regression": 0.5}\n{"step": 2, "loss/regression": 0.4}\n')
    shuffled = [drawn[i].__class__(drawn[i].file, drawn[i - 1].caption) for i in range(len(drawn))]
    done = []
    means = compare(
        {"real": drawn, "shuffled": shuffled}, tmp_path, title="T", about="A", run=run, on_progress=done.append
    )
    assert sum(done) == 12
    assert means["real"]["alignment"] > means["shuffled"]["alignment"] + 0.2
    assert means["shuffled"]["saturation/relative"] == pytest.approx(1)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["real"]["videos"] == len(record["real"]["rows"]) == 6
    assert record["shuffled"]["metrics"]["alignment"] == means["shuffled"]["alignment"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video") == 12
    assert f"{means['shuffled']['alignment']:.3f}" in page
    assert "Regression loss" in page


def test_charts_of_logs_with_gaps(tmp_path):
    for seed, values in enumerate(([1.0, None, 3.0], [3.0, 4.0, 5.0])):
        folder = tmp_path / str(seed)
        folder.mkdir()
        entries = [{"step": i, "loss/fake_score": v, "loss/temporal": 0.0} for i, v in enumerate(values)]
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    chart = training_charts({"both": [tmp_path / "0", tmp_path / "1"], "neither": [tmp_path / "nowhere"]})
    assert chart.count("<svg") == 1  # a term that is 0 throughout was switched off
    assert chart.count("<polyline") == 1
    assert ">2<" in chart  # the means are 2 and 4
    assert ">4<" in chart


def test_the_style_of_videos():
    painted, outline = (
        np.stack([style_features(shapes_world.clip(i, **SIZE, style=style)[0]) for i in range(12)])
        for style in shapes_world.STYLES
    )
    assert style_position(painted, start=painted, end=outline) == pytest.approx(0)
    assert style_position(outline, start=painted, end=outline) == pytest.approx(1)
    new = np.stack([style_features(shapes_world.clip(i, **SIZE, style="outline")[0]) for i in range(50, 60)])
    assert style_position(new, start=painted, end=outline) == pytest.approx(1, abs=0.2)
    mixed = np.concatenate([painted, outline])
    assert style_position(mixed, start=painted, end=outline) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="do not differ"):
        style_position(painted, start=painted, end=painted)
    assert math.isclose(style_features(np.ones((2, 8, 8, 3)))[0], 1.0)

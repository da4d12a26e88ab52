"""A whole curation with a stand-in for the analysis: files, what is done again and what is not, kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections import Counter

import curation_stand_in
import numpy as np
import pytest
from curation_stand_in import clip, found
from test_curation_captioning import said, server

import avd_jax.curation
from avd_jax.curation import pipeline, sources
from avd_jax.curation.selection import STAGES
from avd_jax.curation.settings import default_config
from avd_jax.errors import UserError

VIDEOS = {
    "small": found(clip(), size=(640, 360)),
    "grey": found(clip(colour=0.1)),
    "blurred": found(clip(sharpness=3.0)),
    "still": found(clip(motion=0.01)),
    "short": found(clip(seconds=2.0, too_short=True)),
    "copy": found(clip(hashes=curation_stand_in.random_hashes(1, flipped=2), sharpness=99.0)),
    "fine": found(
        clip(hashes=curation_stand_in.random_hashes(1)), clip(5.0625, hashes=curation_stand_in.random_hashes(2))
    ),
    "unreadable": found(error="no header"),
    "crash": "crash",
}
WHY = {
    **{"short": "length", "small": "resolution", "grey": "colour", "blurred": "sharpness", "still": "motion"},
    **{"copy": "duplicate", "fine": None},
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(pipeline, "ANALYSE", "curation_stand_in:analyse")
    monkeypatch.setattr(pipeline, "THUMBNAIL", "builtins:len")  # no picture can be made of these


def curate(videos, out, config=None, stages=STAGES, run=None):
    config = config or default_config()
    curation = pipeline.Curation(config, sources.find(videos), out, stages=stages, workers=2)
    rows = curation.analyse(run or pipeline.pool_runner(config, 2))
    summary = curation.select(rows)
    curation.write(rows, summary)
    if curation.failure:
        raise UserError(curation.failure)
    return summary


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(out):
    return {name: (out / name).read_bytes() for name in ("clips.jsonl", "captions.jsonl", "summary.json")}


def test_every_clip_is_rejected_by_the_stage_that_finds_its_fault(tmp_path):
    videos, out = curation_stand_in.write(tmp_path / "videos", **VIDEOS), tmp_path / "out"
    summary = curate(videos, out)
    rows = lines(out / "clips.jsonl")
    assert {row["source"].removesuffix(".mp4"): row["rejected_by"] for row in rows} == WHY
    keys = ["id", "source", "start", "end", "frames", "fps", "size", "scores", "rejected_by"]
    assert all(list(row)[: len(keys)] == keys for row in rows)
    numbers = {"colour": 2.0, "sharpness": 100.0, "motion": 1.0}
    assert lines(out / "captions.jsonl") == [
        {"file": "../videos/fine.mp4", "start": start, "end": end, "caption": "", "scores": numbers}
        for start, end in ((0.0, 5.062), (5.062, 10.125))
    ]
    assert summary == json.loads((out / "summary.json").read_text()) | {"config": summary["config"]}
    assert [summary[name] for name in ("videos", "readable", "clips", "selected")] == [9, 7, 7, 2]
    funnel = {entry["stage"]: entry for entry in summary["funnel"]}
    assert list(funnel) == list(STAGES)
    assert [entry["out"] for entry in summary["funnel"]] == [7, 6, 5, 4, 3, 3, 3, 2, 2]
    assert [name for name in funnel if "skipped" in funnel[name]] == ["temporal_consistency", "aesthetics", "caption"]
    assert funnel["aesthetics"]["skipped"] == "no config.features.weights"
    assert funnel["colour"]["threshold"] == 0.6
    assert [(entry["source"], entry["reason"]) for entry in summary["unreadable"]] == [
        ("crash.mp4", "crashed its process (signal 11)"),
        ("unreadable.mp4", "no header"),
    ]


def test_only_what_is_new_or_changed_is_analysed(tmp_path):
    names = ("fine", "grey", "crash")
    videos = curation_stand_in.write(tmp_path / "videos", **{name: VIDEOS[name] for name in names})
    curate(videos, tmp_path / "out")
    first = files(tmp_path / "out")
    config = default_config()
    config.select.colour = 0.05  # a threshold is no measurement
    assert curate(videos, tmp_path / "out", config)["selected"] == 3
    assert curation_stand_in.calls(videos) == {"fine": 1, "grey": 1, "crash": 4}  # what broke is tried again
    assert curate(videos, tmp_path / "out")["selected"] == 2
    assert files(tmp_path / "out") == first
    curation_stand_in.write(videos, still=VIDEOS["still"], grey=found(clip(), error=None))
    (videos / "crash.mp4").unlink()
    assert curate(videos, tmp_path / "out")["readable"] == 3
    assert curation_stand_in.calls(videos) == {"fine": 1, "grey": 2, "still": 1, "crash": 6}
    config.analysis.fps = 8.0
    curate(videos, tmp_path / "out", config)
    assert curation_stand_in.calls(videos) == {"fine": 2, "grey": 3, "still": 2, "crash": 6}


KILLED = """
import sys
from pathlib import Path
from avd_jax.curation import pipeline, settings, sources
pipeline.ANALYSE, config = "curation_stand_in:analyse", settings.default_config()
curation = pipeline.Curation(config, sources.find(sys.argv[1]), Path(sys.argv[2]), stages=(), workers=2)
curation.analyse(pipeline.pool_runner(config, 2))
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    videos = {f"v{i}": found(clip(motion=i / 10, hashes=curation_stand_in.random_hashes(i // 2))) for i in range(8)}
    folder = curation_stand_in.write(tmp_path / "videos", **videos)
    curate(folder, tmp_path / "whole")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "AVD_TEST_SLOWNESS": "0.2"}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, folder, tmp_path / "out"], env=environment)
    while len(list((tmp_path / "out").rglob("*.json"))) < 3 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "analysis").rglob("*.json")}
    assert 3 <= len(done) < 8
    assert not (tmp_path / "out" / "clips.jsonl").exists()
    curate(folder, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_the_order_in_which_videos_are_finished_changes_nothing(tmp_path):
    folder = curation_stand_in.write(tmp_path / "videos", **VIDEOS)

    def backwards(jobs, store):
        for job in random.Random(1).sample(jobs, len(jobs)):
            content = json.loads((folder / job.name).read_text())
            broken = "crashed its process (signal 11)" if content == "crash" else None
            pipeline.keep(store, job, content, broken)

    curate(folder, tmp_path / "one")
    curate(folder, tmp_path / "other", run=backwards)
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_stages_that_are_left_out_reject_nothing(tmp_path):
    folder = curation_stand_in.write(tmp_path / "videos", **VIDEOS)
    summary = curate(folder, tmp_path / "out", stages=("colour",))
    counts = Counter(row["rejected_by"] for row in lines(tmp_path / "out" / "clips.jsonl"))
    assert counts == {"length": 1, "colour": 1, None: 6}
    skipped = {entry["stage"]: entry.get("skipped") for entry in summary["funnel"]}
    assert skipped == {**dict.fromkeys(STAGES, "left out by --stages"), "length": None, "colour": None}


def captioned(endpoint="", **changed):
    config = default_config()
    config.caption.update({"endpoint": endpoint, "model": "vlm", "wait": 0.0, "send": "images"} | changed)
    return config


@pytest.fixture
def fine(tmp_path, monkeypatch):
    """A folder of two clips, `fine`, of which one is read and the other is damaged; and of one with a caption."""
    monkeypatch.setattr(pipeline, "clip_reader", lambda path, row, **sent: lambda: (np.zeros((2, 4, 4, 3)), 16.0))
    folder = curation_stand_in.write(tmp_path / "videos", fine=VIDEOS["fine"], told=found(clip()))
    (folder / "told.txt").write_text("A dog.")
    return folder


def texts(out):
    rows = lines(out / "captions.jsonl")
    return {f"{row['file'].rpartition('/')[2].removesuffix('.mp4')} {row['start']}": row["caption"] for row in rows}


def test_captions_are_asked_once_and_given_ones_stay(fine, tmp_path):
    with server(said("First."), said("Second."), said("Third.")) as (endpoint, asked):
        summary = curate(fine, tmp_path / "out", captioned(endpoint, concurrency=1))
        assert texts(tmp_path / "out") == {
            "fine 0.0": "First.",
            "fine 5.062": "Second.",
            "told 0.0": "A dog.",
        }
        assert summary["funnel"][-1]["outcomes"] == {"success": 3, "truncated": 0, "blocked": 0, "error": 0}
        assert [row["caption"]["by"] for row in lines(tmp_path / "out" / "clips.jsonl")] == ["vlm", "vlm", "given"]
        first = files(tmp_path / "out")
        curate(fine, tmp_path / "out", captioned(endpoint, concurrency=1))
        assert files(tmp_path / "out") == first
        assert len(asked) == 2
        curate(fine, tmp_path / "out", captioned(endpoint, prompt="Say it.", keep_given=False))
        assert set(texts(tmp_path / "out").values()) == {"Third."}
        assert len(asked) == 5


def test_without_a_server_given_captions_are_what_there_is(fine, tmp_path):
    summary = curate(fine, tmp_path / "out")
    assert "skipped" not in summary["funnel"][-1]
    assert texts(tmp_path / "out") == {"told 0.0": "A dog."}
    (reason,) = {row["caption"]["reason"] for row in lines(tmp_path / "out" / "clips.jsonl") if row["rejected_by"]}
    assert reason == "no caption came with the video, and there is no config.caption.endpoint"


def test_what_was_not_captioned_is_a_reason_and_is_asked_for_again(fine, tmp_path):
    answers = [(400, {"error": "no"}), said("Cut", "length"), said("Later."), said("Whole.")]
    with server(*answers) as (endpoint, asked):
        summary = curate(fine, tmp_path / "out", captioned(endpoint, concurrency=1))
        assert summary["funnel"][-1]["outcomes"] == {"success": 1, "truncated": 1, "blocked": 0, "error": 1}
        rejected = [row for row in lines(tmp_path / "out" / "clips.jsonl") if row["rejected_by"] == "caption"]
        assert [row["caption"]["outcome"] for row in rejected] == ["error", "truncated"]
        curate(fine, tmp_path / "out", captioned(endpoint, concurrency=1, keep_truncated=True))
        assert texts(tmp_path / "out") == {"fine 0.0": "Later.", "fine 5.062": "Cut", "told 0.0": "A dog."}
        assert len(asked) == 3


def test_a_server_that_is_down_is_one_line_when_all_else_is_written(fine, tmp_path):
    with server() as (endpoint, _):
        pass
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\); the rest is done"):
        curate(fine, tmp_path / "out", captioned(endpoint))
    assert texts(tmp_path / "out") == {"told 0.0": "A dog."}
    assert "cannot be reached" in (tmp_path / "out" / "report.html").read_text()


def test_a_server_that_answers_nothing_of_use_is_told_with_what_it_says(fine, tmp_path):
    with (
        server((400, {"error": "no videos"}), (400, {"error": "no videos"})) as (endpoint, _),
        pytest.raises(UserError, match=r"answers 400 .*no videos.*; the rest is done"),
    ):
        curate(fine, tmp_path / "out", captioned(endpoint, concurrency=1))
    (said_of,) = json.loads((tmp_path / "out" / "summary.json").read_text())["funnel"][-1]["reasons"]
    assert said_of["clips"] == 2
    assert "no videos" in said_of["reason"]


def test_clips_are_rejected_whose_captions_are_held_out(fine, tmp_path):
    """Another list asks the server for nothing."""
    suite, other, out = tmp_path / "suite.jsonl", tmp_path / "other.txt", tmp_path / "out"
    suite.write_text('{"prompt_en": "a blue bird"}\n{"prompt_en": "A red car drives, fast!"}\n')
    other.write_text("the dog\nsomething else\n")
    answers = said("a red car drives fast"), said("A green car that stands.")
    with server(*answers) as (endpoint, asked):
        summary = curate(fine, out, captioned(endpoint, concurrency=1, held_out=f"{suite}, {other}"))
        assert texts(out) == {"fine 5.062": "A green car that stands."}
        entry = summary["funnel"][-1]
        assert entry["outcomes"] == {"success": 1, "truncated": 0, "blocked": 0, "error": 0, "held_out": 2}
        reasons = ["like suite.jsonl:2 (normalised): 'A red car drives, fast!'"]
        reasons += ["like other.txt:1 (one word): 'the dog'"]
        assert [row["reason"] for row in entry["reasons"]] == reasons
        rejected = [row for row in lines(out / "clips.jsonl") if row["rejected_by"] == "caption"]
        assert [row["caption"]["reason"] for row in rejected] == reasons
        assert rejected[0]["caption"]["text"] == "a red car drives fast"
        page = (out / "report.html").read_text()
        assert "2 held_out" in page
        assert "like other.txt:1" in page
        curate(fine, out, captioned(endpoint, concurrency=1, held_out=str(other)))
        assert set(texts(out)) == {"fine 0.0", "fine 5.062"}
        assert len(asked) == 2
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        curate(fine, out, captioned(held_out=f"{suite},{tmp_path}/gone.txt"))


def test_vision_models_rank_what_is_left_and_are_asked_once(tmp_path, monkeypatch):
    beauty = {"a.mp4": 3.0, "b.mp4": 4.0, "c.mp4": 5.0, "d.mp4": 6.0, "e.mp4": 9.0}
    scored = []

    def score(models, path, start, end, frames, fps):
        scored.append(path.name)
        if path.name == "e.mp4":
            raise UserError("damaged")
        return {"aesthetics": {"value": beauty[path.name]}, "embedding": {"value": [beauty[path.name], 1.0]}}

    models = types.SimpleNamespace(missing={"temporal_consistency": "no DINO in w"})
    features = types.SimpleNamespace(load=lambda folder: models, score=score)
    monkeypatch.setitem(sys.modules, "avd_jax.curation.features", features)
    monkeypatch.setattr(avd_jax.curation, "features", features, raising=False)
    config = default_config()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.safetensors").write_bytes(b"")
    config.features.weights, config.select.duplicate_cosine = str(tmp_path / "w"), 1.0
    videos = dict.fromkeys("abcde", found(clip())) | {"z": found(clip(motion=0.0))}
    folder = curation_stand_in.write(tmp_path / "videos", **videos)
    summary = curate(folder, tmp_path / "out", config)
    why = {row["source"]: row["rejected_by"] for row in lines(tmp_path / "out" / "clips.jsonl")}
    assert why == {
        **dict.fromkeys(("a.mp4", "b.mp4", "e.mp4"), "aesthetics"),
        **{"c.mp4": None, "d.mp4": None, "z.mp4": "motion"},
    }
    assert summary["funnel"][5]["skipped"] == "no DINO in w"
    assert summary["funnel"][6]["lowest_kept"] == 5.0
    assert "embedding" not in lines(tmp_path / "out" / "clips.jsonl")[0]["scores"]
    config.select.duplicate_cosine = 0.95
    assert curate(folder, tmp_path / "out", config)["selected"] == 1
    assert sorted(scored) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "e.mp4"]  # no score is not kept


def test_the_page_of_many_clips_stays_small(tmp_path):
    draw = random.Random(0)
    videos, rows = tmp_path / "videos", []
    curation_stand_in.write(videos, a=found())
    curation = pipeline.Curation(default_config(), sources.find(videos), tmp_path / "out", stages=STAGES, workers=2)
    for i in range(2000):
        values = {"colour": draw.gauss(1, 0.5), "sharpness": draw.gauss(60, 50), "motion": draw.expovariate(1)}
        analysis = found(clip(5.0625 * i, **values, hashes=curation_stand_in.random_hashes(i)))
        rows += pipeline.selection.rows_of("a.mp4", analysis)
    curation._identities["a.mp4"] = {}
    summary = curation.select(rows)
    curation.write(rows, summary)
    assert summary["clips"] == 2000 == len(lines(tmp_path / "out" / "clips.jsonl"))
    assert (tmp_path / "out" / "report.html").stat().st_size < 200_000


def test_without_the_extra_it_is_one_line_and_nothing_is_begun(tmp_path, monkeypatch):
    videos = curation_stand_in.write(tmp_path / "videos", fine=VIDEOS["fine"])
    monkeypatch.setattr("avd_jax.curation.cuts.scenedetect", None)
    with pytest.raises(UserError, match="curation needs PySceneDetect, which is not installed"):
        curate(videos, tmp_path / "out")

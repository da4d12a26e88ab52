"""VBench's dimensions from videos and a folder of tiny models: result files, what is skipped, and resuming."""

import functools
import json
import types
from pathlib import Path

import numpy as np
import pytest
from vbench_cases import write_info, write_noise
from vision_cases import HEAD, TINY, write_head, write_model, write_raft

from avd_jax.convert import vision_folder
from avd_jax.curation.features import CLIP_B, CLIP_L, DINO
from avd_jax.data.video import write_video
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench import measures, scores
from avd_jax.evaluation.vbench.suites import VBENCH
from avd_jax.experiments import vbench_commands, vbench_measure

ROWS = [
    {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "a sea", "dimension": ["background_consistency", "scene"]},
    {"prompt_en": "a bay", "dimension": ["aesthetic_quality", "overall_consistency"]},
    {"prompt_en": "a wall", "dimension": ["temporal_flickering"]},
]
FOLDERS = {"a dog": "subject_consistency", "a sea": "scene", "a bay": "overall_consistency"}
WITHOUT_RAFT = ("subject_consistency", "background_consistency", "aesthetic_quality")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Tiny models, each compiled once; in RAFT's place the difference of the pictures, which takes any size."""

    def flow(first, second):
        return np.abs(first.astype(np.float32) - second).mean(-1, keepdims=True).repeat(2, -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_folder, "VIT_MODELS", TINY)
        patch.setattr(vbench_measure.networks, "flow_of", lambda model: flow)
        patch.setattr(vbench_measure, "Models", functools.cache(vbench_measure.Models))
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, place in ((DINO, "dino_model"), (CLIP_B, "clip_model"), (CLIP_L, "clip_model")):
        write_model(folder / place, name)
    write_head(folder / "aesthetic_model" / "emb_reader")
    write_raft(folder / "raft_model" / "models")
    return folder


@pytest.fixture
def videos(tmp_path):
    """Two videos a prompt, small ones; of the wall some that move and some that do not."""
    write_info(tmp_path, VBENCH, ROWS)
    for prompt, folder in FOLDERS.items():
        for i in range(2):
            write_noise(tmp_path / "videos" / folder / f"{prompt}-{i}.mp4", i)
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    for i in range(25):
        shade = np.linspace(1, 0.5 if i % 2 else 1, 3)[:, None, None, None]  # odd ones change
        write_video(tmp_path / "videos" / "temporal_flickering" / f"a wall-{i}.mp4", picture * shade, fps=8)
    return tmp_path / "videos"


def run(videos, weights=None, out="out", **flags):
    flags = dict.fromkeys(("dimensions", "limit")) | flags
    given = types.SimpleNamespace(
        suite="vbench", info=str(videos.parent / VBENCH.info), videos=str(videos), out=str(videos.parent / out),
        models=weights and str(weights), **flags,
    )  # fmt: skip
    vbench_commands.measure(given)
    return json.loads((videos.parent / out / "measured.json").read_text())


def test_all_five(videos, weights, capsys):
    record = run(videos, weights)
    output, errors = capsys.readouterr()
    assert record["dimensions"].keys() == vbench_measure.NEEDED.keys()
    assert record["skipped"] == record["not_official"] == {}
    assert "subject_consistency: 3 of its 5 videos are not there" in errors
    assert "2 of 5 videos" in output
    results = scores.read_results(videos.parent / "out", VBENCH)
    assert {name: result.count for name, result in results.items()} == dict.fromkeys(results, 2) | {
        "temporal_flickering": 5
    }
    assert {name: result.score for name, result in results.items()} == {
        name: figure["score"] for name, figure in record["dimensions"].items()
    }
    assert results["subject_consistency"].videos.keys() == {"a dog-0.mp4", "a dog-1.mp4"}
    assert results["dynamic_degree"].score == 1, "noise, of which any pair moves"
    for name in WITHOUT_RAFT[:2]:
        assert 0 < results[name].score < 1
    assert abs(results["aesthetic_quality"].score - HEAD.bias / 10) < np.linalg.norm(HEAD.weight) / 10
    assert "DINO ViT-B-16.pth" in record["dimensions"]["subject_consistency"]["models"][0]


def test_of_a_prompt_the_first_five_static_videos_count(videos, weights):
    record = run(videos, weights, dimensions=["temporal_flickering"])
    # In the official filter's order, which is the alphabet's.
    kept = [f"a wall-{i}.mp4" for i in (0, 10, 12, 14, 16)]
    assert record["static_filter"] == {"a wall": kept}
    (rows,) = (content[1] for content in read(videos, "temporal_flickering").values())
    assert [row["video_path"] for row in rows] == [f"filtered_videos/a wall-{i}.mp4" for i in range(5)]
    assert [Path(row["source"]).name for row in rows] == kept
    clip = measures.read_clip(videos / "temporal_flickering" / kept[1])
    assert rows[1]["video_results"] == measures.flickering(clip)["video_results"]


def read(videos, name, out="out"):
    return json.loads((videos.parent / out / f"{name}_eval_results.json").read_text())


def test_without_weights_no_figure_is_named_as_the_official_one(videos, capsys):
    with pytest.raises(UserError, match="no dimension could be measured"):
        run(videos)
    record = json.loads((videos.parent / "out" / "measured.json").read_text())
    assert record["dimensions"] == {}
    assert record["skipped"].keys() == vbench_measure.NEEDED.keys()
    assert all("--models" in reason for reason in record["skipped"].values())
    assert record["not_official"][vbench_measure.UNFILTERED]["videos"] == 25
    assert not list((videos.parent / "out").glob("*_eval_results.json"))
    output = capsys.readouterr().out
    assert "25 of 25 videos: not the official figure" in output


def test_what_lacks_weights_is_skipped_with_a_reason(videos, tmp_path):
    folder = tmp_path / "some"
    write_model(folder, DINO)
    (folder / "raft-things.pth").write_bytes(b"")
    (folder / "ViT-B-32.pt").write_bytes(b"broken")
    dimensions = ["subject_consistency", "background_consistency", "dynamic_degree", "motion_smoothness"]
    record = run(videos, folder, dimensions=dimensions)
    assert record["dimensions"].keys() == {"subject_consistency"}
    assert record["skipped"]["motion_smoothness"] == "is not measured here; the official tool does"
    for name, needs, file in (
        ("background_consistency", CLIP_B, "ViT-B-32.pt"),
        ("dynamic_degree", "RAFT (raft-things)", "raft-things.pth"),
    ):
        assert record["skipped"][name].startswith(f"needs {needs}, not in {folder} (")
        assert file in record["skipped"][name]


def test_the_same_command_measures_only_what_is_new(videos, weights, monkeypatch):
    read_clip, seen = measures.read_clip, []
    monkeypatch.setattr(measures, "read_clip", lambda path: seen.append(path.name) or read_clip(path))
    first = run(videos, weights, dimensions=["subject_consistency"])
    results = read(videos, "subject_consistency")
    assert seen == ["a dog-0.mp4", "a dog-1.mp4"]
    log = videos.parent / "out" / "videos.jsonl"
    lines = log.read_text().splitlines()
    log.write_text(f"{lines[0]}\n{lines[1][:40]}")  # as a killed process leaves it
    seen.clear()
    assert run(videos, weights, dimensions=["subject_consistency"]) == first
    assert read(videos, "subject_consistency") == results
    assert seen == ["a dog-1.mp4"]
    seen.clear()
    write_noise(videos / "subject_consistency" / "a dog-0.mp4", 7)  # another video under the same name
    assert run(videos, weights, dimensions=["subject_consistency"]) != first
    assert seen == ["a dog-0.mp4"]


def test_frames_that_raft_cannot_take(videos, weights, monkeypatch):
    def flow(first, second):
        raise measures.TooSmallError("frames of 48x32 are too small for RAFT")

    models = vbench_measure.Models(str(weights))
    monkeypatch.setitem(models.__dict__, "flow", flow)
    with pytest.raises(UserError, match=r"a dog-0\.mp4: frames of 48x32 are too small for RAFT") as raised:
        run(videos, weights, dimensions=["dynamic_degree"])
    assert "\n" not in str(raised.value)


def test_other_input(videos, weights, tmp_path):
    with pytest.raises(UserError, match="its dimensions are not measured here"):
        vbench_commands.measure(types.SimpleNamespace(suite="vbench2"))
    with pytest.raises(UserError, match="no such folder"):
        run(videos, tmp_path / "gone")
    with pytest.raises(UserError, match=r"--videos .*gone: there is no such folder"):
        run(tmp_path / "gone", weights)
    with pytest.raises(UserError, match="--dimensions subject_consistancy: VBench has none"):
        run(videos, weights, dimensions=["subject_consistancy"])

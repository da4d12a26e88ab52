"""Exports of a tiny model: they pass the preflight, resume, are shared out over hosts, and never hold half a video."""

import json
import os
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from generation_cases import STUDENT, write_dit, write_weights
from vbench_cases import entries, write_info

from avd_jax.data.video import read_video
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import VBENCH, VBENCH2, read_info
from avd_jax.evaluation.vbench.videos import video_seed
from avd_jax.experiments import vbench_commands, vbench_export
from avd_jax.generation import run

FLAGS = {
    **dict.fromkeys(("dimensions", "limit", "name", "prompt_file", "prompt_order", "seconds_a_video", "json", "seq")),
    **{"seed": 0, "dry_run": False, "batch_size": 4, "fsdp": 1, "prompt_cache": "", "vae_gib": 8.0},
    "num_processes": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    return folder


@pytest.fixture(scope="module")
def opened():
    """Weights are opened once for each settings."""
    return {}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def sampled(monkeypatch, opened):
    """Noise in place of a model's videos; returns the jobs that were sampled."""
    jobs = []

    def open_for(settings, texts):
        if settings not in opened:
            opened[settings] = run.open_for(settings, texts)
        return opened[settings]

    monkeypatch.setattr(vbench_export, "open_for", open_for)

    def sample(opened, todo, **options):
        for job in todo:
            jobs.append(job)
            yield job, np.random.default_rng(job.seed).uniform(-1, 1, (5, 8, 12, 3)).repeat(4, 1).repeat(4, 2)

    monkeypatch.setattr(vbench_export, "sample", sample)
    return jobs


@pytest.fixture
def given(folder, tmp_path):
    def given(suite, **flags):
        info = tmp_path / suite.info
        what = {"suite": suite.name, "info": str(info if info.exists() else write_info(tmp_path, suite))}
        weights = {"weights": str(folder / "wan"), "checkpoint": str(folder / "student"), "out": str(tmp_path / "out")}
        return types.SimpleNamespace(**FLAGS | what | weights | flags)

    return given


def checked(export, **flags):
    """Return what the preflight of an export says, without the list's being made up."""
    given = types.SimpleNamespace(**vars(export) | {"videos": export.out, "dimensions": None, "limit": None} | flags)
    given.json = f"{export.out}.json"
    vbench_commands.check(given)
    findings = json.loads(Path(given.json).read_text())["findings"]
    return [(f["kind"], f["where"]) for f in findings if f["kind"] != "list of prompts"]


def files(out):
    return sorted(str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("suite", "dimension", "limit", "count"),
    [(VBENCH, "background_consistency", 2, 10), (VBENCH2, "Diversity", 1, 20)],
    ids=["vbench", "vbench2"],
)
def test_a_tiny_models_export_passes_the_preflight(given, capsys, suite, dimension, limit, count):
    export = given(suite, dimensions=[dimension], limit=limit, batch_size=2)
    vbench_commands.export(export, {})
    folder = suite.folders[dimension]
    names = [f"{folder} of prompt {i}.-{j}" for i in range(limit) for j in range(count // limit)]
    out = Path(export.out)
    assert files(out / "videos") == sorted(f"student/{folder}/{name}.mp4" for name in names)
    assert files(out / "records") == sorted(f"student/{folder}/{name}.json" for name in names)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "records", "run.sh", "videos"]
    assert checked(export) == []
    record = json.loads((out / f"records/student/{folder}/{names[1]}.json").read_text())
    assert record["seed"] == video_seed(0, f"{folder} of prompt 0.", 1)
    assert record["settings"]["timesteps"] == STUDENT["timesteps"]
    assert f"{count} videos are there, {count} of them made now" in capsys.readouterr().out


def test_the_manifest_and_the_official_commands(given, sampled, capsys):
    export = given(VBENCH, dimensions=["dynamic_degree", "temporal_flickering"], limit=1, name="the model")
    vbench_commands.export(export, {})
    manifest = json.loads(Path(export.out, "manifest.json").read_text())
    assert manifest["prompts"] == {"subject_consistency": 1, "temporal_flickering": 1}
    assert manifest["list"]["difference"] == "as many prompts of each dimension, but other ones"
    assert manifest["settings"]["fps"] == 8.0
    assert manifest["seconds_a_video"] > 0
    here = '"$here"'
    videos = f"--videos_path {here}/'videos/the model/subject_consistency' --output_path {here}/results"
    flicker = f"{here}/'videos/the model/temporal_flickering'"
    still = f"--videos_path {here}/filtered/filtered_videos --output_path {here}/results"
    assert manifest["official_commands"] == [
        f"python evaluate.py --dimension subject_consistency {videos}",
        f"python static_filter.py --videos_path {flicker} --result_path {here}/filtered",
        f"python evaluate.py --dimension temporal_flickering {still}",
        f"python evaluate.py --dimension motion_smoothness {videos}",
        f"python evaluate.py --dimension dynamic_degree {videos}",
    ]
    script = Path(export.out, "run.sh").read_text()
    assert script.endswith("\n".join(manifest["official_commands"]) + "\n")
    assert "s a video, 0.00 hours to go" in capsys.readouterr().out

    # Another folder of the same export; then the same with other settings.
    vbench_commands.export(given(VBENCH, dimensions=["color"], limit=2, name="the model"), {"frames": None})
    manifest = json.loads(Path(export.out, "manifest.json").read_text())
    assert manifest["prompts"] == {"subject_consistency": 1, "temporal_flickering": 1, "color": 2}
    assert checked(export) == []
    for changed, sampling, message in (
        ({"seed": 1}, {}, "was exported with --seed 0, not 1; give another --out"),
        ({"name": "other"}, {}, "was exported with --name the model, not other"),
        ({}, {"fps": 4.0}, "was exported with another setting, or other weights"),
    ):
        with pytest.raises(UserError, match=message):
            vbench_commands.export(
                given(VBENCH, **{"dimensions": ["color"], "limit": 2, "name": "the model"} | changed), sampling
            )
    with pytest.raises(UserError, match="was exported with --suite vbench, not vbench2"):
        vbench_commands.export(given(VBENCH2, name="the model"), {})
    with pytest.raises(UserError, match="is an export of vbench; give that"):
        checked(given(VBENCH2))


def test_it_resumes_and_a_kill_leaves_no_half_video(given, sampled, monkeypatch):
    export = given(VBENCH2, dimensions=["Composition"], limit=3)
    replace, moved = os.replace, []

    def killed(source, target):
        moved.append(target)
        if len([path for path in moved if "Composition" in str(path) and str(path).endswith(".mp4")]) == 5:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        vbench_commands.export(export, {})
    monkeypatch.setattr(os, "replace", replace)
    assert len(files(f"{export.out}/videos")) == 4
    assert {kind for kind, _ in checked(export)} == {"missing"}
    sampled.clear()
    vbench_commands.export(export, {})
    assert len(sampled) == 5
    assert checked(export) == []
    before = {path: path.stat().st_mtime_ns for path in Path(export.out, "videos").rglob("*.mp4")}
    sampled.clear()
    vbench_commands.export(export, {})
    assert sampled == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_hosts_share_the_videos_and_make_the_same_ones(given, sampled, monkeypatch, tmp_path):
    alone = given(VBENCH2, dimensions=["Complex_Plot"], limit=4, out=str(tmp_path / "alone"))
    vbench_commands.export(alone, {})
    made = set(sampled)
    export = given(VBENCH2, dimensions=["Complex_Plot"], limit=4)
    shares = []
    monkeypatch.setattr(vbench_export, "barrier", lambda name: None)
    monkeypatch.setattr(vbench_export, "from_first", lambda there: np.zeros(12, bool))  # all start at once
    for host in (2, 1, 0):
        monkeypatch.setattr(vbench_export, "share_of", lambda todo, host=host: todo[host::3])
        monkeypatch.setattr(vbench_export, "is_first", lambda host=host: host == 0)
        sampled.clear()
        vbench_commands.export(export, {})
        shares.append(set(sampled))
    assert [len(share) for share in shares] == [4, 4, 4]
    assert set.union(*shares) == made
    assert files(f"{export.out}/videos") == files(f"{alone.out}/videos")
    for name in files(f"{export.out}/videos"):
        assert Path(export.out, "videos", name).read_bytes() == Path(alone.out, "videos", name).read_bytes()
    shutil.rmtree(f"{export.out}/videos")
    with pytest.raises(UserError, match=r"8 videos of other hosts are not on this disk; give a folder that all share"):
        vbench_commands.export(export, {})


def test_extended_prompts_name_no_files(given, sampled, tmp_path):
    rows = entries(VBENCH2)
    aug = tmp_path / "aug.txt"
    aug.write_text("".join(f"A long story about {row['prompt_en']}\n" for row in rows))
    export = given(VBENCH2, dimensions=["Material"], limit=1, prompt_file=str(aug))
    vbench_commands.export(export, {})
    assert [job.prompt for job in sampled] == ["A long story about Material of prompt 0."] * 3
    assert [job.seed for job in sampled] == [video_seed(0, "Material of prompt 0.", i) for i in range(3)]
    record = json.loads(next(Path(export.out, "records").rglob("*-0.json")).read_text())
    assert record["suite_prompt"] == "Material of prompt 0."
    assert record["prompt"] == "A long story about Material of prompt 0."
    assert checked(export) == []

    # The file may move; other texts are another export.
    moved = aug.rename(tmp_path / "moved.txt")
    vbench_commands.export(given(VBENCH2, dimensions=["Material"], limit=1, prompt_file=str(moved)), {})
    moved.write_text(moved.read_text().replace("long", "short"))
    for prompt_file in (str(moved), None):
        with pytest.raises(UserError, match="was exported with another --prompt_file or --prompt_order; give another"):
            vbench_commands.export(given(VBENCH2, dimensions=["Material"], limit=1, prompt_file=prompt_file), {})

    # The same prompts in another order, beside the suite's in that order.
    (tmp_path / "order.txt").write_text("".join(f"{row['prompt_en']}\n" for row in rows[::-1]))
    aug.write_text("".join(f"A long story about {row['prompt_en']}\n" for row in rows[::-1]))
    info = read_info(export.info, VBENCH2)
    texts, about = vbench_export.extended_prompts(info, str(aug), str(tmp_path / "order.txt"))
    assert texts == [f"A long story about {row.prompt}" for row in info.rows]
    assert about["order"].endswith("order.txt")
    aug.write_text("one\n")
    with pytest.raises(UserError, match=r"--prompt_file .*aug.txt: has 1 prompts, .*VBench2_full_info.json has 1230"):
        vbench_export.extended_prompts(info, str(aug), None)
    (tmp_path / "order.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"--prompt_order .*order.txt: lacks 'Human_Anatomy of prompt 0.'"):
        vbench_export.extended_prompts(info, str(aug), str(tmp_path / "order.txt"))
    with pytest.raises(UserError, match="--prompt_order: only goes with --prompt_file"):
        vbench_commands.export(given(VBENCH2, prompt_order="x"), {})


def test_a_prompt_of_two_folders_is_sampled_once(given, sampled, tmp_path):
    rows = [{"prompt_en": "The bund", "dimension": [name]} for name in ("appearance_style", "overall_consistency")]
    write_info(tmp_path, VBENCH, rows)
    export = given(VBENCH)
    vbench_commands.export(export, {})
    assert len(sampled) == 5
    folders = [Path(export.out, "videos", "student", row["dimension"][0]) for row in rows]
    assert files(folders[0]) == files(folders[1]) == [f"The bund-{i}.mp4" for i in range(5)]
    video = read_video(folders[0] / "The bund-3.mp4", frames=5, fps=8, height=32, width=48)
    assert video.std() > 0.1
    next(folders[1].iterdir()).unlink()
    vbench_commands.export(export, {})
    assert len(sampled) == 6
    assert files(folders[1]) == files(folders[0])


def test_the_plan_comes_first_and_a_dry_run_writes_nothing(given, sampled, tmp_path, capsys):
    export = given(VBENCH, dry_run=True, weights=None, checkpoint=None, seconds_a_video=36, num_processes=10)
    export.json = str(tmp_path / "plan.json")
    vbench_commands.export(export, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"VBench: 6230 files of 6230 videos, 0 of them there; in {export.out}/videos/model"
    assert lines[3] == "  temporal_flickering: 75 prompts x 25 = 1875 (temporal_flickering)"
    assert lines[-1] == "hours: 6.23 for 6230 videos, 36 s a video on each of 10 hosts"
    assert len(json.loads(Path(export.json).read_text())["files"]) == 6230
    vbench_commands.export(given(VBENCH2, dry_run=True, dimensions=["Material"]), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("5 frames of 32x48 at 8 a second, student, 3 steps")
    assert lines[-2] == "disk: 7.2e-05 GB, 0.00048 MB a video (a guess)"
    assert lines[-1].startswith("hours: not known; give --seconds_a_video")
    assert not Path(export.out).exists()
    assert sampled == []


def test_a_disk_that_takes_two_names_for_one(given, sampled, tmp_path, monkeypatch):
    rows = [{"prompt_en": f"{a} fantasy landscape", "dimension": ["scene"]} for a in "aA"]
    write_info(tmp_path, VBENCH, rows)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "MANIFEST.JSON" or exists(path))
    with pytest.raises(UserError, match=r"this disk takes 'a fantasy landscape-0.mp4' and 'A fantasy landscape-0"):
        vbench_commands.export(given(VBENCH), {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, "--seed -1: give a whole number from 0 to"),
        ({"name": "a/b"}, "--name 'a/b': give a name of the model that can be a folder's"),
        ({"dimensions": ["Materials"]}, r"--dimensions Materials: VBench-2.0 has none .*did you mean 'Material'"),
        ({"weights": None}, "--weights is missing"),
        ({"fsdp": 3, "dimensions": ["Material"], "limit": 1}, "--fsdp 3: give a divisor of the number of devices"),
    ],
)
def test_wrong_flags(given, flags, message):
    with pytest.raises(UserError, match=message):
        vbench_commands.export(given(VBENCH2, **flags), {})
    assert not list(Path(given(VBENCH2).out).rglob("*.mp4"))


def test_a_damaged_manifest_is_named(given, sampled):
    export = given(VBENCH2, dimensions=["Material"], limit=1)
    vbench_commands.export(export, {})
    for text in ("{", "[]", "{}", '{"settings": {}}'):
        Path(export.out, "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest.json: is damaged, or no manifest of an export"):
            checked(export)

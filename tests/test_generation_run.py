"""Runs on tiny random weights: the files they write, what they skip, and what stops them."""

import gc
import importlib.metadata
import json
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes
import pytest
from convert_cases import write_all
from generation_cases import DIT, STUDENT, UMT5_SIZES, write_dit, write_weights

from avd_jax.data.video import read_video
from avd_jax.errors import UserError
from avd_jax.generation import run, sampling
from avd_jax.generation.settings import Job, Options, from_record_file, resolve
from avd_jax.parallel.mesh import make_mesh

JOBS = [Job("a red ball / rolls", 0), Job("a red ball / rolls", 1), Job("x" * 300, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return resolve(Options(weights=str(folder / "wan"), checkpoint=str(folder / "student")))


@pytest.fixture
def seen(monkeypatch):
    """The videos [F H W 3] that are written, by file name."""
    videos, write = {}, run.write_video

    def spy(path, video, *, fps):
        videos[path.name] = video
        write(path, video, fps=fps)

    monkeypatch.setattr(run, "write_video", spy)
    return videos


def generate(settings, jobs, out, *, batch_size=2, **kwargs):
    plan = run.make_plan(settings, jobs, out, **kwargs)
    batches = {"mesh": make_mesh(devices=jax.devices()[:1]), "batch_size": batch_size}
    done = []
    run.generate(plan, **batches, command="typed", prompt_cache=out / ".prompts", on_progress=done.append)
    assert sum(done) == len(plan.todo)
    return plan


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".prompts")


def test_files_of_a_run(settings, tmp_path, seen, monkeypatch):
    gc.collect()  # what other tests left in cycles would go while this one counts
    table, alive, load = (UMT5_SIZES.vocab_size, UMT5_SIZES.dim), [], sampling.load_module
    before = sum(array.shape == table for array in jax.live_arrays())

    def spy(weights, *args, **kwargs):
        alive.append(sum(array.shape == table for array in jax.live_arrays()) - before)
        return load(weights, *args, **kwargs)

    monkeypatch.setattr(sampling, "load_module", spy)
    plan = generate(settings, JOBS, tmp_path / "new" / "out")
    assert alive == [0, 0, 0]  # the text encoder is freed before the transformer and the VAE are loaded
    out, files = tmp_path / "new" / "out", list(plan.videos.values())
    sheets = [name for name in names(out) if name.startswith("sheet-")]
    assert names(out) == sorted(
        [*sheets, *(file.name for file in files), *(f.with_suffix(".json").name for f in files)]
    )
    assert len(sheets) == 1
    assert files[0].name.startswith("a_red_ball_rolls-")
    for job, file in plan.videos.items():
        assert file.stem.split("-")[-2:] == [str(job.seed), settings.digest(plan.fingerprints)]
        record = json.loads(file.with_suffix(".json").read_text())
        assert (record["prompt"], record["seed"], record["command"]) == (job.prompt, job.seed, "typed")
        assert (record["settings"]["timesteps"], record["settings"]["fps"]) == ([1000.0, 750.0, 400.0], 8.0)
        assert set(record["versions"]) >= {"jax", "flax", "avd_jax"}
        video = read_video(file, frames=5, fps=8, height=32, width=48)
        # H.264 blurs noise, but not the frames' means.
        expected = np.clip(seen[file.name], -1, 1)
        np.testing.assert_allclose(video.mean((1, 2, 3)), expected.mean((1, 2, 3)), atol=0.05)

    # The same again: nothing is touched. Without one video: only that one, and the sheet.
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert generate(settings, JOBS, out).todo == []
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    files[1].unlink()
    first = seen.copy()
    assert generate(settings, JOBS, out, batch_size=1).todo == [JOBS[1]]
    assert {path.name for path in out.iterdir() if path.stat().st_mtime_ns != times.get(path)} == {
        files[1].name,
        files[1].with_suffix(".json").name,
        *sheets,
    }
    # Made alone now, in a batch of two before: the last bits of float32, on values of about 1.
    np.testing.assert_allclose(seen[files[1].name], first[files[1].name], atol=1e-4)
    assert np.abs(first[files[0].name] - first[files[1].name]).max() > 0.1
    (out / sheets[0]).unlink()
    files[0].write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{files[0].name}: .* remove it, and the same command makes it again"):
        generate(settings, JOBS, out)


def test_teacher_again_from_its_record(folder, tmp_path, seen):
    options = Options(weights=str(folder / "wan"), steps=2, frames=5, height=32, width=32, negative_prompt="ugly")
    plan = generate(resolve(options), JOBS[:1], tmp_path / "first")
    (video,) = plan.videos.values()
    assert json.loads(video.with_suffix(".json").read_text())["settings"]["negative_prompt"] == "ugly"
    record = {"path": str(video.with_suffix(".json")), "weights": None, "checkpoint": None}
    again, job, fingerprints = from_record_file(**record)
    first = seen.pop(video.name)
    generate(again, [job], tmp_path / "again", fingerprints=fingerprints)
    np.testing.assert_array_equal(seen[video.name], first)

    other, job, _ = from_record_file(**record | {"checkpoint": str(folder / "student")})
    with pytest.raises(UserError, match=r"student: this is not the transformer that made the video"):
        run.make_plan(other, [job], tmp_path / "again", fingerprints=fingerprints)


def test_steps_are_those_of_all_batches(settings, tmp_path):
    """A batch is filled up so that every device has as many videos as the others."""
    plan = run.make_plan(settings, JOBS, tmp_path)
    for devices, batch_size, batches in ((1, 2, 2), (1, 8, 1), (2, 1, 2), (2, 3, 1)):
        mesh = make_mesh(devices=jax.devices()[:devices])
        assert run.steps(plan, mesh=mesh, batch_size=batch_size) == batches * settings.steps
    assert run.steps(replace(plan, todo=[]), mesh=mesh, batch_size=1) == 0


def test_other_settings_or_weights_are_other_files(settings, folder, tmp_path):
    plans = [
        run.make_plan(changed, JOBS[:1], tmp_path)
        for changed in (
            settings,
            replace(settings, height=48),
            replace(settings, timesteps=(1000.0, 400.0, 200.0)),
            replace(settings, checkpoint=str(folder / "wan")),
        )
    ]
    assert len({plan.videos[JOBS[0]].name for plan in plans}) == len(plans)


def test_fingerprints_do_not_depend_on_the_layout_but_on_the_weights(settings, folder, tmp_path):
    expected = run.make_plan(settings, JOBS, tmp_path).fingerprints
    write_dit(tmp_path / "same", seed=1)
    write_dit(tmp_path / "other", seed=2)
    found = [
        run.make_plan(replace(settings, checkpoint=str(tmp_path / name)), JOBS, tmp_path).fingerprints
        for name in ("same", "other")
    ]
    assert found[0] == expected
    assert {name for name in expected if found[1][name] != expected[name]} == {"transformer"}


def test_adapters_are_merged_and_make_other_files(settings, tmp_path):
    pair = {"lora_up": np.ones((DIT.dim, 1)), "lora_down": np.ones((1, DIT.dim))}
    tensors = {f"diffusion_model.blocks.0.cross_attn.v.{end}.weight": a.astype(np.float32) for end, a in pair.items()}
    write_all(tmp_path / "loras", tensors, stem="style")
    loras = ["", *(f"{tmp_path}/loras/style.safetensors:{strength}" for strength in ("0.5", "1"))]
    plans = [run.make_plan(replace(settings, lora=lora), JOBS[:1], tmp_path / "out") for lora in loras]
    assert len({plan.videos[JOBS[0]].name for plan in plans}) == 3
    none, half, _ = (plan.parts.transformer.array("blocks.cross_attn.v.kernel") for plan in plans)
    np.testing.assert_allclose(half, none + 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"in_dim": 6}, "in_dim is 6, but the z_dim of the VAE"), ({"text_dim": 10}, "text_dim is 10, but the width of")],
)
def test_a_student_of_other_weights(settings, tmp_path, change, message):
    write_dit(tmp_path / "student", config=replace(DIT, **change))
    with pytest.raises(UserError) as error:
        run.make_plan(replace(settings, checkpoint=str(tmp_path / "student")), JOBS, tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/student: the transformer's {message}")


def test_a_folder_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written \(Not a directory\); choose another --out"):
        generate(settings, JOBS, tmp_path / "file" / "out")


def stub_sample(settings, parts, shape, jobs, **how):
    """Stands in for the networks: noise, which H.264 cannot make small."""
    shape = (settings.frames, settings.height, settings.width, 3)
    for job in jobs:
        yield job, np.random.default_rng(job.seed).uniform(-1, 1, shape)


def test_files_in_a_bucket(settings, bucket, bucket_server, monkeypatch):
    monkeypatch.setattr(run, "sample_videos", stub_sample)
    plan = run.make_plan(settings, JOBS, bucket)
    given = {"mesh": make_mesh(devices=jax.devices()[:1]), "batch_size": 2, "command": "typed"}
    run.generate(plan, **given)
    assert sorted(path.suffix for path in bucket.iterdir()) == [*[".json"] * 3, *[".mp4"] * 3, ".png"]
    first = next(iter(plan.videos.values()))
    assert read_video(first, frames=5, fps=8, height=32, width=48).shape == (5, 32, 48, 3)
    assert run.make_plan(settings, JOBS, bucket).todo == []
    first.unlink()
    again = run.make_plan(settings, JOBS, bucket)
    assert again.todo == JOBS[:1]
    bucket_server.faults({"match": "POST", "status": 403, "message": "me@x may not"})
    monkeypatch.setattr(run, "sample_videos", None)  # known before anything is made
    with pytest.raises(UserError, match=f"{bucket}/.*: the account has no right to this .me@x may not"):
        run.generate(again, **given)


def test_a_full_disk_leaves_no_part_of_a_video(settings, tmp_path, monkeypatch):
    large = replace(settings, height=160, width=240)
    monkeypatch.setattr(run, "sample_videos", stub_sample)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError, match=r"\.mp4: cannot be written \(.*\)"):
            generate(large, JOBS, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    generate(large, JOBS, tmp_path)
    assert len(list(tmp_path.glob("*.mp4"))) == len(JOBS)


def test_values_that_are_not_finite_are_no_video(settings, tmp_path, monkeypatch):
    def sampler(network, shape, **options):
        def broken(params, keys, conditions, on_step):
            return jax.device_put(np.full((2, *shape), np.nan), keys.sharding)

        return SimpleNamespace(compiled=lambda *inputs: broken)

    monkeypatch.setattr(sampling, "student_steps", sampler)
    with pytest.raises(UserError, match=r"'a red ball / rolls', seed 0: not finite"):
        generate(settings, JOBS, tmp_path)
    assert not names(tmp_path)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_generation_run as t
from pathlib import Path

def write_and_wait(path, video, *, fps, write=t.run.write_video):
    write(path, video, fps=fps)
    time.sleep(60)

t.run.sample_videos, t.run.write_video = t.stub_sample, write_and_wait
settings = t.resolve(t.Options(weights=sys.argv[2], checkpoint=sys.argv[3]))
t.generate(settings, t.JOBS, Path(sys.argv[4]))
"""


def test_killed_and_run_again(settings, tmp_path, monkeypatch):
    arguments = [str(Path(__file__).parent), settings.weights, settings.checkpoint, str(tmp_path)]
    process = processes.start(["-c", KILLED, *arguments])
    while process.poll() is None and not list(tmp_path.glob("*.mp4")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (first,) = tmp_path.glob("*.mp4")
    kept = first.stat().st_mtime_ns
    # As a kill amid the second video would leave it.
    plan = run.make_plan(settings, JOBS, tmp_path)
    second = plan.videos[JOBS[1]]
    second.with_suffix(".json").write_text("{}")
    second.with_name(f".{second.name}.tmp").write_bytes(b"half")

    monkeypatch.setattr(run, "sample_videos", stub_sample)
    assert generate(settings, JOBS, tmp_path).todo == JOBS[1:]
    assert first.stat().st_mtime_ns == kept
    assert json.loads(second.with_suffix(".json").read_text())["seed"] == 1
    assert [len(list(tmp_path.glob(f"*.{suffix}"))) for suffix in ("mp4", "json", "png", "tmp")] == [3, 3, 1, 0]


def test_code_that_is_not_installed_has_no_version(monkeypatch):
    """It may be on PYTHONPATH alone."""

    def version(package):
        if package == "avd_jax":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = run.environment(make_mesh(devices=jax.devices()[:1]), 1)["versions"]
    assert versions["avd_jax"] == "not installed"
    assert versions["jax"] == "1.0"

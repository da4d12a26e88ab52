"""scripts/export.py as a user runs it, and what it writes."""

import json
import os
from pathlib import Path

import convert_cases as cases
import ml_dtypes
import numpy as np
import processes
import pytest
from pth_cases import write_pth

from avd_jax import convert
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.weights import open_weights

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [str(ROOT / "scripts" / "export.py"), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return processes.run(command, env=environment)


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (array.dtype, array.shape)
        assert ours[key].tobytes() == array.tobytes()


@pytest.fixture(scope="module")
def training_run(tmp_path_factory):
    return cases.training_run(tmp_path_factory.mktemp("run"), ema=True)


def test_exports_a_trained_student_to_diffusers(training_run, tmp_path):
    out = tmp_path / "out" / "student"
    done = run("--checkpoint", training_run, "--layout", "diffusers", "--dst", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: a student of 4 steps in diffusers layout")
    same_tensors(
        cases.read_all(out / "transformer" / cases.WEIGHTS),
        cases.read_all(cases.DIFFUSERS / "transformer" / cases.WEIGHTS),
    )
    written, expected = (
        json.loads((folder / "transformer" / "config.json").read_text()) for folder in (out, cases.DIFFUSERS)
    )
    del written["_diffusers_version"], expected["_diffusers_version"]
    assert written == expected
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] is True
    assert convert.student_settings(out) == convert.student_settings(out / "transformer") == cases.STUDENT
    card = (out / "README.md").read_text()
    for stated in ("1000, 900, 757, 522", "arXiv 2603.21864", "sigmas=[1.0, 0.9, 0.757, 0.522]", "learning_rate", "4"):
        assert stated in card

    again = run("--checkpoint", training_run, "--layout", "diffusers", "--dst", out)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith(f"error: {out}: already exists; pass --overwrite")
    assert again.stderr.count("\n") == 1


def test_exports_the_ema_in_bfloat16_to_wans_layout(training_run, tmp_path):
    out = tmp_path / "student"
    arguments = ("--layout=native", "--dtype=bfloat16", "--which=ema")
    done = run("--checkpoint", training_run / "checkpoints" / "10", "--dst", out, *arguments)
    assert done.returncode == 0, done.stderr
    fixture = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    same_tensors(
        cases.read_all(out / cases.WEIGHTS),
        {key: (value + 2).astype(ml_dtypes.bfloat16) for key, value in fixture.items()},
    )
    config = json.loads((out / "config.json").read_text())
    assert config.items() >= json.loads((cases.NATIVE / "config.json").read_text()).items()
    assert convert.student_settings(out) == cases.STUDENT


def test_native_to_orbax_to_native_is_exact_in_the_sources_dtype(tmp_path):
    tensors = {
        key: value.astype(ml_dtypes.bfloat16) if "ffn" in key else value
        for key, value in cases.read_all(cases.NATIVE / cases.WEIGHTS).items()
    }
    source = cases.copy(cases.NATIVE, tmp_path / "source")
    cases.write_all(source, tensors)
    convert.save_orbax(open_weights(source, WAN_DIT), tmp_path / "ours" / "transformer")
    assert convert.export_dit(tmp_path / "ours", tmp_path / "native", layout="native", max_shard_bytes=20_000) is None
    shards = sorted((tmp_path / "native").glob("*.safetensors"))
    assert len(shards) > 2
    same_tensors({key: value for shard in shards for key, value in cases.read_all(shard).items()}, tensors)
    assert "no few-step student" in (tmp_path / "native" / "README.md").read_text()
    loaded, expected = (cases.leaves_of(convert.load_dit(path)) for path in (tmp_path / "native", source))
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_a_student_keeps_its_settings_through_conversions(training_run, tmp_path):
    exported, ours = tmp_path / "exported", tmp_path / "ours" / "transformer"
    convert.export_dit(training_run, exported, layout="native")
    convert.save_orbax(open_weights(exported, WAN_DIT), ours, student=convert.student_settings(exported))
    assert convert.student_settings(tmp_path / "ours") == convert.student_settings(ours) == cases.STUDENT


def test_a_network_that_is_not_there_is_one_line(tmp_path):
    done = run("--checkpoint", cases.NATIVE, "--which=ema", "--layout=native", "--dst", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {cases.NATIVE}: holds no 'ema'")
    assert not (tmp_path / "out").exists()


def test_one_of_several_networks(tmp_path):
    """As trainers' files hold them; the flag is the same in every script."""
    tensors = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    content = {}
    for name, factor in (("critic", 4), ("generator_ema", 2)):
        content[name] = {key: array * np.float32(factor) for key, array in tensors.items()}
    path = write_pth(tmp_path / "several.pt", content)
    (tmp_path / "config.json").write_text((cases.NATIVE / "config.json").read_text())
    out = tmp_path / "out"
    done = run("--checkpoint", path, "--layout=native", "--dst", out)
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"error: {path}: holds several networks: critic, generator_ema; choose one with --which NAME\n"
    assert done.stderr == expected
    assert not out.exists()
    done = run("--checkpoint", path, "--layout=native", "--which=generator_ema", "--dst", out)
    assert done.returncode == 0, done.stderr
    same_tensors(cases.read_all(out / cases.WEIGHTS), content["generator_ema"])


def test_a_student_as_a_lora(training_run, tmp_path):
    """The run does not say what it started from, as one does that scripts/train.py made."""
    out = tmp_path / "lora"
    arguments = ("--layout=lora", "--rank=2", "--lora_style=kohya", f"--teacher={cases.NATIVE}", "--dtype=float16")
    done = run("--checkpoint", training_run / "checkpoints" / "10", "--dst", out, *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["rank 2", "rank 16", "rank full", str(out)]
    assert lines[2].startswith("rank full: leaves out 0.0000 of the difference from the teacher")
    stored = cases.read_all(out / "wan2.1_t2v_4step_lora_rank2.safetensors")
    assert stored["lora_unet_blocks_0_ffn_0.lora_down.weight"].shape == (2, 24)
    assert stored["lora_unet_blocks_0_ffn_0.lora_up.weight"].dtype == np.float16
    assert stored["lora_unet_blocks_0_ffn_0.alpha"] == 2


# Command lines in one process, each with the end of its error.
MESSAGES = """
import json, runpy, sys
from absl import flags
from avd_jax.errors import UserError

script = runpy.run_path(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        flags.FLAGS(["export.py", *arguments])
        script["main"]()
    except UserError as error:
        print(error)
"""


def test_what_is_refused(training_run, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"")
    checkpoint = f"--checkpoint={training_run}"
    refused = {
        "--rank: only goes with --layout lora; leave it out": ["--layout=native", "--rank=4"],
        "--teacher: only goes with --layout lora; leave it out": ["--layout=comfyui", "--teacher=x"],
        "--dtype fp8: only goes with --layout comfyui, whose reader": ["--layout=native", "--dtype=fp8"],
        "--dtype keep: does not go with --layout lora": ["--layout=lora", "--dtype=keep"],
        "--rank many: give a whole number from 1 on, or full": ["--layout=lora", "--rank=many"],
        f"--teacher is missing: {training_run} does not say": ["--layout=lora"],
        f"{tmp_path}/stile.safetensors: no such LoRA": ["--layout=native", f"--lora={tmp_path}/stile.safetensors"],
        "--lora x:much: the strength 'much' is no number": ["--layout=native", "--lora=x:much"],
    }
    lines = [[checkpoint, f"--dst={tmp_path / 'out'}", *arguments] for arguments in refused.values()]
    command = ["-c", MESSAGES, str(ROOT / "scripts" / "export.py"), json.dumps(lines)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = processes.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(refused)
    for line, message in zip(said, refused, strict=True):
        assert line.startswith(message)
    assert not (tmp_path / "out").exists()


SCRIPTS = ("convert", "export", "generate", "encode", "evaluate", "interpolate", "train", "pretrain")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_that_takes_weights_has_the_flag(script):
    command = [str(ROOT / "scripts" / f"{script}.py"), "--help"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = processes.run(command, env=environment)
    assert "--which: Network, where there are several" in done.stdout

"""scripts/generate.py as a user runs it, on tiny random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from generation_cases import STUDENT, write_dit, write_weights

from avd_jax.data.video import duration

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"
# Many command lines in one process: what each raises, as JSON.
MESSAGES = """
import json, runpy, sys
from absl import flags
from avd_jax.errors import UserError

script = runpy.run_path(sys.argv[1])
messages = []
for arguments in json.loads(sys.argv[2]):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        flags.FLAGS(["generate.py", *arguments])
        script["main"]()
        messages.append("")
    except UserError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    return folder


def python(*arguments, devices=1, status=0):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def test_student_then_one_of_its_videos_again(folder, tmp_path):
    arguments = ["--checkpoint", folder / "student", "--weights", folder / "wan", "--out", tmp_path / "out"]
    arguments += ["--prompt", "Panda playing the guitar", "--seed", "0,7,8"]
    # Two devices share out three videos: the batch is filled up to four.
    done = python(SCRIPT, *arguments, "--batch_size", 3, devices=2)
    assert done.stdout == f"{tmp_path}/out: 3 made, 0 there already (student, 3 steps)\n"
    assert "3/3" in done.stderr
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert [video.name.split("-")[2] for video in videos] == ["0", "7", "8"]
    assert len(list((tmp_path / "out").glob("sheet-*.png"))) == 1
    record = json.loads(videos[0].with_suffix(".json").read_text())
    assert record["batch_size"] == 4
    assert record["devices"].startswith("2 x ")
    assert record["command"].startswith(str(SCRIPT))
    assert duration(videos[0]) == pytest.approx(5 / 8)

    again = ["--from_json", videos[0].with_suffix(".json"), "--out", tmp_path / "out"]
    assert python(SCRIPT, *again).stdout == f"{tmp_path}/out: 0 made, 1 there already (student, 3 steps)\n"


def test_messages(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "half.json").write_text('["a \\ud83d"]')
    (tmp_path / "torn.json").write_text('["a",')
    weights, out, prompt = f"--weights={folder}/wan", f"--out={tmp_path}/out", "--prompt=a"
    student, small = f"--checkpoint={folder}/student", ("--frames=5", "--height=32", "--width=48")
    cases = {
        (prompt, out): "--weights is missing",
        (weights, out): "give either --prompt with a text, or --prompts with a file of them",
        (weights, out, prompt, "--prompts=x"): "give either --prompt with a text, or --prompts with a file of them",
        (weights, out, f"--prompts={tmp_path}/empty.txt"): f"{tmp_path}/empty.txt: no prompts in it",
        (weights, out, prompt, "--batch_size=0"): "--batch_size 0: give at least 1",
        (weights, out, prompt, "--fsdp=2"): "--fsdp 2: give a divisor of the number of devices, which is 1",
        (weights, out, prompt, "--steps=-1"): "--steps -1: give at least 1",
        (weights, out, prompt, student, "--steps=4"): "--steps: a student's steps are fixed by the schedule",
        (weights, out, prompt, *small, "--frames=4"): "frames=4 is not 2n + 1; try 3 or 5",
        (weights, out, prompt, *small, "--height=30"): "height=30 is not a multiple of 4; try 28 or 32",
        (f"--weights={folder}/none", out, prompt): f"{folder}/none: no such file or folder",
        (f"--weights={folder}/student", out, prompt): f"{folder}/student: no vae here",
        (weights, out, prompt, "--which=ema"): f"{folder}/wan: holds no 'ema'",
        (weights, f"--prompts={tmp_path}/half.json", out): f"{tmp_path}/half.json:1: the prompt is no UTF-8",
        (weights, f"--prompts={tmp_path}/torn.json", out): f"{tmp_path}/torn.json:1: is not JSON",
        (weights, prompt, "--out=gs://bucket/x"): "--out gs://bucket/x: gs:// is not supported, only local paths are;",
        (weights, "--prompts=s3://bucket/x", out): "--prompts s3://bucket/x: s3:// is not supported",
        (weights, f"--out={tmp_path}/file/out", prompt, student): f"{tmp_path}/file/out: cannot be written",
        (out, f"--from_json={folder}/wan/vae/config.json"): f"{folder}/wan/vae/config.json: has no 'prompt'",
        (weights, out, prompt, "--half_rate_steps=1"): "--half_rate_steps: only a student makes steps at half the",
        (weights, out, prompt, student, "--half_rate_steps=1"): f"--half_rate_steps 1: {folder}/student has no frame",
        (out, "--from_json=a.json", "--steps=4"): "--steps: --from_json takes it from a.json; leave it out",
        (out, "--from_json=a.json", "--seed=4"): "--seed: --from_json takes it from a.json; leave it out",
    }
    found = json.loads(python("-c", MESSAGES, SCRIPT, json.dumps(list(cases))).stdout)
    for (arguments, expected), message in zip(cases.items(), found, strict=True):
        assert message.startswith(expected), (arguments, message)
        assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line():
    done = python(SCRIPT, "--prompt=a", status=1)
    assert done.stderr.startswith("error: --out is missing: ")
    assert done.stderr.count("\n") == 1


def test_length():
    assert len(SCRIPT.read_text().splitlines()) <= 100

"""scripts/generate.py as a user runs it, on tiny random weights."""

import json
import os
import socket
import subprocess
from pathlib import Path

import processes
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


@pytest.fixture(scope="module", autouse=True)
def users_cache(tmp_path_factory):
    """The folder in which the prompts' embeddings are kept by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"]) / "avd_jax" / "prompts"


def start(*arguments):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return processes.start(arguments, env=environment)


def python(*arguments, status=0):
    process = start(*arguments)
    output, errors = process.communicate()
    assert process.returncode == status, errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def on_two_hosts(*arguments):
    """Run a command as two processes that know each other; return what each wrote to stdout and to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    processes = [start(*arguments, coordinator, "--num_processes=2", f"--process_id={i}") for i in range(2)]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [
        ("".join(line for line in output.splitlines(True) if not line.startswith("[Gloo]")), errors)
        for output, errors in outputs
    ]


def test_student_on_two_hosts_then_one_of_its_videos_again(folder, tmp_path, users_cache):
    arguments = ["--checkpoint", folder / "student", "--weights", folder / "wan", "--out", tmp_path / "out"]
    arguments += ["--prompt", "Panda playing the guitar", "--seed", "0,7,8"]
    # Their two devices share out three videos: the batch is filled up to four. One host writes and reports.
    (output, errors), (silent, others_errors) = on_two_hosts(SCRIPT, *arguments, "--batch_size", 3)
    assert output == f"{tmp_path}/out: 3 made, 0 there already (student, 3 steps)\n"
    assert "3/3" in errors
    assert "3/3" not in others_errors
    assert silent == ""
    assert len(list(users_cache.rglob("*.safetensors"))) == 1
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert [video.name.split("-")[2] for video in videos] == ["0", "7", "8"]
    assert len(list((tmp_path / "out").glob("sheet-*.png"))) == 1
    record = json.loads(videos[0].with_suffix(".json").read_text())
    assert record["batch_size"] == 4
    assert record["devices"].startswith("2 x ")
    assert record["mesh"] == {"data": 2, "fsdp": 1, "seq": 1}
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
        (weights, out, prompt, *small, "--fsdp=2"): "--fsdp 2: give a divisor of the number of devices, which is 1",
        (
            weights,
            out,
            prompt,
            *small,
            "--seq=2",
        ): "--seq 2: give one of 1: it must divide the transformer's 2 attention",
        (
            weights,
            out,
            prompt,
            "--process_id=1",
        ): "--coordinator, --num_processes missing: --coordinator, --num_processes",
        (weights, out, prompt, "--steps=-1"): "--steps -1: give at least 1",
        (weights, out, prompt, student, "--steps=4"): "--steps: a student's steps are fixed by the schedule",
        (weights, out, prompt, *small, "--frames=4"): "frames=4 is not 2n + 1; try 3 or 5",
        (weights, out, prompt, *small, "--height=30"): "height=30 is not a multiple of 4; try 28 or 32",
        (f"--weights={folder}/none", out, prompt): f"{folder}/none: no such file or folder",
        (f"--weights={folder}/student", out, prompt): f"{folder}/student: no vae here",
        (weights, out, prompt, "--which=ema"): f"{folder}/wan: holds no 'ema'",
        (weights, f"--prompts={tmp_path}/half.json", out): f"{tmp_path}/half.json:1: the prompt is no UTF-8",
        (weights, f"--prompts={tmp_path}/torn.json", out): f"{tmp_path}/torn.json:1: is not JSON",
        (
            weights,
            prompt,
            "--out=s3://bucket/x",
        ): "--out s3://bucket/x: s3:// is not supported, only local paths and",
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

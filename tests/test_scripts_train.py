"""scripts/train.py as a user runs it, on a tiny transformer: killed, stopped, out of disk, with wrong flags."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from training_cases import small_disk, write_sets, write_weights

ROOT = Path(__file__).parents[1]
NUM_STEPS = 8


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A command line but for its --workdir."""
    folder = tmp_path_factory.mktemp("inputs")
    latents, prompts = write_sets(folder)
    config = folder / "config.py"
    config.write_text(
        f"""
from avd_jax.training.config import default_config

def get_config():
    config = default_config()
    config.init_from = {str(write_weights(folder / "dit"))!r}
    config.data.latents, config.data.prompts = {str(latents)!r}, {str(prompts)!r}
    config.num_steps, config.batch_size, config.fake_score_updates = {NUM_STEPS}, 2, 2
    config.checkpoint_every, config.sample_every, config.ema_decay = 2, 0, 0.9
    config.optimizer.learning_rate = config.optimizer.fake_score_learning_rate = 1e-3
    return config
"""
    )
    return [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(config)]


def environment():
    """One device and, on more than one run of the suite, programs that are compiled already."""
    return os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}


def start(command, workdir, *flags):
    arguments = [*command, *flags, "--workdir", str(workdir)]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=environment(), stdout=pipe, stderr=pipe, text=True)


def finish(process, timeout=240):
    """Return (status, stdout, stderr without what libraries log)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in found]


def contents(workdir, step):
    """Every array of a checkpoint as bytes, and its meta data."""
    folder, found = workdir / "checkpoints" / str(step), {}
    for item in ("generator", "fake_score", "ema", "optimizers", "progress"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(folder / item)):
            found[f"{item}{jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    return found, json.loads((folder / "meta" / "metadata").read_text())


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    status, out, err = finish(start(command, workdir))
    assert status == 0, err
    assert f"done: {NUM_STEPS} steps" in out
    assert [line["step"] for line in metrics(workdir)] == list(range(1, NUM_STEPS + 1))
    return workdir


def assert_same_run(workdir, straight):
    found, meta = contents(workdir, NUM_STEPS)
    expected, expected_meta = contents(straight, NUM_STEPS)
    assert len(found) > 200
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert meta == expected_meta
    assert metrics(workdir) == metrics(straight)


def wait_for(process, condition, timeout=240):
    """Poll until the condition holds; False where the process ended before."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    process.kill()
    raise AssertionError("it never came to that")


def half_written(workdir, step):
    return any((workdir / "checkpoints").glob(f"{step}*tmp*"))


def test_killed_at_several_moments_it_ends_as_if_it_had_not_been(command, straight, tmp_path):
    moments = (
        lambda: len(metrics(tmp_path)) >= 1,  # before the first checkpoint
        lambda: half_written(tmp_path, 4),
        lambda: (tmp_path / "checkpoints" / "6").exists(),
    )
    kills = 0
    for moment in moments:
        process = start(command, tmp_path)
        if wait_for(process, moment):
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        finish(process)
    assert kills == 3
    status, out, err = finish(start(command, tmp_path))
    assert (status, err.count("Traceback")) == (0, 0)
    assert "going on from step" in out or "the run is complete" in out
    assert_same_run(tmp_path, straight)
    assert not half_written(tmp_path, "")


def test_sigterm_saves_and_the_same_command_goes_on(command, straight, tmp_path):
    process = start(command, tmp_path, "--config.checkpoint_every=0", "--config.num_steps=100000")
    assert wait_for(process, lambda: len(metrics(tmp_path)) >= 2)
    process.terminate()
    status, out, err = finish(process)
    assert (status, err.count("Traceback")) == (143, 0)
    (saved,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"stopped by SIGTERM after step {saved}, which is saved" in out
    assert metrics(tmp_path)[-1]["step"] == saved
    assert metrics(tmp_path)[:NUM_STEPS] == metrics(straight)[:saved]


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(command, tmp_path):
    with small_disk(tmp_path / "disk", 3) as workdir:
        status, _, err = finish(start(command, workdir, "--config.checkpoint.keep=1000", "--config.num_steps=100000"))
        last = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
        assert status == 1
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert "No space left" in err or f"step {last} is the last good one" in err
        shutil.copytree(workdir / "checkpoints" / str(last), tmp_path / "run" / "checkpoints" / str(last))
    found, meta = contents(tmp_path / "run", last)
    assert len(found) > 200
    assert meta["step"] == last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.num_step=3"], "config.num_step does not exist (did you mean 'num_steps'?)"),
        (["--config.remat=everything"], "config.remat='everything' must be one of none, block, save_attention"),
    ],
)
def test_wrong_flags_are_one_line(command, tmp_path, flags, message):
    status, out, err = finish(start(command, tmp_path / "run", *flags))
    assert status == 1
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_value_of_the_wrong_type_is_named(command, tmp_path):
    status, out, err = finish(start(command, tmp_path / "run", "--config.num_steps=many"))
    assert (status, out) == (1, "")
    assert "--config.num_steps=many" in err
    assert "Traceback" not in err

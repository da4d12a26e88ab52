"""scripts/train.py and its kin as a user runs them, on tiny networks: killed, stopped, out of disk, misused."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from training_cases import small_disk, write_sets, write_weights

from avd_jax import convert, methods
from avd_jax.errors import UserError
from avd_jax.fields import flags_parser
from avd_jax.models.interpolator import InterpolatorConfig

ROOT = Path(__file__).parents[1]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A command line but for its --workdir."""
    folder = tmp_path_factory.mktemp("inputs")
    latents, prompts = write_sets(folder)
    config = folder / "config.py"
    config.write_text(
        f"""
from avd_jax.methods.avd.config import default_config

def get_config():
    config = default_config()
    config.init_from = {str(write_weights(folder / "dit"))!r}
    config.data.latents, config.data.prompts = {str(latents)!r}, {str(prompts)!r}
    config.num_steps, config.batch_size, config.fake_score_updates = {NUM_STEPS}, 2, 2
    config.checkpoint_every, config.sample_every, config.ema_decay = 2, 0, 0.9
    config.remat = "none"
    config.optimizer.learning_rate = config.optimizer.fake_score_learning_rate = 1e-3
    return config
"""
    )
    return [str(ROOT / "scripts" / "train.py"), "--config", str(config)]


def environment():
    """One device and, on more than one run of the suite, programs that are compiled already."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def start(command, workdir, *flags):
    return processes.start([*command, *flags, "--workdir", workdir], env=environment())


def finish(process, timeout=240):
    """Return (status, stdout, stderr without what libraries log)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    found = [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]
    return [line for line in found if line.keys() != {"step"}]  # one before the first step has times alone


def contents(workdir, step):
    """Every array of a checkpoint as bytes, and its meta data."""
    folder, found = workdir / "checkpoints" / str(step), {}
    for item in ("generator", "fake_score", "generator_ema", "optimizers", "progress"):
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
    """Poll until the condition holds; False if the process ended before."""
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
        lambda: (tmp_path / "checkpoints" / "4").exists(),
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


def test_sigterm_saves_and_the_same_command_resumes(command, straight, tmp_path):
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


@pytest.fixture(scope="module")
def interpolator_config(tmp_path_factory):
    """A config file of a method with a small network."""
    folder = tmp_path_factory.mktemp("interpolator")
    latents, _ = write_sets(folder)
    config = folder / "config.py"
    config.write_text(
        f"""
from avd_jax.methods.interpolator import FIELDS
from avd_jax.fields import config_from

def get_config():
    config = config_from(FIELDS)
    config.data.latents, config.data.held_out, config.model.widths = {str(latents)!r}, 1, (8, 8, 8)
    config.num_steps, config.batch_size, config.log_every = 1, 2, 1
    return config
"""
    )
    return config


def script(name, config, *flags):
    return [str(ROOT / "scripts" / name), "--config", str(config), *flags]


def test_a_config_of_any_method_is_run_and_its_own_script_ships_the_result(interpolator_config, tmp_path):
    status, out, err = finish(start(script("train.py", interpolator_config), tmp_path / "run"))
    assert (status, err.count("Traceback")) == (0, 0), err
    assert "done: 1 steps" in out
    assert (tmp_path / "run" / "held_out.md").exists()
    own = script("train_interpolator.py", interpolator_config, "--out", str(tmp_path / "out"))
    status, out, err = finish(start(own, tmp_path / "run"))  # the run is complete: it is shipped
    assert (status, err.count("Traceback")) == (0, 0), err
    assert "the run is complete: 1 of 1 steps" in out
    assert f"wrote {tmp_path}/out/interpolator" in out
    assert convert.load_interpolator(tmp_path / "out").config == InterpolatorConfig(4, (8, 8, 8))


def assert_one_line(process, message):
    status, out, err = finish(process)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert message in err


def test_a_script_of_one_method_takes_no_other(interpolator_config, tmp_path):
    wrong = script("train_vae.py", interpolator_config, "--out", str(tmp_path / "out"))
    message = "config.method='interpolator': this script is for 'vae'; run scripts/train.py, which takes any"
    assert_one_line(start(wrong, tmp_path / "run"), message)
    assert list(tmp_path.iterdir()) == []


def test_explain_prints_the_fields_of_the_method_that_the_file_names(interpolator_config, tmp_path):
    status, out, _ = finish(start(script("train.py", interpolator_config, "--explain"), tmp_path / "run"))
    assert status == 0
    assert "data.held_out = 1 " in out
    assert "fake_score" not in out
    assert not (tmp_path / "run").exists()


def test_a_method_that_does_not_exist_is_one_line(interpolator_config, tmp_path):
    config = changed(interpolator_config, tmp_path, "config.method = 'vea'")
    message = "config.method='vea': there is no such method (did you mean 'vae'?); it is one of avd, flow_matching"
    assert_one_line(start(script("train.py", config), tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def changed(config, folder, line):
    """Write a config file with one more line."""
    path = folder / "config.py"
    path.write_text(config.read_text().replace("    return config", f"    {line}\n    return config"))
    return path


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        (
            "config.num_step = 3",
            [],
            "sets the field 'num_step', which does not exist there (did you mean 'num_steps'?)",
        ),
        ("config.model.width = 3", [], "sets the field 'width', which does not exist there (did you mean 'widths'?)"),
        ("config.num_steps = 'many'", [], "config.py: sets a field to a value of another type (Could not override"),
        ("pass", ["--config.data.held_outs=1"], "config.data.held_outs does not exist (did you mean 'data.held_out'?)"),
        ("pass", ["--config.fake_score_updates=1"], "config.fake_score_updates does not exist"),
    ],
)
def test_fields_are_those_of_the_method_that_the_file_names(interpolator_config, tmp_path, line, flags, message):
    config = changed(interpolator_config, tmp_path, line)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        flags_parser(methods.fields_of_file)(["train.py", "--config", str(config), *flags])
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_config_is_named(tmp_path):
    (tmp_path / "config.py").write_text("config = 3\n")
    with pytest.raises(UserError, match=r"config\.py: is no config; it must define get_config\(\)"):
        methods.fields_of_file(str(tmp_path / "config.py"))


def test_every_config_that_comes_with_the_code_names_its_method():
    # One is of many runs, one of none.
    paths = [path for path in ROOT.glob("configs/*.py") if path.stem not in ("tiny_ablation", "curation")]
    found = {path.stem: methods.fields_of_file(str(path))["method"].default for path in paths}
    assert set(found.values()) == {"avd", "flow_matching", "interpolator", "rcm", "vae"}
    assert (found["tiny"], found["tiny_pretrain"], found["tiny_vae"]) == ("avd", "flow_matching", "vae")

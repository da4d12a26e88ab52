"""A run on two processes of four devices each: the same losses as on one, and what SIGTERM and SIGKILL do to it."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import pytest
from generation_cases import VAE, InMemory
from processes import start as start_process
from training_cases import make_config, train, use_linear_network, write_inputs

from avd_jax import convert
from avd_jax.convert.architectures import WAN_VAE
from avd_jax.data.pipeline import training_batches
from avd_jax.methods.avd import method
from avd_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[1]
NUM_STEPS = 20


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs")) | {
        "num_steps": NUM_STEPS,
        "batch_size": 8,
        "fake_score_updates": 1,
        "checkpoint_every": 5,
        "sample_every": 0,
        "mesh__data": 2,
        "mesh__fsdp": -1,
        "optimizer__learning_rate": 1e-3,
        "optimizer__fake_score_learning_rate": 1e-3,
    }


def here(settings, workdir, devices, **fields):
    """Train in this process, on some of its devices."""
    with pytest.MonkeyPatch.context() as patch:
        use_linear_network(patch.setattr)
        some = {"devices": jax.devices()[:devices]}
        patch.setattr(method, "make_mesh", lambda **options: make_mesh(**options | some))
        return train(make_config(**settings | fields), workdir)


def start(settings, workdir, processes=2, apart=False, at=None, **fields):
    """Start a run of so many processes that share eight devices; each has a workdir of its own if they are `apart`.

    `at` is another workdir, in a bucket.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    paths = []
    for i in range(processes):
        paths.append(workdir.with_name(f"{workdir.name}_{i}.json"))
        folder = at or (workdir / str(i) if apart else workdir)
        paths[-1].write_text(json.dumps({"config": settings | fields, "workdir": str(folder)}))
    count = f"--xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    worker = str(ROOT / "tests" / "host_worker.py")
    commands = [[worker, path, coordinator, processes, i] for i, path in enumerate(paths)]
    return [start_process(command, env=environment) for command in commands]


def finish(processes, timeout=120):
    """Return the statuses, what each process said on stdout, and what on stderr; no process outlives the test."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


def wait_for(processes, condition, timeout=120):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.01)


def metrics(workdir):
    """The numbers of each step but for the times."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines if "loss/generator" in line]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def assert_same_losses(found, expected):
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """The workdir of a run on one device that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    assert here(settings, workdir, 1, mesh__data=1) == 0
    assert len(metrics(workdir)) == NUM_STEPS
    return workdir


def test_killed_on_two_hosts_it_ends_with_the_losses_of_one_device(settings, straight, tmp_path):
    """The first host is killed; the second does not wait for it for ever."""
    workdir = tmp_path / "run"
    processes = start(settings, workdir)
    wait_for(processes, lambda: 5 in steps(workdir))
    processes[0].kill()
    (killed, left), _, _ = finish(processes)
    assert killed == -signal.SIGKILL
    assert left != 0
    assert steps(workdir)[-1] < NUM_STEPS

    convert.save_orbax(InMemory(WAN_VAE, VAE), tmp_path / "weights" / "vae")
    samples = {"sample_every": NUM_STEPS, "sample__vae": str(tmp_path / "weights"), "sample__prompts": 1}
    resumed = start(settings, workdir, **samples, sample__teacher_steps=1)
    statuses, (first, second), errors = finish(resumed)
    assert statuses == [0, 0], errors
    assert len(list((workdir / "samples").rglob("*.mp4"))) == 1
    assert "going on from step" in first
    assert f"done: {NUM_STEPS} steps" in first
    assert second == "", "one host reports"
    assert_same_losses(metrics(workdir), metrics(straight))
    assert steps(workdir) == steps(straight)


def test_eight_devices_of_one_host_make_the_same_losses(settings, straight, tmp_path):
    assert here(settings, tmp_path, 8) == 0
    assert_same_losses(metrics(tmp_path), metrics(straight))


def test_sigterm_on_one_host_saves_one_step_on_all_and_fewer_devices_resume(settings, straight, tmp_path):
    workdir = tmp_path / "run"
    processes = start(settings, workdir, num_steps=100000, checkpoint_every=0)
    wait_for(processes, lambda: (workdir / "metrics.jsonl").exists() and metrics(workdir))
    processes[1].terminate()
    statuses, (first, second), errors = finish(processes)
    assert statuses == [143, 143], errors
    (saved,) = steps(workdir)
    assert f"stopped by SIGTERM after step {saved}, which is saved" in first
    assert second == ""
    assert metrics(workdir)[-1]["step"] == saved
    assert_same_losses(metrics(workdir)[:NUM_STEPS], metrics(straight)[:saved])

    # Another number of hosts, of devices, another mesh: the same data, the same losses.
    ends = {4: tmp_path / "four", 1: tmp_path / "one"}
    for devices, folder in ends.items():
        shutil.copytree(workdir, folder)
        assert here(settings, folder, devices, num_steps=saved + 3, mesh__data=1, mesh__fsdp=-1) == 0
        meta = json.loads((folder / "checkpoints" / str(saved + 3) / "meta" / "metadata").read_text())
        assert meta["data"] == position_after(settings, saved + 3)
    assert len(metrics(ends[4])) == saved + 3
    assert_same_losses(metrics(ends[4])[saved:], metrics(ends[1])[saved:])


def position_after(settings, batches):
    iterator = training_batches(
        settings["data__latents"], settings["data__prompts"], batch_size=8, prompt_batches=2, seed=0, text_len=8
    )
    for _ in range(batches):
        next(iterator)
    return iterator.get_state()


def test_a_user_error_ends_every_host_with_one_line(settings, tmp_path):
    processes = start(settings | {"batch_size": 12}, tmp_path / "run")
    statuses, outputs, errors = finish(processes)
    assert 1 in statuses
    assert 0 not in statuses
    assert outputs[1] == ""
    assert any("error: a batch of 12 (config.batch_size" in error for error in errors)


def test_hosts_that_do_not_share_a_workdir_say_so_at_once(settings, tmp_path):
    processes = start(settings, tmp_path / "run", apart=True)
    statuses, _, errors = finish(processes)
    assert statuses == [1, 1]
    said = "is not the same folder on all hosts (what process 0 writes does not show on process 1)"
    assert any(said in error for error in errors), errors
    assert not list(tmp_path.rglob("checkpoints"))

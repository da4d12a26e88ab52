"""A run with all paths in a bucket: as on a disk, also stopped, in bad spells, and from half a checkpoint."""

import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from test_training_hosts import finish, start, wait_for
from training_cases import make_config, train, use_devices, use_linear_network, write_inputs, write_sets

from avd_jax.errors import UserError
from avd_jax.paths import any_path
from avd_jax.training.checkpoint import Checkpoints

STEPS = 4
SETTINGS = {
    "num_steps": STEPS,
    "batch_size": 8,
    "fake_score_updates": 1,
    "checkpoint_every": 2,
    "log_every": 1,
    "sample_every": 0,
    "optimizer__learning_rate": 1e-3,
    "optimizer__fake_score_learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, bucket_server):
    """The same inputs on a disk and in a bucket."""
    folder = tmp_path_factory.mktemp("inputs")
    there = any_path("gs://bucket/inputs")
    here = write_inputs(folder)
    write_sets(there)
    for file in (folder / "dit").iterdir():
        (there / "dit" / file.name).upload(file)
    return {folder: here, there: {name: value.replace(str(folder), str(there)) for name, value in here.items()}}


def run(workdir, inputs, **fields):
    with pytest.MonkeyPatch.context() as patch:
        use_linear_network(patch.setattr)
        use_devices(patch.setattr, 2)
        return train(make_config(**SETTINGS | inputs | fields), workdir)


def metrics(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def arrays(workdir, step=STEPS):
    folder, found = epath.Path(str(workdir / "checkpoints" / str(step))), {}
    for item in folder.iterdir():
        if (item / "_METADATA").exists():
            for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
                found[f"{item.name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    assert len(found) > 10
    return found


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """The workdir of a run on the disk that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    assert run(workdir, next(iter(inputs.values()))) == 0
    return workdir


def assert_same_run(workdir, straight):
    assert arrays(workdir) == arrays(straight)
    assert metrics(workdir) == metrics(straight)


def test_half_a_checkpoint_and_bad_spells_change_nothing(inputs, straight, bucket, bucket_server):
    _, there = inputs.values()
    bucket_server.faults(
        {"match": "/o/.*checkpoints", "status": 503, "times": 3},
        {"match": "checkpoints", "status": 429, "times": 3},
        {"match": "upload.*metrics", "status": 503, "times": 1},
    )
    assert run(bucket, there) == 0
    assert_same_run(bucket, straight)
    assert not (bucket / ".lock").exists()
    assert any(path.name.startswith("events") for path in (bucket / "tensorboard").iterdir())

    # Killed while it was written: all is there but what Orbax writes last.
    (bucket / "checkpoints" / str(STEPS) / "commit_success.txt").unlink()
    (bucket / "metrics.jsonl").write_text((bucket / "metrics.jsonl").read_text()[:-5])
    assert run(bucket, there) == 0
    assert_same_run(bucket, straight)


class State:
    def to_items(self):
        return {"x": {"a": jnp.ones(4)}}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "message": "Invalid Credentials"}, "no valid credentials .*Invalid Credentials.*gcloud"),
        ({"status": 403, "message": "me@x may not"}, "no right to this .*me@x may not"),
    ],
    ids=["expired", "forbidden"],
)
def test_a_checkpoint_that_cannot_be_written_is_told_while_it_trains(bucket, bucket_server, fault, said):
    checkpoints = Checkpoints(bucket, keep=1)
    bucket_server.faults({"match": r"POST.*checkpoints.*/d/", **fault})
    checkpoints.save(1, State(), {}, {})

    def wait_for_it():
        until = time.monotonic() + 120
        while time.monotonic() < until:
            checkpoints.check()
            time.sleep(0.01)

    with pytest.raises(UserError, match=f"{re.escape(str(bucket))}/checkpoints.*: .*{said}"):
        wait_for_it()
    assert not (bucket / "checkpoints" / "1" / "commit_success.txt").exists()


def test_a_step_asks_nothing_of_the_bucket(inputs, bucket, bucket_server):
    here, _ = inputs.values()
    others = []
    for steps in (2, 6):
        bucket_server.requests()
        assert run(bucket / str(steps), here, num_steps=steps, checkpoint_every=0) == 0
        asked = [path.replace(f"{bucket.name}/{steps}", "") for path, *_ in bucket_server.requests()]
        logs = [path for path in asked if "metrics" in path or "events" in path]
        assert len(logs) < 12
        # Of checkpoints there is one, and the number of its requests depends on when its parts are ready.
        aside = re.compile(r"checkpoints|/b/bucket(\?|$)|\.lock")
        others.append([path for path in asked if path not in logs and not aside.search(path)])
    assert others[0] == others[1]


def test_stopped_on_one_of_two_hosts_both_save(inputs, straight, bucket, tmp_path):
    """They have nothing in common but the bucket."""
    _, there = inputs.values()
    settings = SETTINGS | there | {"mesh__data": 2, "mesh__fsdp": -1}
    processes = start(settings, tmp_path / "unused", num_steps=100_000, checkpoint_every=0, at=bucket)
    wait_for(processes, (bucket / "config.json").exists, timeout=600)
    processes[1].terminate()
    statuses, (first, second), errors = finish(processes, timeout=600)
    assert statuses == [143, 143], errors
    saved = int(re.search(r"stopped by SIGTERM after step (\d+), which is saved", first)[1])
    assert second == ""
    assert metrics(bucket)[-1]["step"] == saved
    for found, expected in zip(metrics(bucket), metrics(straight), strict=False):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert run(bucket, there, num_steps=saved + 1) == 0
    assert metrics(bucket)[-1]["step"] == saved + 1


def test_another_run_in_the_same_folder_is_refused(inputs, bucket, monkeypatch):
    from avd_jax.data import bucket_lock
    from avd_jax.data.atomic import only_writer

    monkeypatch.setattr(bucket_lock, "BEAT", 0.1)
    with only_writer(bucket), pytest.raises(UserError, match=f"{bucket}: another process is writing to it"):
        run(bucket, next(iter(inputs.values())))

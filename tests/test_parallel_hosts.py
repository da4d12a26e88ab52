"""Which processes belong together, and which rows of a batch each holds."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from avd_jax.errors import UserError
from avd_jax.parallel import hosts
from avd_jax.parallel.mesh import AXES, batch_sharding, make_mesh


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "CUDA_VISIBLE", "JAX_LOCAL"))]:
        monkeypatch.delenv(name)
    return calls


def test_one_process_joins_nobody(joined):
    hosts.connect()
    assert joined == []


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "3"}, True),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # in sbatch, without srun
        ({"SLURM_NTASKS": "16"}, False),  # in salloc
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_launchers_say_who_takes_part(joined, monkeypatch, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hosts.connect()
    assert joined == [(None, None, None, None)] * joins


@pytest.mark.parametrize(
    ("variables", "own"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_LOCALID": "1"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "5", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}, [0]),
        (
            {
                **{"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
                "SLURM_GPUS_PER_TASK": "2",
            },
            [0, 1],
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}, None),  # no GPUs, or all are shown
        (
            {
                **{"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"},
                "JAX_LOCAL_DEVICE_IDS": "1",
            },
            None,
        ),
    ],
)
def test_the_gpus_of_a_process_under_slurm(joined, monkeypatch, variables, own):
    """Left alone, JAX would use one GPU of a node with one process, and ask for a fifth one where there is but one."""
    for name, value in {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_NODEID": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    hosts.connect()
    assert joined == [(None, None, None, own)]


def test_a_launcher_that_does_not_say_all(joined, monkeypatch):
    def nobody(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"does not say all .*coordinator_address.*SLURM_\* into a container"):
        hosts.connect()


def test_flags_say_it_anywhere_else(joined):
    hosts.connect(coordinator="host0:1234", num_processes=2, process_id=1)
    assert joined == [("host0:1234", 2, 1, None)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes, --process_id missing: .* go together"),
        ({"process_id": 0}, "--coordinator, --num_processes missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "a number below it"),
    ],
)
def test_flags_that_do_not_fit(joined, flags, message):
    with pytest.raises(UserError, match=message):
        hosts.connect(**flags)
    assert joined == []


def test_others_that_cannot_be_reached(monkeypatch):
    def unreachable(*_):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", unreachable)
    with pytest.raises(UserError, match=r"could not join the others \(DEADLINE_EXCEEDED: Barrier timed out\); start"):
        hosts.connect(coordinator="a:1", num_processes=2, process_id=1)


def test_a_tpu_host_that_knows_of_no_others_works_alone(monkeypatch):
    def nobody(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    monkeypatch.setattr(hosts, "_platforms", lambda: "tpu,cpu")
    hosts.connect()


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "data": 2}, {"seq": 4, "data": 2}, {"seq": 8}])
def test_rows_land_where_the_mesh_wants_them(sizes):
    """In any order of devices: TPU meshes follow the wires, not the hosts."""
    shape = make_mesh(**sizes).devices.shape
    devices = np.random.default_rng(0).permutation(np.asarray(jax.devices())).reshape(shape)
    mesh = Mesh(devices, AXES)
    rows = hosts.batch_rows(mesh, 8)
    assert rows.rows == tuple(range(8)), "one host holds all"
    whole = np.arange(16).reshape(8, 2)
    batch = rows.put(whole)
    np.testing.assert_array_equal(batch, whole)
    assert batch.sharding == batch_sharding(mesh)


def test_a_host_that_holds_some_rows_puts_each_in_its_place(monkeypatch):
    """As the second of two hosts whose devices hold rows 1 and 3 of 4."""
    sharding, whole = batch_sharding(make_mesh(devices=jax.devices()[:4])), np.arange(4) * 10
    rows, seen = hosts.BatchRows(sharding, 4, (1, 3)), {}

    def make(shape, sharding, read):
        seen.update(shape=shape, **{str(row): read((slice(row, row + 1),)) for row in (1, 3)})

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    rows.put(whole[[1, 3]])
    assert seen == {"shape": (4,), "1": [10], "3": [30]}


def test_what_only_this_host_has_is_not_asked_of_the_others(monkeypatch):
    def collective(*args, **kwargs):
        raise AssertionError("the others are not here")

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", collective)
    mesh = make_mesh(devices=jax.local_devices()[:4])
    values = np.arange(8.0)
    np.testing.assert_array_equal(hosts.to_host(jax.device_put(values, batch_sharding(mesh))), values)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_are_all_and_each_once(monkeypatch, count):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares = []
    for host in range(count):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(hosts.share_of(list(range(12))))
    assert sorted(item for share in shares for item in share) == list(range(12))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

"""The device mesh on eight CPU devices."""

import jax
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.parallel.mesh import batch_sharding, batch_shards, filled_up, make_mesh, replicated


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 2, "seq": 2}, (2, 2, 2)),
        ({"data": 4, "seq": -1}, (4, 1, 2)),
        # Two free sizes: as many batch shards as the batch has examples for, the rest share tokens.
        ({"data": 1, "fsdp": -1, "seq": -1, "batch_size": 16}, (1, 8, 1)),
        ({"data": 1, "fsdp": -1, "seq": -1, "batch_size": 4}, (1, 4, 2)),
        ({"data": 1, "fsdp": -1, "seq": -1, "batch_size": 12}, (1, 4, 2)),
        ({"data": 2, "fsdp": -1, "seq": -1, "batch_size": 4}, (2, 2, 2)),
        ({"data": -1, "fsdp": 2, "seq": -1, "batch_size": 4}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1, "seq": -1, "batch_size": 1}, (1, 1, 8)),
    ],
)
def test_sizes(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == shape
    assert list(mesh.shape) == ["data", "fsdp", "seq"]
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_some_of_the_devices():
    assert make_mesh(devices=jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "fsdp=3 .*does not multiply to the 8 devices"),
        ({"fsdp": 16}, "fsdp=16 .*does not multiply to the 8 devices"),
        ({"data": 1}, "data=1 x fsdp=1 x seq=1 does not multiply to the 8 devices here; set config.mesh"),
        ({"fsdp": -1}, "only one size may be -1, or seq and one other"),
        ({"fsdp": -1, "seq": -1, "batch_size": 8}, "only one size may be -1"),
        (
            {"data": 4, "fsdp": 2, "batch_size": 12},
            "batch of 12 .* cannot be shared out over data=4 x fsdp=2; change it",
        ),
        ({"fsdp": 0}, "must be positive"),
        ({"seq": -2}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


def test_the_batch_is_cut_along_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, seq=2)
    assert batch_shards(mesh) == 4
    assert [filled_up(examples, mesh) for examples in (1, 4, 5)] == [4, 4, 8]
    batch = jax.device_put(np.arange(24).reshape(8, 3), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    whole = jax.device_put(np.arange(24).reshape(8, 3), replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 3)}


class Chip:
    """A TPU chip, as far as a mesh asks."""

    platform, device_kind = "tpu", "TPU v4"

    def __init__(self, number, per_slice):
        self.id, self.slice_index = number, number // per_slice
        self.process_index, self.core_on_chip = number // 4, 0
        within = number % per_slice
        self.coords = (within % 2, within // 2 % 2, within // 4)

    def __repr__(self):
        return f"Chip({self.id})"


def test_only_data_spans_slices():
    chips = [Chip(number, 8) for number in range(16)]
    mesh = make_mesh(data=2, fsdp=4, seq=2, devices=chips)
    for i in range(2):
        assert {chip.slice_index for chip in mesh.devices[i].flat} == {i}
    with pytest.raises(
        UserError, match=r"data=1: the 16 devices are 2 slices.*set config.mesh.data to a multiple of 2"
    ):
        make_mesh(data=1, fsdp=16, devices=chips)


def test_every_axis_may_span_nodes_of_gpus():
    """JAX calls each host of GPUs a slice; the neighbours of `seq`, and then of `fsdp`, still share a node."""

    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

        def __init__(self, number):
            self.id = number
            self.process_index = self.slice_index = number // 8

    nodes = [Gpu(number) for number in range(16)]
    mesh = make_mesh(data=1, fsdp=8, seq=2, devices=nodes[::-1])
    assert [gpu.id for gpu in mesh.devices.flat] == list(range(16))
    assert make_mesh(data=2, fsdp=4, seq=2, devices=nodes).shape["data"] == 2
    assert make_mesh(data=1, fsdp=16, devices=nodes).size == 16

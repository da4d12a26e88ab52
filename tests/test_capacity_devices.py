"""What the table says of the kinds of devices, under all the names that they go by."""

import pytest

from avd_jax.capacity.devices import KINDS, find_kind, memory_gib, peak_flops
from avd_jax.errors import UserError
from avd_jax.parallel import topology
from avd_jax.parallel.gpu_topology import GPUS


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
        ("NVIDIA L4", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("kind", "gib", "speed"),
    [
        ("TPU v4", 30.75, (1.05, 2)),
        ("TPU v5 lite", 15.75, (1.5, 1)),
        ("TPU v5", 95.74, (1.75, 2)),
        ("TPU v6 lite", 31.25, (1.75, 1)),
    ],
)
def test_tpus(kind, gib, speed):
    assert memory_gib(kind) == gib
    found = find_kind(kind)
    assert (found.gigahertz, found.cores) == speed


def test_each_device_that_can_be_compiled_for_is_of_a_kind_whose_memory_is_known():
    kinds = [*topology._SHAPES, *(find_kind(gpu.name).name.lower() for gpu in GPUS.values())]
    assert set(kinds) == {kind.name.lower() for kind in KINDS if kind.memory_gib}
    assert [find_kind(gpu.name).name.lower() for gpu in GPUS.values()] == list(GPUS)


def test_a_gpu_leaves_a_twentieth_to_cuda():
    for gpu in GPUS.values():
        assert memory_gib(gpu.name) == pytest.approx(0.95 * gpu.memory / 2**30, rel=1e-3)


@pytest.mark.parametrize("kind", ["abacus", "NVIDIA H100 PCIe"])
def test_memory_that_is_not_known(kind):
    with pytest.raises(
        UserError, match=f"memory of a {kind} is not known; use one of A100, H100, H200, L40S, RTX4090, v4, v5e"
    ):
        memory_gib(kind)

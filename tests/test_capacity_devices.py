"""What the table says of the kinds of devices, under all the names that they go by."""

import pytest

from avd_jax.capacity.devices import KINDS, find_kind, memory_gib, peak_flops
from avd_jax.errors import UserError
from avd_jax.parallel import topology


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
        ("cpu", None),
        ("NVIDIA L4", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize(
    ("kind", "gib", "speed"),
    [
        ("TPU v4", 32, (1.05, 2)),
        ("TPU v5 lite", 16, (1.5, 1)),
        ("TPU v5", 95, (1.75, 2)),
        ("TPU v6 lite", 32, (1.75, 1)),
    ],
)
def test_tpus(kind, gib, speed):
    assert memory_gib(kind) == gib
    found = find_kind(kind)
    assert (found.gigahertz, found.cores) == speed


def test_each_slice_that_can_be_compiled_for_is_of_a_kind_whose_memory_is_known():
    assert set(topology._SHAPES) == {kind.name for kind in KINDS if kind.memory_gib}


@pytest.mark.parametrize("kind", ["abacus", "NVIDIA H200"])
def test_memory_that_is_not_known(kind):
    with pytest.raises(UserError, match=f"memory of a {kind} is not known; use one of v4, v5e, v5p, v6e"):
        memory_gib(kind)

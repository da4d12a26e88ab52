"""The devices that are planned for, in one table: what each kind does in a second, and how much it holds."""

import re
from dataclasses import dataclass

from avd_jax.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
      pattern: of `jax.Device.device_kind`; the same device has several names there, of the compiler and the driver.
      name: as it is spoken of, and as a TPU slice's name begins.
      peak_flops: a second, of dense bfloat16 matrix products, as its maker states them.
      memory_gib: that programs can have. Of a TPU what its compiler says that it has, which is a little less than the
        chip; of a GPU 95 % of what the driver reports, `XLA_PYTHON_CLIENT_MEM_FRACTION=0.95`: CUDA, NCCL and cuDNN need
        the rest.
      link_bytes: a second, in one direction, over all links to neighbours (TPU) or within a host (GPU).
      network_bytes: likewise between hosts of GPUs, one 400 or 200 Gb/s card each, or slices of TPUs.
      gigahertz: clock of a TPU.
      cores: of a TPU that work on one kernel.
      host_gib: memory of its usual host, four chips of a TPU; None: it varies.
    """

    pattern: str
    name: str
    peak_flops: float
    memory_gib: float | None = None
    link_bytes: float | None = None
    network_bytes: float | None = None
    gigahertz: float | None = None
    cores: int | None = None
    host_gib: float | None = None


# The first pattern that fits counts. Sources: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (inter-chip interconnect,
# machine types), NVIDIA's data sheets; memory from libtpu 0.0.42.1's messages and XLA's descriptions of GPUs.
KINDS = (
    Kind(r"TPU v6( lite|e)", "v6e", 918e12, 31.25, 448e9, 12.5e9, gigahertz=1.75, cores=1, host_gib=670),
    Kind(r"TPU v5( lite|e)", "v5e", 197e12, 15.75, 200e9, 12.5e9, gigahertz=1.5, cores=1, host_gib=178),
    Kind(r"TPU v5p?$", "v5p", 459e12, 95.74, 600e9, 12.5e9, gigahertz=1.75, cores=2, host_gib=417),
    Kind(r"TPU v4$", "v4", 275e12, 30.75, 300e9, 12.5e9, gigahertz=1.05, cores=2, host_gib=379),
    Kind(r"H100 PCIe", "H100 PCIe", 756e12),
    Kind(r"H200", "H200", 989e12, 0.95 * 141.0, 450e9, 50e9),
    Kind(r"H100", "H100", 989e12, 0.95 * 79.1, 450e9, 50e9),
    Kind(r"A100-SXM4-80GB", "A100", 312e12, 0.95 * 79.3, 300e9, 25e9),
    Kind(r"A100", "A100 of other memory", 312e12),
    Kind(r"L40S", "L40S", 362e12, 0.95 * 44.5, 32e9, 12.5e9),
    Kind(r"RTX 4090", "RTX4090", 165e12, 0.95 * 23.65, 32e9, 12.5e9),
)


def find_kind(device_kind: str) -> Kind | None:
    """Return the kind of device that `jax.Device.device_kind` names; None if it is not in the table."""
    return next((kind for kind in KINDS if re.search(kind.pattern, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOPs a second of a kind of device, as `jax.Device.device_kind` names it; None if unknown."""
    kind = find_kind(device_kind)
    return kind and kind.peak_flops


def memory_gib(device_kind: str) -> float:
    """Return how much of a device's memory programs can have, in GiB.

    Raises:
      UserError: it is not known.
    """
    kind = find_kind(device_kind)
    if not kind or not kind.memory_gib:
        known = ", ".join(sorted(kind.name for kind in KINDS if kind.memory_gib))
        raise UserError(f"the memory of a {device_kind} is not known; use one of {known}")
    return kind.memory_gib

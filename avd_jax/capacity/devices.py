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
      gigahertz: clock of a TPU.
      cores: of a TPU that work on one kernel.
      memory_gib: of a TPU, of which the compiler keeps a little for itself. Those of GPUs vary within a kind.
    """

    pattern: str
    name: str
    peak_flops: float
    gigahertz: float | None = None
    cores: int | None = None
    memory_gib: float | None = None


# The first pattern that fits counts.
KINDS = (
    Kind(r"TPU v6( lite|e)", "v6e", 918e12, gigahertz=1.75, cores=1, memory_gib=32),
    Kind(r"TPU v5( lite|e)", "v5e", 197e12, gigahertz=1.5, cores=1, memory_gib=16),
    Kind(r"TPU v5p?$", "v5p", 459e12, gigahertz=1.75, cores=2, memory_gib=95),
    Kind(r"TPU v4$", "v4", 275e12, gigahertz=1.05, cores=2, memory_gib=32),
    Kind(r"H100 PCIe", "H100 PCIe", 756e12),
    Kind(r"H[12]00", "H100 or H200", 989e12),
    Kind(r"A100", "A100", 312e12),
)


def find_kind(device_kind: str) -> Kind | None:
    """Return the kind of device that `jax.Device.device_kind` names; None if it is not in the table."""
    return next((kind for kind in KINDS if re.search(kind.pattern, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOPs a second of a kind of device, as `jax.Device.device_kind` names it; None if unknown."""
    kind = find_kind(device_kind)
    return kind and kind.peak_flops


def memory_gib(device_kind: str) -> float:
    """Return the memory of a TPU in GiB, of which the compiler keeps a little for itself.

    Raises:
      UserError: it is not known.
    """
    kind = find_kind(device_kind)
    if not kind or not kind.memory_gib:
        known = ", ".join(sorted(kind.name for kind in KINDS if kind.memory_gib))
        raise UserError(f"the memory of a {device_kind} is not known; use one of {known}")
    return kind.memory_gib

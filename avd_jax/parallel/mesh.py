"""The device mesh: `data` and `fsdp` shard the batch, `fsdp` shards parameters, `seq` shards tokens."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avd_jax.errors import UserError

AXES = ("data", "fsdp", "seq")
BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int = -1, fsdp: int = 1, seq: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the mesh over all devices; one size may be -1, which takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "seq": seq}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh {shown}: sizes must be positive, at most one of them -1")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh {shown} does not multiply to the {len(devices)} devices here; set config.mesh to fit")
    # Auto axes: the compiler propagates the shardings that the step's inputs and outputs state.
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose leading axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Return into how many shards the mesh cuts the global batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)

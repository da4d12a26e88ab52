"""The device mesh: `data` and `fsdp` share the batch, `seq` shares the tokens, `fsdp` and `seq` the parameters.

Only one sum of gradients an update crosses `data`, so that axis, and it alone, may span TPU slices, between which the
network is slow.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avd_jax.errors import UserError

AXES = ("data", "fsdp", "seq")
BATCH_AXES = ("data", "fsdp")
PARAMETER_AXES = ("fsdp", "seq")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    seq: int = 1,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build the mesh over all devices. Neighbours on an axis are neighbours in the machine if it has a topology.

    One size may be -1, which takes what the others leave. If `seq` and another one both are, that one takes as many
    devices as the batch has examples for, and `seq` the rest. So one config serves any number of devices.

    Args:
      data, fsdp, seq: sizes of the axes.
      batch_size: examples that are worked on at a time, over all devices; every batch shard needs its share.
      devices: all of them by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, the batch cannot be shared out, or `data` does not
        span the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = {"data": data, "fsdp": fsdp, "seq": seq}
    sizes = _sizes(given, len(devices), batch_size)
    if batch_size is not None and batch_size % (sizes["data"] * sizes["fsdp"]):
        raise UserError(
            f"a batch of {batch_size} (config.batch_size / accumulation_steps) cannot be shared out over "
            f"data={sizes['data']} x fsdp={sizes['fsdp']}; change it, or set config.mesh.data to 1 and "
            "config.mesh.fsdp and config.mesh.seq to -1"
        )
    # Auto axes: the compiler propagates the shardings that the step's inputs and outputs state.
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_that_divides(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of as many devices as share out a batch evenly, all along `data`; None: of those that are here."""
    devices = jax.devices() if devices is None else devices
    return make_mesh(devices=devices[: math.gcd(batch_size, len(devices))])


def _sizes(given: dict[str, int], devices: int, batch_size: int | None) -> dict[str, int]:
    sizes = dict(given)
    shown = " x ".join(f"{axis}={size}" for axis, size in given.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh {shown}: sizes must be positive, or -1")
    left = devices // math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 2 and free[1] == "seq" and batch_size is not None:
        other = math.prod(sizes[axis] for axis in BATCH_AXES if axis != free[0])
        sizes[free[0]] = math.gcd(left, max(batch_size // other, 1))
        sizes["seq"] = left // sizes[free[0]]
    elif len(free) > 1:
        raise UserError(f"mesh {shown}: only one size may be -1, or seq and one other; set config.mesh to fit")
    elif free:
        sizes[free[0]] = left
    if math.prod(sizes.values()) != devices:
        raise UserError(f"mesh {shown} does not multiply to the {devices} devices here; set config.mesh to fit")
    return sizes


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Return how many TPU slices the devices are of.

    JAX calls each host of GPUs a slice, too; but every axis may span these, since their network is made for it.
    """
    return len({getattr(device, "slice_index", None) for device in devices}) if devices[0].platform == "tpu" else 1


def _arranged(sizes: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
    slices = slice_count(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh data={sizes['data']}: the {len(devices)} devices are {slices} slices, over which only the data axis "
            f"can reach; set config.mesh.data to a multiple of {slices}"
        )
    within = sizes | {"data": sizes["data"] // slices}
    return mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose leading axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def placed(tree, sharding: NamedSharding):
    """Return the shapes and dtypes of a tree's arrays, each with the sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def batch_shards(mesh: Mesh) -> int:
    """Return into how many shards the mesh cuts the global batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def filled_up(examples: int, mesh: Mesh) -> int:
    """Return `examples` rounded up so that every batch shard has as many as the others."""
    shards = batch_shards(mesh)
    return -(-examples // shards) * shards

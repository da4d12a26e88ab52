"""Which mesh and batch size suit some devices: the sensible ones are compiled, the cheapest that fits recommended."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import ml_collections
from jax.sharding import Mesh

from avd_jax.capacity.budget import LESS_MEMORY
from avd_jax.capacity.compiling import Report
from avd_jax.capacity.program import Program
from avd_jax.errors import UserError
from avd_jax.parallel.mesh import slice_count


class Planned(Protocol):
    """What a run's config comes to on some devices.

    Attributes:
      mesh: of the devices.
    """

    mesh: Mesh

    def program(self, name: str) -> Program:
        """Return one of the run's programs."""


def candidates(config, devices: Sequence[jax.Device], build: Callable[..., Planned]) -> Iterator[Planned]:
    """Yield what is worth compiling: the config's batch size and twice it, each with every fitting mesh.

    Parameters are sharded over all devices of a slice, slices share the batch; so what is open is how many devices
    share an example's tokens. More than eight are not tried if fewer serve: their exchanges only grow.

    Args:
      config: of a training run, an `ml_collections.ConfigDict` with `batch_size` and `mesh`.
      devices: of the slice or slices.
      build: config -> what is to be compiled for it on these devices; a UserError if they do not fit each other.

    Raises:
      UserError: no mesh fits the batch and the heads.
    """
    slices = slice_count(devices)
    inside = len(devices) // slices
    found = 0
    for batch_size in (config.batch_size, 2 * config.batch_size):
        fitting = []
        for seq in (n for n in range(1, inside + 1) if inside % n == 0):
            changed = ml_collections.ConfigDict(config.to_dict())
            changed.batch_size = batch_size
            changed.mesh.update({"data": slices, "fsdp": inside // seq, "seq": seq})
            try:
                fitting.append(build(changed))
            except UserError:
                continue  # this mesh divides the batch or the heads badly; others may not
        few = [plan for plan in fitting if plan.mesh.shape["seq"] <= 8]
        for plan in few or fitting[:1]:
            found += 1
            yield plan
    if not found:
        build(config)  # says what is wrong with the config's own mesh
        raise UserError(f"no mesh of {len(devices)} devices fits batch_size={config.batch_size}; change it")


def recommend(reports: Sequence[Report]) -> str:
    """Return the flags of the fitting plan with the fewest estimated seconds an example, or what to do instead.

    The estimate contains attention and collectives (`estimated_seconds`): how many devices share an example's tokens
    changes little else.
    """
    fitting = [report for report in reports if report.fits]
    if not fitting:
        least = min(reports, key=lambda report: report.total_gib)
        return f"none: the smallest needs {least.total_gib:.1f} GiB of {least.limit_gib:.2f}; {LESS_MEMORY}"
    # Without an estimate a plan is only taken if none has one.
    best = min(fitting, key=lambda report: math.inf if report.seconds is None else report.seconds / report.batch_size)
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best.mesh.items())
    return f"--config.batch_size={best.batch_size} {mesh}"

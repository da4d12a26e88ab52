"""What a run costs: FLOPs of a cycle, counted from the programs that run, and the memory of all its stages."""

from collections.abc import Mapping
from dataclasses import dataclass

from avd_jax.capacity.budget import Verdict, needs_of
from avd_jax.capacity.compiling import Report
from avd_jax.capacity.devices import find_kind, memory_gib, peak_flops
from avd_jax.capacity.flops import count_flops
from avd_jax.capacity.program import expected_flops
from avd_jax.training.assembly import Assembly


@dataclass(frozen=True)
class CycleCost:
    """FLOPs of a cycle over all devices, expected over what is drawn at random; remat's second forward counts again.

    Attributes:
      updates: network -> FLOPs of one update of it, with its share of what a cycle makes once for all of them.
      times: network -> how often a cycle updates it.
      examples: in a batch.
      unit: name of the piece of work in which the cost is stated; None if there is none.
      unit_flops: of that piece for a batch.
    """

    updates: Mapping[str, float]
    times: Mapping[str, int]
    examples: int
    unit: str | None = None
    unit_flops: float = 1.0

    @property
    def flops(self) -> float:
        """FLOPs of the whole cycle."""
        return sum(self.times[name] * flops for name, flops in self.updates.items())

    def in_units(self, flops: float) -> float:
        """Return FLOPs of a batch in units, which is as many for each example."""
        return flops / self.unit_flops

    def as_text(self) -> str:
        """Return the cost as a sentence."""
        made = ", ".join(f"{n} {name} update{'s' * (n != 1)}" for name, n in self.times.items())
        if self.unit is None:
            return f"one cycle ({made}) costs {self.flops / self.examples:.3g} FLOPs an example"
        each = ", ".join(f"{self.in_units(flops):.3g} a {name} update" for name, flops in self.updates.items())
        return f"one cycle ({made}) costs {self.in_units(self.flops):.3g} {self.unit} an example: {each}"


def cycle_cost(assembly: Assembly, size: str | None = None) -> CycleCost:
    """Count one cycle of a run, after its warm-up; each program is traced, which its first call need not do again.

    Args:
      assembly: of the run.
      size: of the batch, where there are several; None: the largest.
    """
    calls, method, size = assembly.lasting, assembly.method, size or assembly.largest
    updates = {call.update.network: expected_flops(assembly.program(call.update.program, size)) for call in calls}
    for call in calls:
        if call.shared is not None:
            shared = expected_flops(assembly.program(call.update.shared_program, size))
            updates[call.update.network] += shared / call.update.times
    times = {call.update.network: call.update.times for call in calls}
    unit, unit_flops = None, 1.0
    if method.unit is not None:
        unit, function, args = method.unit(assembly.sizes[size])
        unit_flops = count_flops(function, *args)
    return CycleCost(updates, times, assembly.rows.batch_size, unit, unit_flops)


def seconds_at_peak(assembly: Assembly, cost: CycleCost) -> float | None:
    """Return the seconds that one cycle would take at the peak of all devices' matrix units; None if that is unknown.

    What these are of the seconds that it takes is the run's MFU.
    """
    mesh = assembly.method.mesh
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else cost.flops / (peak * mesh.size)


def whole_run(assembly: Assembly, reports: Mapping[str, Report], topology: str) -> Verdict:
    """Return whether a whole run fits its devices.

    Args:
      assembly: of the run.
      reports: program -> its report, of all programs of the run's stages.
      topology: what the devices are called.
    """
    devices = assembly.mesh.devices.flatten().tolist()
    kind, parts, limit = find_kind(devices[0].device_kind), assembly.parts(), memory_gib(devices[0].device_kind)
    return Verdict(
        topology=topology,
        mesh=dict(assembly.mesh.shape),
        batch_size=assembly.rows.batch_size,
        parts=parts,
        needs=needs_of(assembly.stages(), parts, reports),
        limit_gib=limit,
        devices_a_host=len(devices) // len({device.process_index for device in devices}),
        host_limit_gib=kind and kind.host_gib,
        default_gib=limit * 0.75 / 0.95 if devices[0].platform == "gpu" else None,
    )

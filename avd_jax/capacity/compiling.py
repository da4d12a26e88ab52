"""Programs compiled ahead of time for devices that are not there: does each fit, and what does it cost.

The TPU compiler is a library that runs on any CPU; what it reports of memory is what the real run will need.
"""

import re
import time
from dataclasses import asdict, dataclass, field

import jax
from jax.sharding import Mesh

from avd_jax.capacity.devices import memory_gib
from avd_jax.capacity.hlo import profile
from avd_jax.capacity.program import Program, expected_flops

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Report:
    """What the compiler says about one program; GiB and cycles are a device's, FLOPs all devices' together.

    Attributes:
      total_gib: arguments, temporaries, results that reuse no argument, and code.
      flops: of one run, the mean over the program's outcomes; see `capacity/flops.py`.
      cycles: the compiler's estimate without attention kernels and collectives.
      collective_gib: kind -> GiB.
      fits: whether it compiled, within the limit.
      error: the compiler's message if memory did not suffice; then only the total is known.
    """

    program: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    argument_gib: float | None
    temporary_gib: float | None
    total_gib: float
    limit_gib: float
    fits: bool
    code_mib: float | None
    flops: float
    cycles: int | None
    collective_gib: dict[str, float] = field(default_factory=dict)
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""

    def as_dict(self) -> dict:
        """Return the report as JSON takes it, rounded."""
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return rounded | {"collective_gib": {kind: round(gib, 3) for kind, gib in self.collective_gib.items()}}

    def as_text(self) -> str:
        """Return the report as a few lines for people."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [f"{self.program} on {self.topology}, mesh {mesh}, batch {self.batch_size}: {verdict}"]
        if self.error:
            return f"{lines[0]}\n  memory      {self.total_gib:.2f} GiB a device of {self.limit_gib:g}\n  {self.error}"
        moved = ", ".join(f"{kind} {gib:.2f}" for kind, gib in self.collective_gib.items()) or "none"
        cycles = f"{self.cycles:,} (without attention kernels and collectives)" if self.cycles else "no estimate"
        lines += [
            f"  memory      {self.total_gib:.2f} GiB a device of {self.limit_gib:g}: "
            f"arguments {self.argument_gib:.2f}, temporaries {self.temporary_gib:.2f}, code {self.code_mib:.0f} MiB",
            f"  work        {self.flops:.3e} FLOPs on all devices; {cycles} cycles a device",
            f"  collectives {moved} (GiB a device)",
            f"  compiled in {self.compile_seconds:.0f} s, after {self.trace_seconds:.0f} s of tracing",
        ]
        return "\n".join(lines)


def compile_program(program: Program, *, mesh: Mesh, batch_size: int, topology: str) -> tuple[Report, str]:
    """Compile a program for the devices of a mesh.

    Args:
      program: sharded over `mesh`.
      mesh: of devices from `tpu_devices`, or of real ones.
      batch_size: of the run, for the report.
      topology: what the devices are called in the report.

    Returns:
      (report, text): and the compiled HLO, empty if memory did not suffice.

    Raises:
      UserError: the program does not fit the mesh, or how much the devices hold is not known.
    """
    device = mesh.devices.flat[0]
    start = time.monotonic()
    traced = program.function.trace(*program.args)
    lowered = traced.lower(lowering_platforms=(device.platform,))
    trace_seconds = time.monotonic() - start
    about = {
        "program": program.name,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "limit_gib": memory_gib(device.device_kind),
        "flops": expected_flops(program, traced=traced),
        "trace_seconds": trace_seconds,
    }
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _does_not_fit(about, error, time.monotonic() - start), ""
    text, seconds = compiled.as_text(), time.monotonic() - start
    trips = 1 if program.dynamic_trips is None else program.dynamic_trips
    memory, found = compiled.memory_analysis(), profile(text, dynamic_trips=trips)
    code = memory.generated_code_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + code) / GIB
    report = Report(
        **about,
        argument_gib=memory.argument_size_in_bytes / GIB,
        temporary_gib=memory.temp_size_in_bytes / GIB,
        total_gib=total,
        fits=total <= about["limit_gib"],
        code_mib=code / MIB,
        cycles=found.cycles or None,
        collective_gib={kind: size / GIB for kind, size in found.collective_bytes.items()},
        compile_seconds=seconds,
    )
    return report, text


def _does_not_fit(about: dict, error: Exception, seconds: float) -> Report:
    text = " ".join(str(error).split())
    used = re.search(r"Used ([\d.]+)([KMGT]) of", text)
    if not used:
        raise error
    total = float(used[1]) * 1024 ** ("KMGT".index(used[2]) - 2)
    unknown = {"argument_gib": None, "temporary_gib": None, "code_mib": None, "cycles": None}
    return Report(**about, **unknown, total_gib=total, fits=False, compile_seconds=seconds, error=text[:300])

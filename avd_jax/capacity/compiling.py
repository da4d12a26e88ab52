"""Programs compiled ahead of time for devices that are not there: does each fit, and what does it cost.

The compilers for TPUs and NVIDIA GPUs are libraries that run on any CPU; what they report of memory is what the real
run will need.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import jax
from jax.sharding import Mesh

from avd_jax.capacity.budget import GIB, part_of, rounded
from avd_jax.capacity.devices import Kind, find_kind, memory_gib
from avd_jax.capacity.hlo import cudnn_workspace, profile
from avd_jax.capacity.program import Program, expected_flops, expected_trips

MIB = 2**20
# A share of the peak that attention kernels, and matrix products of which the compiler has no estimate, reach at Wan's
# sizes: an assumption, the same for all candidates, and no measurement.
EFFICIENCY = 0.5
# Nothing can be tried out without a GPU, so nothing is tuned. Of the two ways to make matrix products, cuBLAS and
# Triton, the former needs more memory on 8 x H100: 12.2 and 11.9 GiB for a step of the 1.3B model, 70.0 and 69.9 of the
# 14B model.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_LOOPS = 6  # that a report lists: those over layers, of forward and backward passes
_GIVEN = r"([\d.]+)([KMGT])"
# In both ways to say it, the arguments are part of the number: that of the second, which speaks of temporaries, is what
# a larger device reports as arguments and temporaries together.
_NEEDED = re.compile(rf"(?:Used |memory required for HLO temporaries \(){_GIVEN}(?: of|\) exceeds)")


@dataclass(frozen=True)
class Report:
    """What the compiler says about one program; GiB, cycles and seconds are a device's, FLOPs all devices' together.

    Attributes:
      temporary_gib: with the workspace of cuDNN's attention, which is not in the compiler's figure.
      total_gib: arguments, temporaries, results that reuse no argument, and code.
      host_gib: what it needs in the pinned memory of one device's host.
      resident_gib, resident_host_gib: how much of both is arguments that a run holds anyway.
      flops: of one run, the mean over the program's outcomes; see `capacity/flops.py`.
      kernel_flops: those of attention kernels.
      cycles: the compiler's estimate without attention kernels and collectives, loops as often as they run.
      assumed_trips: of the loops whose length the compiled text does not say, see `expected_trips`; None without any.
      collective_gib: kind -> GiB.
      loops: million cycles of a trip of the largest loops, those in loops inside them apart.
      seconds: an estimate, see `estimated_seconds`; None if too little is known.
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
    assumed_trips: float | None = None
    kernel_flops: float = 0.0
    host_gib: float = 0.0
    resident_gib: float = 0.0
    resident_host_gib: float = 0.0
    seconds: float | None = None
    collective_gib: dict[str, float] = field(default_factory=dict)
    loops: list[tuple[float, float]] = field(default_factory=list)
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""

    def as_dict(self) -> dict:
        """Return the report as JSON takes it, rounded."""
        return rounded(asdict(self))

    def as_text(self) -> str:
        """Return the report as a few lines for people."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [f"{self.program} on {self.topology}, mesh {mesh}, batch {self.batch_size}: {verdict}"]
        if self.error:
            needed = f"{self.total_gib:.2f} GiB a device of {self.limit_gib:.2f}"
            return f"{lines[0]}\n  memory      {needed}\n  {self.error}"
        moved = ", ".join(f"{kind} {gib:.2f}" for kind, gib in self.collective_gib.items()) or "none"
        cycles = f"{self.cycles:,} cycles" if self.cycles else "no estimate of cycles"
        assumed = f", and {self.assumed_trips:g} trips of loops of unknown length" if self.assumed_trips else ""
        code = f", code {self.code_mib:.0f} MiB" if self.code_mib else ""
        host = f"; {self.host_gib:.2f} GiB of its host's" if self.host_gib else ""
        trips = ", ".join(f"{own:.1f}" + (f" + {inside:.1f}" if inside else "") for own, inside in self.loops)
        lines += [
            f"  memory      {self.total_gib:.2f} GiB a device of {self.limit_gib:.2f}: "
            f"arguments {self.argument_gib:.2f}, temporaries {self.temporary_gib:.2f}{code}{host}",
            f"  work        {self.flops:.3e} FLOPs on all devices, of which attention kernels {self.kernel_flops:.3e}; "
            f"{cycles} a device (without attention kernels and collectives{assumed})",
            *([f"  loops       {trips} (million cycles a trip, + those in loops inside)"] if trips else []),
            f"  collectives {moved} (GiB a device)",
            *([f"  estimate    {self.seconds:.2f} s (docs/pods.md)"] if self.seconds else []),
            f"  compiled in {self.compile_seconds:.0f} s, after {self.trace_seconds:.0f} s of tracing",
        ]
        return "\n".join(lines)


def compile_program(program: Program, *, mesh: Mesh, batch_size: int, topology: str) -> tuple[Report, str]:
    """Compile a program for the devices of a mesh.

    Args:
      program: sharded over `mesh`.
      mesh: of devices from `topology_devices`, or of real ones.
      batch_size: of the run, for the report.
      topology: what the devices are called in the report.

    Returns:
      (report, text): and the compiled HLO, empty if memory did not suffice.

    Raises:
      UserError: the program does not fit the mesh, or how much the devices hold is not known.
    """
    device = mesh.devices.flat[0]
    on_gpu = device.platform in ("gpu", "cuda")
    start = time.monotonic()
    traced = program.function.trace(*program.args)
    lowered = traced.lower(lowering_platforms=("cuda" if on_gpu else device.platform,))
    trace_seconds = time.monotonic() - start
    about = {
        "program": program.name,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "limit_gib": memory_gib(device.device_kind),
        "flops": expected_flops(program, traced=traced),
        "kernel_flops": expected_flops(program, traced=traced, kernels_only=True),
        "trace_seconds": trace_seconds,
    }
    own = part_of("own", [arg for i, arg in enumerate(program.args) if i not in program.resident])
    start = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=_GPU_OPTIONS if on_gpu else None)
    except jax.errors.JaxRuntimeError as error:
        arguments = part_of("arguments", program.args).device_gib
        about |= {"resident_gib": arguments - own.device_gib, "compile_seconds": time.monotonic() - start}
        return _does_not_fit(about, arguments, error), ""
    text, seconds = compiled.as_text(), time.monotonic() - start
    trips = expected_trips(program, traced=traced)
    memory, found = compiled.memory_analysis(), profile(text, dynamic_trips=trips)
    code = memory.generated_code_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes + (cudnn_workspace(text) if on_gpu else 0)
    total = (memory.argument_size_in_bytes + temporary + results + code) / GIB
    on_host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    on_host += memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes
    collectives = {kind: size / GIB for kind, size in found.collective_bytes.items()}
    per_device = {name: about[name] / mesh.size for name in ("flops", "kernel_flops")}
    report = Report(
        **about,
        argument_gib=memory.argument_size_in_bytes / GIB,
        temporary_gib=temporary / GIB,
        total_gib=total,
        host_gib=on_host / GIB,
        # Not all that it is given: arguments that it does not read are not there.
        resident_gib=max(memory.argument_size_in_bytes / GIB - own.device_gib, 0.0),
        resident_host_gib=max(memory.host_argument_size_in_bytes / GIB - own.host_gib, 0.0),
        fits=total <= about["limit_gib"],
        code_mib=code / MIB,
        cycles=found.cycles or None,
        assumed_trips=trips if found.unknown_loops else None,
        collective_gib=collectives,
        loops=[(one.cycles / 1e6, one.cycles_inside / 1e6) for one in found.loops[:_LOOPS] if one.cycles],
        seconds=estimated_seconds(
            find_kind(device.device_kind),
            cycles=found.cycles or None,
            collective_gib=collectives,
            hosts=len({device.process_index for device in mesh.devices.flat}) if on_gpu else 1,
            **per_device,
        ),
        compile_seconds=seconds,
    )
    return report, text


def estimated_seconds(
    kind: Kind | None,
    *,
    flops: float,
    kernel_flops: float,
    cycles: int | None,
    collective_gib: Mapping[str, float],
    hosts: int = 1,
) -> float | None:
    """Return how long a program may take on one device: arithmetic, attention and collectives, one after another.

    It ranks meshes, and is no prediction. Arithmetic is the compiler's cycles over the clock, or, without an estimate
    of cycles (GPUs), matrix products at EFFICIENCY of the peak; attention is at EFFICIENCY of the peak. Collectives
    move their bytes over all links at full speed, over the network between hosts if there are several; an all-reduce
    moves them twice, as the parts of a sum and as the sum. That much of them can run beside the arithmetic is not taken
    into account. None if something is not known.

    Args:
      kind: of the device.
      flops, kernel_flops: of one device, all and those of attention kernels.
      cycles: the compiler's estimate of the rest.
      collective_gib: of one device, by the kind of collective.
      hosts: of GPUs.
    """
    if kind is None or not kind.link_bytes or (cycles and not kind.gigahertz):
        return None
    at_peak = kind.peak_flops * EFFICIENCY
    arithmetic = cycles / (kind.gigahertz * 1e9) if cycles else (flops - kernel_flops) / at_peak
    speed = kind.link_bytes if hosts == 1 else kind.network_bytes
    moved = sum(collective_gib.values()) + collective_gib.get("all-reduce", 0)
    return arithmetic + kernel_flops / at_peak + moved * GIB / speed


def _does_not_fit(about: dict, argument_gib: float, error: Exception) -> Report:
    """Return the report that the compiler's message makes; any other error is raised."""
    text = " ".join(str(error).split())
    if needed := _NEEDED.search(text):
        total = _gib(*needed.groups())
    elif "RESOURCE_EXHAUSTED" in text:
        total = float("inf")  # in words that are not known here
    else:
        raise error
    unknown = {"temporary_gib": None, "code_mib": None, "cycles": None}
    return Report(**about, **unknown, argument_gib=argument_gib, total_gib=total, fits=False, error=text[:300])


def _gib(number: str, unit: str) -> float:
    return float(number) * 1024 ** ("KMGT".index(unit) - 2)

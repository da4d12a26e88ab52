"""The memory of a whole run: what lies on the devices all the time, and what each program needs beside it.

A run has stages. While it trains and while it makes samples, the state and the frozen networks are resident, and each
program adds its temporaries, its results and those of its arguments that are not resident. Encoding and generation hold
nothing but the arguments of the program that runs. The verdict is that of the largest program.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import jax

GIB = 2**30
TRAINING = "training"  # the stage of a run's updates
LESS_MEMORY = (
    "take more devices, or try --config.accumulation_steps=2 or, on TPUs, --config.attention.fused_backward=False"
)


@dataclass(frozen=True)
class Stage:
    """Programs of a run that run in turn, never two at once.

    Attributes:
      name: as it is reported.
      programs: their names.
      beside_the_run: whether what the run holds is resident meanwhile.
    """

    name: str
    programs: tuple[str, ...]
    beside_the_run: bool = True


@dataclass(frozen=True)
class Part:
    """What a run holds all the time, in GiB of each device, and in GiB of a host for each of its devices."""

    name: str
    device_gib: float
    host_gib: float = 0.0


class Compiled(Protocol):
    """What a budget reads of a program's report; see `capacity/compiling.py`."""

    program: str
    total_gib: float
    host_gib: float
    resident_gib: float
    resident_host_gib: float


@dataclass(frozen=True)
class Need:
    """What the devices hold while one program runs, in GiB a device, and in GiB of a host for each of its devices.

    Attributes:
      beside_gib: what is resident.
      program_gib: what the program adds.
    """

    stage: str
    program: str
    beside_gib: float
    program_gib: float
    host_gib: float

    @property
    def total_gib(self) -> float:
        """What the device must have."""
        return self.beside_gib + self.program_gib


@dataclass(frozen=True)
class Verdict:
    """Whether a whole run fits its devices and their hosts.

    Attributes:
      parts: what the run holds.
      needs: of each program in each stage.
      limit_gib: of a device.
      devices_a_host: how many devices share a host.
      host_limit_gib: of a host; None: not known.
      default_gib: what JAX takes of a device if nobody tells it to take more; None: all.
    """

    topology: str
    mesh: Mapping[str, int]
    batch_size: int
    parts: Sequence[Part]
    needs: Sequence[Need]
    limit_gib: float
    devices_a_host: int
    host_limit_gib: float | None = None
    default_gib: float | None = None

    @property
    def largest(self) -> Need:
        """The program that needs most of a device."""
        return max(self.needs, key=lambda need: need.total_gib)

    @property
    def host_gib(self) -> float:
        """What a host holds for all of its devices."""
        return max(need.host_gib for need in self.needs) * self.devices_a_host

    @property
    def fits(self) -> bool:
        """Whether the devices and, as far as that is known, the hosts have enough memory."""
        on_host = self.host_limit_gib is None or self.host_gib <= self.host_limit_gib
        return on_host and self.largest.total_gib <= self.limit_gib

    def as_dict(self) -> dict:
        """Return the verdict as JSON takes it, rounded."""
        found = {
            **{"topology": self.topology, "mesh": dict(self.mesh), "batch_size": self.batch_size, "fits": self.fits},
            **{"total_gib": self.largest.total_gib, "limit_gib": self.limit_gib, "host_gib": self.host_gib},
            **{"host_limit_gib": self.host_limit_gib, "largest": [self.largest.stage, self.largest.program]},
            "resident": [asdict(part) for part in self.parts],
            "needs": [asdict(need) | {"total_gib": need.total_gib} for need in self.needs],
        }
        return {"verdict": rounded(found)}

    def as_text(self) -> str:
        """Return the verdict as a table: what is resident, and what each program adds to it."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        host_limit = "" if self.host_limit_gib is None else f" of {self.host_limit_gib:.0f}"
        lines = [
            f"the whole run on {self.topology}, mesh {mesh}, batch {self.batch_size}: "
            f"{'FITS' if self.fits else 'DOES NOT FIT'}, {_gib(self.largest.total_gib).strip()} GiB a device of "
            f"{self.limit_gib:.2f}, {self.host_gib:.0f} GiB a host{host_limit}",
            "  resident while it trains and samples             GiB a device  GiB a host",
            *(_row(part.name, "", part.device_gib, part.host_gib * self.devices_a_host) for part in self.parts),
            "  needed by each program        resident + program = GiB a device  GiB a host",
        ]
        for need in self.needs:
            mark = "  <- the largest" if need is self.largest else ""
            made_of = f"{need.beside_gib:.2f} + {_gib(need.program_gib).strip()} ="
            name = f"{need.stage}: {need.program}"
            lines.append(_row(name, made_of, need.total_gib, need.host_gib * self.devices_a_host) + mark)
        if self.largest.total_gib > self.limit_gib and self.largest.stage == TRAINING:
            lines.append(f"  {LESS_MEMORY}")
        if self.default_gib is not None and self.fits and self.largest.total_gib > self.default_gib:
            lines.append(
                f"  run it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: else JAX takes {self.default_gib:.1f} GiB"
            )
        return "\n".join(lines)


def part_of(name: str, tree) -> Part:
    """Return what arrays take, from their shapes, dtypes and shardings; arrays without a sharding count whole."""
    sizes = {"device": 0, "host": 0}
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        on_host = sharding is not None and sharding.memory_kind == "pinned_host"
        # A random key's dtype tells its size only once it is opened.
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize
        sizes["host" if on_host else "device"] += math.prod(shape) * itemsize
    return Part(name, sizes["device"] / GIB, sizes["host"] / GIB)


def needs_of(stages: Iterable[Stage], parts: Sequence[Part], reports: Mapping[str, Compiled]) -> list[Need]:
    """Return what each program of each stage needs.

    Args:
      stages: of the run; programs without a report are left out.
      parts: what the run holds.
      reports: program -> what the compiler said.
    """
    found = []
    for stage in stages:
        resident = parts if stage.beside_the_run else ()
        beside = sum(part.device_gib for part in resident)
        for report in (reports[name] for name in stage.programs if name in reports):
            device, host = report.total_gib, report.host_gib
            if stage.beside_the_run:
                device, host = device - report.resident_gib, host - report.resident_host_gib
            on_host = sum(part.host_gib for part in resident) + host
            found.append(Need(stage.name, report.program, beside, device, on_host))
    return found


def rounded(value):
    """Return a tree of JSON's types with its numbers rounded; what is not known, infinity, is None."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    return value


def _gib(value: float) -> str:
    return f"{value:8.2f}" if math.isfinite(value) else "too many"


def _row(name: str, made_of: str, device: float, host: float) -> str:
    on_host = f"{host:10.1f}" if host else " " * 10
    return f"    {name:<34}{made_of:>16}{_gib(device):>10}{on_host}".rstrip()

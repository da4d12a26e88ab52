"""What a compiled program's text tells about its run: bytes in collectives, and the compiler's estimate of cycles.

Reads optimised HLO (`compiled.as_text()`). A loop's body counts as often as it runs, loops inside loops included; see
`avd_jax/capacity/hlo_text.py` for how that is read. Neither figure is a time: Pallas kernels and collectives carry no
estimate, and collectives may run beside other work.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from avd_jax.capacity.hlo_text import INSTRUCTION, Given, Instruction, called_by, loop, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CUDNN_BACKWARD = re.compile(r'custom_call_target="__cudnn\$fmha\w*Backward"')
_FUSED_SCATTER = "all-reduce-scatter"  # the TPU's form: a fusion of an all-reduce and the slice that stays
_NO_ESTIMATE = 1 << 60  # the compiler writes huge numbers if it has none


@dataclass(frozen=True)
class Loop:
    """Cycles of one trip of a loop: its own, and those of the loops inside it."""

    cycles: float
    cycles_inside: float


@dataclass(frozen=True)
class Profile:
    """What `profile` finds, a device.

    Attributes:
      collective_bytes: kind of collective -> bytes, of the larger of what goes in and what comes out.
      cycles: the sum of the compiler's estimates, 0 if it made none.
      unknown_loops: how many loops ran for `dynamic_trips`.
      loops: all of them, the largest trip first.
    """

    collective_bytes: dict[str, int]
    cycles: int
    unknown_loops: int
    loops: tuple[Loop, ...]


def profile(text: str, *, dynamic_trips: float = 1) -> Profile:
    """Return the collectives and cycles of optimised HLO.

    Args:
      text: of the whole module.
      dynamic_trips: how often the body of a loop runs whose length the program does not say.
    """
    computations, entry = parse(text)
    collectives: Counter = Counter()
    unknown, loops = set(), []

    def visit(name: str, times: float, in_fusion: bool, given: Given, channels: set[str]) -> tuple[float, float]:
        """Return the cycles of one run of a computation, its own and those of its loops.

        `channels` are those of the collectives that are counted already: one that runs beside products is in each of
        their fusions.
        """
        own = inside = 0.0
        within = computations.get(name, {})
        for instruction in within.values():
            kind = instruction.operation.removesuffix("-start")
            if kind == "all-reduce" and name.startswith(_FUSED_SCATTER):
                kind = "reduce-scatter"
            if kind in COLLECTIVES:
                channel = _CHANNEL.search(instruction.rest)
                if channel is None or channel[1] not in channels:
                    collectives[kind] += times * _bytes_moved(instruction, within)
                    channels.update(channel.groups() if channel else ())
                continue
            estimate = _CYCLES.search(instruction.rest)
            if estimate and not in_fusion and int(estimate[1]) < _NO_ESTIMATE:
                own += int(estimate[1])
            if instruction.operation == "while":
                known, carried = loop(instruction, computations, within, given)
                trips = dynamic_trips if known is None else known
                if known is None:
                    unknown.add(id(instruction))
                parts = [visit(called, times * trips, in_fusion, carried, set()) for called in called_by(instruction)]
                loops.append(Loop(*(sum(part) for part in zip(*parts, strict=True))))
                inside += trips * (loops[-1].cycles + loops[-1].cycles_inside)
                continue
            # The estimate of a fusion covers what it calls.
            for called in called_by(instruction):
                part = visit(called, times, in_fusion or instruction.operation == "fusion", given, channels)
                own, inside = own + part[0], inside + part[1]
        return own, inside

    cycles = sum(visit(entry, 1, False, {}, set()))
    loops.sort(key=lambda found: -found.cycles - found.cycles_inside)
    moved = {kind: round(size) for kind, size in sorted(collectives.items())}
    return Profile(moved, round(cycles), len(unknown), tuple(loops))


def cudnn_workspace(text: str) -> int:
    """Return the bytes that cuDNN's attention takes for itself on a GPU, which no figure of the compiler contains.

    The backward pass keeps the query's gradient [B S H K] in float32, and a float32 number for each of its rows. What
    the largest of the calls needs is enough: they run one after another. (cuDNN 9; compared with its own plans.)
    """
    found = [0]
    for line in text.splitlines():
        if _CUDNN_BACKWARD.search(line) and (call := INSTRUCTION.match(line)):
            shape = [int(axis) for axis in _ARRAY.findall(call["result"])[0][1].split(",")]
            rows = math.prod(shape) // shape[-1]
            found.append(4 * (math.prod(shape) + rows))
    return max(found)


def _bytes_moved(instruction: Instruction, computation: Mapping[str, Instruction]) -> int:
    operands = [computation[name] for name in instruction.operands if name in computation]
    taken = sum(sum(_array_bytes(operand.result)) for operand in operands)
    given = _array_bytes(instruction.result)
    # An asynchronous start returns its operands beside its results.
    made = sum(given) - taken if instruction.operation.endswith("-start") and sum(given) > taken else sum(given)
    return max(taken, made)


def _array_bytes(shape: str) -> list[int]:
    sizes = []
    for dtype, axes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        sizes.append(bits * math.prod(int(axis) for axis in axes.split(",") if axis) // 8)
    return sizes

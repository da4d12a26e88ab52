"""What the TPU attention kernels cost by the compiler's schedule, and which suits a TPU; no TPU is needed.

A kernel is compiled with the compiler's own dumps switched on, and its instruction bundles are counted: one takes a
cycle. Counted is the schedule in which empty bundles still stand for waiting (`packed-bundles-post-ra`), so a product
never looks faster than the matrix units are. What stands in a loop counts as often as the loop runs, and what runs
once a row of the grid counts once a row. Not in it: waiting for memory and for instructions.
"""

import math
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.capacity.devices import Kind, find_kind
from avd_jax.models import pipelined
from avd_jax.models.attention import attention
from avd_jax.models.placement import AttentionBlocks, Placement
from avd_jax.parallel.topology import tpu_devices

_KERNELS = {
    pipelined.NAME: "forward",
    "splash_mha_fwd": "forward",
    "splash_mha_dkv": "backward",
    "splash_mha_dq": "backward",
}
_ROW = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:( >*)\s*\{(.*)")
_BRANCH = re.compile(r"sbr\.rel.*?bundleno = (\d+)")
_DELAY_SLOTS = 5  # bundles that run whether a branch is taken or not


@dataclass(frozen=True)
class Estimate:
    """What the compiler made of one candidate.

    Attributes:
      kernel: of the forward pass.
      blocks: the candidate.
      milliseconds: direction ('forward', 'backward') -> bundles over clock.
      limits: likewise, what the products alone take at the device's peak.
      memory_gib: temporaries of forward and backward pass together.
      error: why it did not compile, on one line; then the rest is empty.
    """

    kernel: str
    blocks: AttentionBlocks
    milliseconds: dict[str, float]
    limits: dict[str, float]
    memory_gib: float = 0.0
    error: str = ""

    def as_dict(self) -> dict:
        """Return the estimate as JSON takes it, rounded: each direction in ms and as a ratio to its limit."""
        forward = self.blocks.pipelined if self.kernel == "pipelined" else self.blocks.forward
        about = {
            "kernel": self.kernel,
            "forward_blocks": list(forward),
            "backward_blocks": list(self.blocks.backward),
            "fused_backward": self.blocks.fused_backward,
        }
        if self.error:
            return about | {"error": self.error}
        directions = {
            name: {"ms": round(value, 2), "ratio": round(value / self.limits[name], 3)}
            for name, value in self.milliseconds.items()
        }
        return about | directions | {"memory_gib": round(self.memory_gib, 2)}


def estimate(
    topology: str, kernel: str, blocks: AttentionBlocks, *, heads: int, tokens: int, head_dim: int = 128
) -> Estimate:
    """Compile forward and backward pass of one device's self-attention for a TPU and return what it takes.

    Args:
      topology: a slice of the TPU in question, as for `tpu_devices`.
      kernel: of the forward pass, 'pipelined' or 'splash'.
      blocks: the candidate.
      heads: on the device, that is the model's over `mesh.seq`.
      tokens: of the whole sequence.
      head_dim: width of a head.
    """
    # The dumps are switched on when libtpu is loaded, so every candidate has a process of its own.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_estimate, topology, kernel, blocks, heads, tokens, head_dim).result()


def _estimate(topology: str, kernel: str, blocks: AttentionBlocks, heads: int, tokens: int, head_dim: int) -> Estimate:
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
        device = tpu_devices(topology)[0]
        placement = Placement(kernel, blocks=blocks)
        padded = placement.padded_tokens(tokens, jnp.bfloat16)
        sharding = NamedSharding(Mesh([device], ("one",)), PartitionSpec())
        array = jax.ShapeDtypeStruct((1, heads, padded, head_dim), jnp.bfloat16, sharding=sharding)

        def loss(*arrays):
            return jnp.sum(attention(*arrays, placement=placement, valid_keys=tokens).astype(jnp.float32))

        try:
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
        except jax.errors.JaxRuntimeError as error:
            return Estimate(kernel, blocks, {}, {}, error=" ".join(str(error).split())[:160])
        kind = find_kind(device.device_kind)
        found = dict.fromkeys(("forward", "backward"), 0.0)
        for path in sorted(Path(folder).glob("*-packed-bundles-post-ra.txt")):
            for name, direction in _KERNELS.items():
                if name in path.name:
                    runs = _runs(name, blocks, heads=heads, tokens=tokens, padded=padded, head_dim=head_dim)
                    bundles = count_bundles(path.read_text(), runs)
                    found[direction] += bundles / (kind.gigahertz * 1e6) / kind.cores
        if not all(found.values()):  # a new compiler may name its dumps otherwise
            return Estimate(
                kernel, blocks, {}, {}, error=f"the compiler's dumps hold no kernel of {', '.join(_KERNELS)}"
            )
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
        return Estimate(kernel, blocks, found, _limits(kind, heads, padded, head_dim), memory)


def _limits(kind: Kind, heads: int, tokens: int, head_dim: int) -> dict[str, float]:
    """Return the milliseconds of the products at the peak: two forward, and five backward, one of them made again."""
    product = 2 * heads * tokens**2 * head_dim / kind.peak_flops * 1e3
    return {"forward": 2 * product, "backward": 5 * product}


@dataclass(frozen=True)
class Runs:
    """How often the parts of a kernel run.

    Attributes:
      cells: of the grid.
      rows: of the grid, after which results are written; a row is the cells that add to one result.
      trips: of the loop within a cell, if there is one.
    """

    cells: int
    rows: int
    trips: int = 1


def _runs(name: str, blocks: AttentionBlocks, *, heads: int, tokens: int, padded: int, head_dim: int) -> Runs:
    if name == pipelined.NAME:
        _, chunks, parts = pipelined.cut_keys(tokens, blocks.pipelined[1], head_dim, jnp.bfloat16)
        rows = heads * math.ceil(padded / blocks.pipelined[0])
        return Runs(rows * parts, rows, pipelined.loop_trips(chunks))
    queries, keys, _ = blocks.forward if _KERNELS[name] == "forward" else blocks.backward
    queries, keys = (math.ceil(padded / min(size, padded)) for size in (queries, keys))
    return Runs(heads * queries * keys, heads * (keys if name == "splash_mha_dkv" else queries))


def count_bundles(schedule: str, runs: Runs) -> int:
    """Return how many bundles a kernel runs, waiting included.

    The grid is a loop, and a loop within the kernel is one in that. What a branch jumps over without a matrix product
    in it begins or ends a row.

    Args:
      schedule: text of a `packed-bundles-post-ra` dump.
      runs: how often its parts run.
    """
    labels, depths, texts = [], [], []
    for line in schedule.splitlines():
        if found := _ROW.match(line):
            labels.append(found[1])
            depths.append(found[2].count(">"))
            texts.append(found[3])
        elif texts:
            texts[-1] += line
    size = len(texts)
    jumps = [(i, int(target[1])) for i, text in enumerate(texts) for target in [_BRANCH.search(text)] if target]
    cuts = {0, size, *(i for i, label in enumerate(labels) if label)}
    for source, target in jumps:
        cuts |= {min(target, size), min(source + _DELAY_SLOTS, size)}
    products = ["vmatmul" in text for text in texts]
    optional = [(start, end) for start, end in jumps if start < end and not any(products[start + _DELAY_SLOTS : end])]
    total = 0
    for start, end in pairwise(sorted(cuts)):
        depth = max(depths[start:end])
        if depth == 0:
            times = 1
        elif depth == 1 and any(source < start and end <= target for source, target in optional):
            times = runs.rows
        else:
            times = runs.cells * (runs.trips if depth > 1 else 1)
        total += (end - start) * times
    return total

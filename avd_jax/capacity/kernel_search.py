"""Which block sizes suit the splash kernel on a TPU, by what the compiler schedules; no TPU is needed.

A kernel is compiled with the compiler's own dumps switched on, and the instruction bundles of one cell of its grid are
read from them. One bundle takes about a cycle, so bundles times cells rank the candidates. It is no time: waiting for
memory is not in it.
"""

import math
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.capacity.devices import find_kind
from avd_jax.models.attention import attention
from avd_jax.models.placement import Placement, SplashBlocks
from avd_jax.parallel.topology import tpu_devices

_KERNELS = {"fwd": "forward", "dkv": "backward", "dq": "backward"}


@dataclass(frozen=True)
class Estimate:
    """What the compiler made of one candidate.

    Attributes:
      blocks: the candidate.
      milliseconds: kernel ('fwd', 'dkv', 'dq') -> bundles over clock.
      memory_gib: temporaries of forward and backward pass together.
      error: why it did not compile, on one line; then the rest is empty.
    """

    blocks: SplashBlocks
    milliseconds: dict[str, float]
    memory_gib: float = 0.0
    error: str = ""

    @property
    def total(self) -> float:
        """Milliseconds of all kernels; infinite if it did not compile."""
        return math.inf if self.error else sum(self.milliseconds.values())


def estimate(topology: str, blocks: SplashBlocks, *, heads: int, tokens: int, head_dim: int = 128) -> Estimate:
    """Compile forward and backward pass of one device's self-attention for a TPU and return what it takes.

    Args:
      topology: a slice of the TPU in question, as for `tpu_devices`.
      blocks: the candidate.
      heads: on the device, that is the model's over `mesh.seq`.
      tokens: of the whole sequence.
      head_dim: width of a head.
    """
    # The dumps are switched on when libtpu is loaded, so every candidate has a process of its own.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_estimate, topology, blocks, heads, tokens, head_dim).result()


def _estimate(topology: str, blocks: SplashBlocks, heads: int, tokens: int, head_dim: int) -> Estimate:
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
        device = tpu_devices(topology)[0]
        placement = Placement("splash", blocks=blocks)
        padded = placement.padded_tokens(tokens, jnp.bfloat16)
        sharding = NamedSharding(Mesh([device], ("one",)), PartitionSpec())
        array = jax.ShapeDtypeStruct((1, heads, padded, head_dim), jnp.bfloat16, sharding=sharding)

        def loss(*arrays):
            return jnp.sum(attention(*arrays, placement=placement, valid_keys=tokens).astype(jnp.float32))

        try:
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
        except jax.errors.JaxRuntimeError as error:
            return Estimate(blocks, {}, error=" ".join(str(error).split())[:160])
        kind = find_kind(device.device_kind)
        found = {}
        for path in Path(folder).glob("*schedule-analysis_final_bundles*"):
            kernel = re.search(r"splash_mha_(fwd|dkv|dq)", path.name)
            bundles = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            if kernel and bundles:
                queries, keys, _ = getattr(blocks, _KERNELS[kernel[1]])
                cells = heads * (padded // min(queries, padded)) * (padded // min(keys, padded))
                found[kernel[1]] = int(bundles[1]) * cells / (kind.gigahertz * 1e6) / kind.cores
        return Estimate(blocks, found, compiled.memory_analysis().temp_size_in_bytes / 2**30)

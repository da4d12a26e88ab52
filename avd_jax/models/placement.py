"""Where a network runs: the devices that share its batch and its tokens, and the attention kernel that serves them.

A network holds one `Placement` as a static part of its graph. The default is one device and the kernel that suits it.
"""

import math
import re
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.errors import UserError, closest

TPU_KERNELS = ("pipelined", "splash")
KERNELS = ("auto", *TPU_KERNELS, "cudnn", "xla")
LANES = 128  # of a TPU's vector registers; the splash kernel's blocks are multiples of it


_SMALL_VMEM = re.compile(r"TPU v[234]")  # 16 MiB a core


def has_large_vmem(device: jax.Device) -> bool:
    """Whether a device is a TPU whose vector memory has room for kernels that keep much of their input there."""
    return device.platform == "tpu" and not _SMALL_VMEM.search(device.device_kind)


@dataclass(frozen=True)
class AttentionBlocks:
    """Block sizes of the TPU kernels; `scripts/tune_attention.py` ranks them.

    Attributes:
      forward: of splash: queries, keys, and keys at a time within a block of keys.
      pipelined: of the pipelined forward kernel: queries, and keys at a time.
      backward: of splash's backward kernel, which both use: as `forward`.
      fused_backward: one kernel for all three gradients, which needs memory for the partial sums of the query's
        gradient, instead of two kernels that both compute the scores.
    """

    forward: tuple[int, int, int] = (1024, 2048, 512)
    pipelined: tuple[int, int] = (1024, 1024)
    backward: tuple[int, int, int] = (1024, 2048, 512)
    fused_backward: bool = True

    def __post_init__(self):
        for name in ("forward", "backward"):
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            if len(sizes) != 3 or any(size < LANES or size % LANES for size in sizes) or sizes[1] % sizes[2]:
                raise UserError(
                    f"attention.{name}_blocks={sizes} must be three multiples of {LANES} (queries, keys, keys at a "
                    "time), the second a multiple of the third"
                )
        object.__setattr__(self, "pipelined", tuple(self.pipelined))
        if len(self.pipelined) != 2 or any(size < LANES or size % LANES for size in self.pipelined):
            raise UserError(
                f"attention.pipelined_blocks={self.pipelined} must be two multiples of {LANES} (queries, keys at a "
                "time)"
            )


@dataclass(frozen=True)
class Placement:
    """How a network's work is shared out.

    Attributes:
      kernel: one of KERNELS; 'auto' takes the pipelined kernel on TPU, splash up to v4, cuDNN for half
        precision on CUDA, XLA elsewhere.
      mesh: of the devices, or None for one.
      batch_axes: mesh axes that share the batch.
      sequence_axis: mesh axis that shares the tokens, and within attention the heads (Ulysses), or None.
      blocks: of the TPU kernels.
      tangents: whether `jax.jvp` is to go through attention, which is plain JAX then (`models/tangents.py`); no
        gradient does.
    """

    kernel: str = "auto"
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    sequence_axis: str | None = None
    blocks: AttentionBlocks = AttentionBlocks()
    tangents: bool = False

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise UserError(
                f"attention.kernel={self.kernel!r} must be one of {', '.join(KERNELS)}{closest(self.kernel, KERNELS)}"
            )

    @property
    def sequence_shards(self) -> int:
        """Into how many parts the tokens are cut."""
        return self.mesh.shape[self.sequence_axis] if self.mesh is not None and self.sequence_axis else 1

    @property
    def device(self) -> jax.Device:
        """One of the devices; they are alike."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def on_tpu(self) -> bool:
        """Whether they are TPUs, where layers take the forms that suit matrix units."""
        return self.device.platform == "tpu"

    def kernel_for(self, dtype) -> str:
        """Return the kernel that serves arrays of `dtype`; never 'auto'."""
        if self.kernel != "auto":
            return self.kernel
        device = self.device
        if device.platform == "tpu":
            return "pipelined" if has_large_vmem(device) else "splash"
        half_precision = dtype in (jax.numpy.bfloat16, jax.numpy.float16)
        return "cudnn" if device.platform in ("gpu", "cuda") and half_precision else "xla"

    def padded_tokens(self, tokens: int, dtype) -> int:
        """Return to how many tokens a sequence of `tokens` is padded so that shards and kernel blocks divide it."""
        multiple, kernel = self.sequence_shards, self.kernel_for(dtype)
        if kernel == "cudnn":
            multiple *= 2  # it refuses an odd number of tokens on a device
        elif kernel in TPU_KERNELS:
            # Whole tiles on every device, and whole blocks of queries and keys once the shards are put together.
            forward = self.blocks.pipelined if kernel == "pipelined" else self.blocks.forward[:2]
            sizes = (*forward, *self.blocks.backward[:2])
            blocks = math.lcm(*sizes) if tokens > max(sizes) else LANES
            multiple = math.lcm(blocks, LANES * multiple)
        return -(-tokens // multiple) * multiple

    def spec(self, batch: int, *axes: str | None) -> PartitionSpec:
        """Return the spec of an array whose leading axis is the batch.

        A batch that the mesh does not divide is held whole by every shard.
        """
        shards = math.prod(self.mesh.shape[axis] for axis in self.batch_axes)
        return PartitionSpec(None if batch % shards else self.batch_axes, *axes)

    def constrain(self, x: jax.Array) -> jax.Array:
        """Return tokens [B N D] shared out by batch and tokens."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(x.shape[0], self.sequence_axis)))


def fetched(tree):
    """Return a tree with those of its arrays on the device that wait in the host's memory; within a program."""

    def on_device(leaf: jax.Array) -> jax.Array:
        in_host_memory = jax.typeof(leaf).memory_space == jax.memory.Space.Host
        return jax.device_put(leaf, jax.memory.Space.Device) if in_host_memory else leaf

    return jax.tree.map(on_device, tree)

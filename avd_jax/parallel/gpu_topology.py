"""NVIDIA GPUs that are not there, as devices to compile for: XLA's CUDA compiler needs neither GPU nor driver.

What the compiler would ask a GPU is told by a description, XLA's `GpuTargetConfigProto` as text. The numbers of a GPU
are those of XLA's own `xla/backends/gpu/target_config/specs`; L40S and RTX 4090 are from CUDA's deviceQuery.
"""

import importlib.util
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from avd_jax.errors import UserError, closest

MOST_ON_A_HOST = 8
_MODULES = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13")  # of the wheels in pyproject.toml's extra
_WHEELS = '"jax-cuda13-plugin=={0}" "jax-cuda13-pjrt=={0}" "nvidia-cuda-nvcc>=13"'
_CUDNN = (9, 23, 2)  # that is assumed to be on the machine


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks of a GPU.

    Attributes:
      name: as the driver gives it.
      capability: CUDA's compute capability.
      accelerated: whether it has instructions of this capability alone (sm_90a).
      cores: streaming multiprocessors.
      fpus: float32 units of each.
      threads: that each can hold.
      shared_memory: bytes of each; a block can have 1,024 fewer.
      l2_cache: bytes.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      gigahertz: highest clock.
      links: of NVLink.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    fpus: int
    threads: int
    shared_memory: int
    l2_cache: int
    memory: int
    bandwidth: int
    gigahertz: float
    links: int


_HOPPER = {
    **{"capability": (9, 0), "accelerated": True, "cores": 132, "fpus": 128, "threads": 2048, "links": 18},
    **{"shared_memory": 233472, "l2_cache": 52428800, "gigahertz": 1.98},
}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=84942979072, bandwidth=3352320000000, **_HOPPER),
    "h200": Gpu("NVIDIA H200", memory=151397597184, bandwidth=4800000000000, **_HOPPER),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        **{"capability": (8, 0), "accelerated": False, "cores": 108, "fpus": 64, "threads": 2048, "links": 12},
        **{"shared_memory": 167936, "l2_cache": 41943040, "gigahertz": 1.41},
        **{"memory": 85100068864, "bandwidth": 2039040000000},
    ),
    "l40s": Gpu(
        "NVIDIA L40S",
        **{"capability": (8, 9), "accelerated": False, "cores": 142, "fpus": 128, "threads": 1536, "links": 0},
        **{"shared_memory": 102400, "l2_cache": 100663296, "gigahertz": 2.52},
        **{"memory": 47803596800, "bandwidth": 864000000000},
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090",
        **{"capability": (8, 9), "accelerated": False, "cores": 128, "fpus": 128, "threads": 1536, "links": 0},
        **{"shared_memory": 102400, "l2_cache": 75497472, "gigahertz": 2.52},
        **{"memory": 25393692672, "bandwidth": 1008096000000},
    ),
}


def gpu_devices(topology: str) -> list[jax.Device]:
    """Return the devices of one host of GPUs, 'h100:8', or of several, 'h100:2x8'; they can be compiled for, no more.

    Raises:
      UserError: there are no such GPUs, or the compiler's wheels are missing.
    """
    gpu, hosts, on_each = _parsed(topology)
    if not all(map(_is_installed, _MODULES)):
        raise UserError(
            f"--topology {topology}: the compiler for GPUs is missing; it needs no GPU and comes with pip install "
            f"{_WHEELS.format(jax.__version__)}"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler warns of what the report says anyway
    _answer_for(gpu)
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{on_each}", target_config=_description(gpu)
        )
    except Exception as error:  # whatever the plugin raises, its text is all that tells
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"the compiler for GPUs cannot be loaded ({text}); it must be of the version of jax: pip install "
            f"{_WHEELS.format(jax.__version__)}"
        ) from error
    return found.devices


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would be in
        return False


def _parsed(topology: str) -> tuple[Gpu, int, int]:
    kind, _, shape = topology.partition(":")
    sizes = re.fullmatch(r"(?:(\d+)x)?(\d+)", shape)
    wrong = f"--topology {topology}: there are no such GPUs"
    if kind not in GPUS:
        raise UserError(f"{wrong}; name one of {', '.join(GPUS)}{closest(kind, GPUS)}, such as h100:8")
    if not sizes or not int(sizes[1] or 1) * int(sizes[2]):
        raise UserError(f"{wrong}; there are {kind}:1, {kind}:8, and of several hosts {kind}:2x8, ...")
    hosts, on_each = int(sizes[1] or 1), int(sizes[2])
    if on_each > MOST_ON_A_HOST:
        raise UserError(
            f"{wrong}: a host has {MOST_ON_A_HOST} at most; write hosts x GPUs, such as "
            f"{kind}:{-(-on_each // MOST_ON_A_HOST)}x{MOST_ON_A_HOST}"
        )
    return GPUS[kind], hosts, on_each


def _answer_for(gpu: Gpu) -> None:
    """Let JAX see this GPU for the rest of the process: its checks of cuDNN and of memories would ask a real one."""
    import jax._src.cudnn.fused_attention_stablehlo as cudnn  # of no published module; only this needs them
    from jax._src.interpreters import pxla

    cudnn.check_compute_capability = lambda least: gpu.capability >= tuple(map(int, least.split(".")))
    cudnn.is_cuda_compute_capability_equal = lambda wanted: gpu.capability == tuple(map(int, wanted.split(".")))
    cudnn.check_cudnn_version = lambda: _CUDNN[0] * 10000 + _CUDNN[1] * 100 + _CUDNN[2]

    NamedSharding.with_memory_kind = lambda self, kind: _InHostMemory.of(self) if kind == "pinned_host" else self
    # It compares memories with what the compiled program says of its own, which is nothing here.
    pxla._maybe_get_and_check_out_shardings = lambda executable, out_shardings, *_, **__: out_shardings


class _InHostMemory(NamedSharding):
    """A sharding in the host's pinned memory. JAX drops the memory of one whose devices cannot be asked for theirs."""

    memory_kind = property(lambda self: "pinned_host")

    @classmethod
    def of(cls, sharding: NamedSharding) -> "_InHostMemory":
        return cls(sharding.mesh, sharding.spec)

    def update(self, **changes) -> NamedSharding:
        elsewhere = changes.pop("memory_kind", "pinned_host") != "pinned_host"
        changed = super().update(**changes, memory_kind=None)
        return changed if elsewhere else self.of(changed)

    def __hash__(self):
        return hash((super().__hash__(), self.memory_kind))

    def __eq__(self, other):
        return isinstance(other, _InHostMemory) and super().__eq__(other)


def _description(gpu: Gpu) -> str:
    """Return what XLA would learn of the GPU from its driver, as a text of a `GpuTargetConfigProto`."""
    major, minor = gpu.capability
    version = dict(zip(("major", "minor", "patch"), _CUDNN, strict=True))
    facts = {
        **{"threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": gpu.threads},
        **{"shared_memory_per_block": 49152, "shared_memory_per_block_optin": gpu.shared_memory - 1024},
        **{"shared_memory_per_core": gpu.shared_memory, "core_count": gpu.cores, "fpus_per_core": gpu.fpus},
        **{"block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535},
        **{"thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64},
        **{"registers_per_core_limit": 65536, "registers_per_block_limit": 65536, "device_address_bits": 64},
        **{"memory_bandwidth": gpu.bandwidth, "l2_cache_size": gpu.l2_cache, "clock_rate_ghz": gpu.gigahertz},
        **{"device_memory_size": gpu.memory, "pcie_bandwidth": 2**35, "ecc_enabled": "true"},
        **{"name": f'"{gpu.name}"', "device_vendor": '"NVIDIA Corporation"'},
        **{name: '"13.0.0"' for name in ("driver_version", "runtime_version", "compile_time_toolkit_version")},
        "dnn_version": f'"{".".join(map(str, _CUDNN))}"',
        "cuda_compute_capability": _message(
            {
                **({"major": major, "minor": minor} if minor else {"major": major}),
                "feature_extension": "ACCELERATED_FEATURES" if gpu.accelerated else "NONE",
            }
        ),
        "device_interconnect_info": _message({"active_links": gpu.links}),
    }
    whole = {
        **{"gpu_device_info": _message(facts), "platform_name": '"CUDA"', "dnn_version_info": _message(version)},
        **{"runtime_version": _message({"major": 13}), "device_description_str": f'"{gpu.name}"'},
    }
    return _message(whole)[1:-1]


def _message(fields: dict) -> str:
    return "{" + " ".join(f"{name}: {value}" for name, value in fields.items()) + "}"

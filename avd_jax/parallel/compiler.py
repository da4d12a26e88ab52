"""What the compiler is told: options for each platform, as far as it knows them, and where it keeps programs."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from avd_jax.models.placement import has_large_vmem
from avd_jax.parallel.mesh import replicated
from avd_jax.paths import user_cache

# Of a platform, and of TPUs with large vector memory. Most let collectives run beside the arithmetic that does not need
# them.
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        # Else each product with a sharded weight becomes a loop over shards, a few columns at a time, which fill a
        # quarter of the matrix units.
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
        "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    },
    "large_vmem": {
        # 24 MiB instead of 16 for a fusion: tiles are larger, and so products of a layer do not wait for the memory.
        "xla_tpu_scoped_vmem_limit_kib": 24 * 1024,
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
}
EFFORT_O1 = 19  # a value of XLA's ExecutionOptions.EffortLevel


def compiler_options(mesh: Mesh, wanted: Mapping[str, Mapping[str, object]] = OPTIONS) -> dict[str, object]:
    """Return the options for programs on a mesh, for `jax.jit(compiler_options=...)`.

    An option that the installed compiler does not know is left out: it comes and goes with libtpu's and XLA's versions,
    and as a flag in the environment it would end the process.

    Args:
      mesh: of devices that are here, or of a topology that is compiled for ahead of time.
      wanted: option -> value for each platform, "tpu", "gpu" or "cpu", and for "large_vmem".
    """
    options = options_of(mesh.devices.flat[0], wanted)
    return {name: value for name, value in options.items() if _is_known(mesh, name, value)}


def options_of(device: jax.Device, wanted: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Return the wanted options for a device, known to its compiler or not."""
    return {**wanted.get(device.platform, {}), **(wanted.get("large_vmem", {}) if has_large_vmem(device) else {})}


def convolution_options(platform: str | None = None) -> dict[str, object]:
    """Return the options for programs that are mostly convolutions, on a platform or on the default one.

    On TPUs most of the search for a faster form of each convolution is left out: with all of it the VAE at 480x832
    takes five times as long to compile and three times the code, for 28 % fewer estimated cycles.
    """
    return {"optimization_level": EFFORT_O1} if (platform or jax.default_backend()) == "tpu" else {}


@functools.cache
def _is_known(mesh: Mesh, name: str, value: object) -> bool:
    """Return whether the compiler takes an option, tried on the smallest of programs."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    try:
        jax.jit(jnp.negative, compiler_options={name: value}).lower(scalar).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_programs(folder: Path | None = None) -> None:
    """Keep compiled programs, so that a resumed run, or the same command again, does not compile.

    `JAX_COMPILATION_CACHE_DIR` names another folder. Programs for a CPU are not kept: they fit this machine only, and
    the next one may be another. To be called once hosts have joined, since it asks which devices there are.

    Args:
      folder: where; None: in the user's cache.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        folder = user_cache() / "programs" if folder is None else folder
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))

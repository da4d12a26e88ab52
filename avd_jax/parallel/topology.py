"""Devices that are not there, to compile for: TPU slices, whose compiler, libtpu, runs on any CPU, and GPUs."""

import os
import re

import jax
from jax.experimental import topologies

from avd_jax.errors import UserError, closest
from avd_jax.parallel.gpu_topology import GPUS, gpu_devices

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_SHAPES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}  # examples of each generation's slices


def topology_devices(topology: str, *, slices: int = 1) -> list[jax.Device]:
    """Return the devices of a TPU slice, such as 'v5e:4x4', or of hosts of GPUs, such as 'h100:8' or 'h100:2x8'.

    They can be compiled for, no more. From then on this process uses its CPU for everything else.

    Args:
      topology: as above.
      slices: so many such TPU slices.

    Raises:
      UserError: there are no such devices, or their compiler is missing.
    """
    kind = re.split(r"[:\-]", topology)[0]
    if kind in GPUS:
        if slices > 1:
            raise UserError(f"--slices {slices}: GPUs have none; write {kind}:HOSTSxGPUS, such as {kind}:{slices}x8")
        jax.config.update("jax_platforms", "cpu")
        return gpu_devices(topology)
    return tpu_devices(topology, slices=slices)


def tpu_devices(topology: str, *, slices: int = 1) -> list[jax.Device]:
    """Return the devices of a TPU slice, such as 'v5e:4x4', or of several; they can be compiled for, no more.

    From then on this process uses its CPU for everything else.

    Raises:
      UserError: there is no such slice, or libtpu cannot be loaded.
    """
    # Libtpu is not to look for a TPU, nor to be the only one: compiling holds no device.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    _check_name(topology)
    jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # as JAX runs it: a chip's two cores are one device
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:  # whatever the library raises, its text is all that tells
        text = " ".join(str(error).split())
        if "lockfile" in text or "already in use" in text:
            raise UserError(
                "libtpu is locked by another process; end that one, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from error
        if "INVALID_ARGUMENT" in text:
            raise UserError(f"--topology {topology}: there is no such slice; {_examples(topology)}") from error
        raise UserError(
            f'libtpu, the TPU compiler, cannot be loaded ({text[:200]}); pip install "jax[tpu]" brings it'
        ) from error


def _check_name(topology: str) -> None:
    generation, _, shape = topology.partition(":")
    if generation in GPUS:
        raise UserError(
            f"--topology {topology}: these are GPUs; name a TPU slice like v5e:2x2, of {', '.join(_SHAPES)}"
        )
    if generation not in _SHAPES or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology {topology}: there is no such slice; {_examples(topology)}")


def _examples(topology: str) -> str:
    generation = re.split(r"[:\-]", topology)[0]
    if generation not in _SHAPES:
        known = (*_SHAPES, *GPUS)
        return f"name one like v5e:4x4, v5p:2x2x4 or h100:8, of {', '.join(known)}{closest(generation, known)}"
    return "there are " + ", ".join(f"{generation}:{shape}" for shape in _SHAPES[generation]) + ", ..."

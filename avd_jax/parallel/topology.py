"""TPU slices that are not there, as devices to compile for: libtpu, the TPU's compiler, runs on any CPU."""

import os
import re

import jax
from jax.experimental import topologies

from avd_jax.errors import UserError, closest

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_SHAPES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}  # examples of each generation's slices


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
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **several).devices
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
    if generation not in _SHAPES or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology {topology}: there is no such slice; {_examples(topology)}")


def _examples(topology: str) -> str:
    generation = re.split(r"[:\-]", topology)[0]
    if generation not in _SHAPES:
        return f"name one like v5e:4x4 or v5p:2x2x4, of {', '.join(_SHAPES)}{closest(generation, _SHAPES)}"
    return "there are " + ", ".join(f"{generation}:{shape}" for shape in _SHAPES[generation]) + ", ..."

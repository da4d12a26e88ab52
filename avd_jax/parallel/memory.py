"""Which of a device's memories an array waits in, its own or its host's; and what to say if none is large enough."""

import contextlib
import re
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from avd_jax.errors import UserError
from avd_jax.parallel.rules import spec_for

MEMORIES = {"device": "device", "host": "pinned_host"}
# Kernels stacked along a layer axis, over which the model scans. All else is small, and libtpu cannot cut single biases
# of bfloat16 out of the host's memory.
_LAYERS = re.compile(r"^blocks\..*\.kernel$")

_EXHAUSTED = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh, *, memory: str = "device") -> NamedSharding:
    """Return the sharding of a parameter of a transformer.

    Args:
      path: dotted, from the model's root.
      shape: of the parameter.
      mesh: see `spec_for`, and for the errors.
      memory: where the layers' kernels wait, a key of MEMORIES; everything else is always on the device.
    """
    sharding = NamedSharding(mesh, spec_for(path, shape, mesh))
    return sharding.with_memory_kind(MEMORIES[memory]) if _LAYERS.match(path) else sharding


def is_exhausted(error: Exception) -> bool:
    """Return whether a backend's error says that no memory is left."""
    return isinstance(error, MemoryError) or bool(_EXHAUSTED.search(" ".join(str(error).split())[:200]))


def waiting(shapes, shardings, memory: str):
    """Return shardings that let the large arrays of a tree wait in a memory, a key of MEMORIES: all but vectors."""
    return jax.tree.map(
        lambda leaf, sharding: sharding.with_memory_kind(MEMORIES[memory]) if leaf.ndim > 1 else sharding,
        shapes,
        shardings,
    )


@contextlib.contextmanager
def fitting(what: str, hint: str, mesh: Mesh | None = None) -> Iterator[None]:
    """Turn the backend's report that it has no memory left into a UserError, and so its other failures.

    Args:
      what: is computed, with its size.
      hint: what to change.
      mesh: of the devices; None for the default one.

    Raises:
      UserError: it does not fit, or the backend failed; it does not always say that memory is the reason.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
        place, text = f"{len(devices)} x {devices[0].device_kind}", " ".join(str(error).split())[:200]
        if is_exhausted(error):
            raise UserError(f"{what}: does not fit into the memory of {place}; {hint}") from error
        raise UserError(f"{what}: failed on {place} ({text}), likely for want of memory; {hint}") from error

"""Which of a device's memories a parameter waits in: its own, or its host's, from which layers come one at a time."""

import re

from jax.sharding import Mesh, NamedSharding

from avd_jax.parallel.rules import spec_for

MEMORIES = {"device": "device", "host": "pinned_host"}
# Kernels stacked along a layer axis, over which the model scans. All else is small, and libtpu cannot cut single biases
# of bfloat16 out of the host's memory.
_LAYERS = re.compile(r"^blocks\..*\.kernel$")


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

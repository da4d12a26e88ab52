"""A transformer read into 8 bits (`models/low_bit.py`), leaf by leaf: the wide weights are never on the device."""

import jax
import numpy as np
from flax import nnx

from avd_jax.convert.state import flat_state, from_flat
from avd_jax.convert.weights import Sharding, Weights
from avd_jax.models.low_bit import low_bit, rounded
from avd_jax.models.wan_dit import WanDiT


def load_low_bit(weights: Weights, dtype, kind: str, sharding: Sharding) -> WanDiT:
    """Load a transformer whose blocks' kernels are in 8 bits.

    Args:
      weights: opened.
      dtype: of the computation, in which they are read before they are rounded.
      kind: "int8" or "fp8".
      sharding: see `load_module`; every process reads all.
    """
    dit, kernels = low_bit(lambda: weights.architecture.build(weights.config, dtype), kind)
    graphdef, state = nnx.split(dit)
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in flat_state(state).items()} | dict.fromkeys(
        kernels, np.dtype(dtype)
    )
    arrays = {}

    def put(path: str, array: np.ndarray) -> None:
        laid_out = sharding(path, array.shape)
        arrays[path] = jax.make_array_from_callback(array.shape, laid_out, lambda index: array[index])

    for path, array in weights.arrays({path: dtypes[path] for path in weights.leaves}):
        if path in kernels:
            values, scale = rounded(array, kernels[path], kind)
            put(path.replace(".kernel", ".values"), values)
            put(path.replace(".kernel", ".scale"), scale)
        else:
            put(path, array)
    return nnx.merge(graphdef, from_flat(state, arrays))

"""Weights of a transformer's blocks in 8 bits, for running it: half the memory of bfloat16.

    W ~ scale * values        one float32 scale for each output of a layer: the largest |W| of it is the largest value

The values are widened where the layer uses them, and the scale is applied to the product. So activations and sums are
what they are with bfloat16 weights, and no layer's weights are ever held wide but the one that runs. All else stays as
it is: embeddings, norms, modulation and head are 3 % of the parameters, and rounding them costs most.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.errors import UserError
from avd_jax.models.adapters import BLOCKS, projections
from avd_jax.models.wan_dit import WanDiT

KINDS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}  # dtype, and its largest value
_FP8_TPU = re.compile(r"TPU ?v?(7|8)")


def check_device(kind: str, device: jax.Device) -> None:
    """Raise a UserError if a device has no such numbers; a CPU, on which one only tries things, emulates them all."""
    if kind != "fp8" or device.platform == "cpu":
        return
    if device.platform == "tpu":
        has = _FP8_TPU.match(device.device_kind)
    else:
        has = tuple(map(int, str(device.compute_capability).split("."))) >= (8, 9)
    if not has:
        raise UserError(
            f"--weights_dtype fp8: {device.device_kind} has no such numbers; take int8, which needs as little memory"
        )


def rounded(kernel: np.ndarray, input_axes: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values [layers in out], or [layers out in] of heads, and scale [layers outputs...] of stacked kernels.

    Args:
      kernel: [layers, inputs..., outputs...], in any dtype.
      input_axes: how many there are of the first.
      kind: a key of KINDS.
    """
    dtype, largest = KINDS[kind]
    layers, outputs = kernel.shape[0], kernel.shape[1 + input_axes :]
    kernel = kernel.reshape(layers, -1, math.prod(outputs))
    values, scale = np.empty(kernel.shape, dtype), np.empty((layers, kernel.shape[2]), np.float32)
    for layer, weights in enumerate(kernel):  # one at a time: all in float32 would be four times what is kept
        weights = weights.astype(np.float32)
        most = np.max(np.abs(weights), axis=0)
        scale[layer] = np.where(most > 0, most, 1) / largest
        scaled = weights / scale[layer]
        values[layer] = np.rint(scaled) if kind == "int8" else scaled
    heads = len(outputs) > 1
    return np.ascontiguousarray(values.swapaxes(1, 2)) if heads else values, scale.reshape(layers, *outputs)


def low_bit(build: Callable[[], WanDiT], kind: str) -> tuple[WanDiT, dict[str, int]]:
    """Return the transformer that `build` makes, without arrays, as it is with 8 bits, and what of it is rounded.

    Returns:
      The module, and dotted path of each kernel that is rounded -> its input axes. In its place are leaves `values` and
      `scale`. The values are matrices as the TPU compiler wants them: it pads heads, and turns the kernels of all
      layers' queries, keys and values in a copy if they are [in out].
    """
    kernels = {}

    def rounded_module() -> WanDiT:
        dit = build()
        for name, layer in projections(dit):
            if name.startswith(f"{BLOCKS}."):
                layers, *outputs = layer.bias.shape
                matrix = layer.kernel.size // layers // math.prod(outputs), math.prod(outputs)
                shape = (layers, *(matrix[::-1] if len(outputs) > 1 else matrix))
                layer.values = nnx.Param(jnp.zeros(shape, KINDS[kind][0]))
                layer.scale = nnx.Param(jnp.zeros(layer.bias.shape, jnp.float32))
                layer.kernel = nnx.data(None)
                kernels[f"{name}.kernel"] = layer.input_axes
        return dit

    return nnx.eval_shape(rounded_module), kernels

"""A transformer as the one file that ComfyUI loads: Wan's own keys, in half precision or scaled float8.

Scaled float8 is as ComfyUI reads it: a matrix is `X.weight` (e4m3) times `X.scale_weight` (one float32). A tensor
`scaled_fp8` of two elements says that products are made in the precision of the activations.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from avd_jax.convert.adapter_keys import Target, targets
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.state import flat_state
from avd_jax.convert.weights import Weights

DTYPES = ("bfloat16", "float16", "float32", "fp8")
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST = float(ml_dtypes.finfo(_FLOAT8).max)  # beyond it is nan
_MARK = "scaled_fp8"


def comfyui_tensors(
    weights: Weights, dtype: str
) -> tuple[dict[str, jax.ShapeDtypeStruct], Iterator[tuple[str, np.ndarray]]]:
    """Return key -> shape and dtype, and the tensors in that order, of which one is in memory at a time.

    Args:
      weights: of the transformer.
      dtype: one of DTYPES. What the network keeps in float32 stays float32: it is small, and rounding it costs most.
        With "fp8" the matrices of the blocks are scaled float8, and the others bfloat16.
    """
    half = jnp.bfloat16 if dtype == "fp8" else jnp.dtype(dtype)
    state = nnx.state(WAN_DIT.abstract(weights.config, jnp.bfloat16))
    exact = {path for path, leaf in flat_state(state).items() if leaf.dtype == jnp.float32}

    def is_scaled(target: Target) -> bool:
        return dtype == "fp8" and target.is_linear and target.layer is not None

    leaves = {}
    for target in targets(weights.config).values():
        own = _FLOAT8 if is_scaled(target) else np.dtype(jnp.float32 if target.path in exact else half)
        leaves[target.key] = jax.ShapeDtypeStruct(target.shape, own)
        if is_scaled(target):
            leaves[_scale_key(target)] = jax.ShapeDtypeStruct((), np.float32)
    if dtype == "fp8":
        leaves[_MARK] = jax.ShapeDtypeStruct((2,), _FLOAT8)

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for target, tensor in native_tensors(weights):
            if not is_scaled(target):
                yield target.key, tensor.astype(leaves[target.key].dtype)
                continue
            tensor = tensor.astype(np.float32)
            scale = np.float32(np.abs(tensor).max() / _LARGEST) or np.float32(1)
            yield target.key, np.clip(tensor / scale, -_LARGEST, _LARGEST).astype(_FLOAT8)
            yield _scale_key(target), np.asarray(scale)
        if dtype == "fp8":
            yield _MARK, np.zeros(2, _FLOAT8)

    return leaves, stream()


def native_tensors(weights: Weights) -> Iterator[tuple[Target, np.ndarray]]:
    """Yield each parameter of a transformer in PyTorch's layout, in the order of `targets`; one is held at a time."""
    by_path: dict[str, list[Target]] = {}
    for target in targets(weights.config).values():
        by_path.setdefault(target.path, []).append(target)
    for path, found in by_path.items():
        for target, layer in zip(found, weights.layers(path), strict=True):
            yield target, np.ascontiguousarray(target.rule.to_torch(layer))


def _scale_key(target: Target) -> str:
    return f"{target.key.removesuffix('weight')}scale_weight"

"""Resampling along one axis as PyTorch's `interpolate` does it without antialiasing, on NumPy and JAX arrays."""

import numpy as np

from avd_jax.shapes import Array

_CUBIC = -0.75  # PyTorch's coefficient; Pillow's is -0.5


def taps(size: int, new_size: int, *, scale: float | None = None, cubic: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return what each new value is made of: indices [new_size taps] of old values, and their weights (float32).

    Source: PyTorch's bilinear and bicubic interpolation with `align_corners=False`: pixel centres are at i + 1/2, and
    what lies beyond the edge is the value at the edge.

    Args:
      size: old values.
      new_size: new values.
      scale: new values an old value; by default `new_size / size`.
      cubic: whether four values are taken, or two (linear).
    """
    # Rounded to float32 where PyTorch rounds: at a thousand pixels it shows in the values.
    step = np.float32(size / new_size if scale is None else 1 / scale)
    places = ((np.arange(new_size) + 0.5) * float(step) - 0.5).astype(np.float32)
    if not cubic:
        places = np.maximum(places, 0)
    first = np.floor(places)
    after = (places - first)[:, None]
    offsets = np.arange(-1, 3) if cubic else np.arange(2)
    distance = np.abs(after - offsets)
    weights = _cubic(distance) if cubic else 1 - distance
    indices = np.clip(first[:, None] + offsets, 0, size - 1)
    return indices.astype(np.int32), weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def resampled(x: Array, axis: int, indices: np.ndarray, weights: np.ndarray) -> Array:
    """Return `x` with one axis resampled by `taps`."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return sum(
        x.take(index, axis=axis) * weight.reshape(shape) for index, weight in zip(indices.T, weights.T, strict=True)
    )

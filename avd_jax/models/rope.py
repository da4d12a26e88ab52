"""Three-axis rotary position embedding of Wan2.1 (wan/modules/model.py), with half-split pairs.

Wan rotates interleaved pairs (2i, 2i+1). Here the pair is (i, i + K/2), which needs no relayout on TPU; converting a
checkpoint permutes the q and k projections and their norms to match, so attention scores are the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.custom_derivatives import linear_call
from jaxtyping import Float

from avd_jax.models.linear import einsum
from avd_jax.shapes import Array, Heads, typechecked

THETA = 10_000.0

Rotation = tuple[Float[Array, "tokens half_head_dim"], Float[Array, "tokens half_head_dim"]]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many of the K/2 rotated pairs encode the frame, the row and the column."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def rotation(frames: int, height: int, width: int, head_dim: int, *, frame_stride: int = 1) -> Rotation:
    """Return (cos, sin), each float32 [frames*height*width, head_dim/2], of a token grid in patches.

    The frames' positions are 0, frame_stride, 2 frame_stride, ...
    """
    tables = []
    for axis, (length, pairs) in enumerate(zip((frames, height, width), axis_pairs(head_dim), strict=True)):
        # float64 on the host: float32 loses digits of the angle at large positions.
        positions = np.arange(length) * (frame_stride if axis == 0 else 1)
        angles = np.outer(positions, THETA ** (-np.arange(pairs) / pairs))
        shape = [1, 1, 1, pairs]
        shape[axis] = length
        tables.append(angles.reshape(shape))

    def grid(function):
        # Only the per-axis tables are constants of the program; the grid is broadcast on the device.
        parts = [
            jnp.broadcast_to(jnp.asarray(function(table), jnp.float32), (frames, height, width, table.shape[-1]))
            for table in tables
        ]
        return rearrange(jnp.concatenate(parts, axis=-1), "f h w p -> (f h w) p")

    return grid(np.cos), grid(np.sin)


def for_matrix_units(rotation: Rotation) -> tuple[Float[Array, "tokens head_dim"], Float[Array, "tokens head_dim"]]:
    """Return tables as wide as a head, with which `rotate` swaps the halves of each head by a product.

    On a TPU any other way moves channels between lanes. The compiler then prefers tokens in the lanes for all that
    comes before and after, and the projections and the attention kernels pay for it with copies.
    """
    cos, sin = rotation
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


@typechecked
def rotate(x: Heads, cos: Float[Array, "tokens width"], sin: Float[Array, "tokens width"]) -> Heads:
    """Rotate the pairs (i, i + K/2) of queries or keys [B H N K] by the angles of their tokens, in float32.

    Args:
      x: queries or keys.
      cos, sin: from `rotation`, or from `for_matrix_units`: the same result, bit for bit.
    """
    return _rotate(x, cos, sin)


@jax.custom_jvp
def _rotate(x, cos, sin):
    x32 = x.astype(jnp.float32)  # bf16 angles would blur neighbouring positions
    if cos.shape[-1] == x.shape[-1]:
        # Each sum of the product has one term, so it is exact.
        swap = jnp.asarray(np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=1), x.dtype)
        swapped = einsum("bhnk,kj->bhnj", x, swap).astype(jnp.float32)
        return (x32 * cos + swapped * sin).astype(x.dtype)
    # Reversing an axis of two halves becomes part of the loop that computes the rest; joining two results would not.
    halves = rearrange(x32, "b h n (two half) -> b h n two half", two=2)
    rotated = halves * cos[:, None] + halves[..., ::-1, :] * jnp.stack([-sin, sin], axis=1)
    return rearrange(rotated, "b h n two half -> b h n (two half)").astype(x.dtype)


@_rotate.defjvp
def _rotate_jvp(primals, tangents):
    # The angles are positions, which nothing learns.
    x, cos, sin = primals
    return _rotate(x, cos, sin), linear_call(_turn, _turn_back, (cos, sin), tangents[0])


def _turn(angles, x):
    return _rotate(x, *angles)


def _turn_back(angles, gradient):
    # The transpose of a rotation turns back.
    cos, sin = angles
    return _rotate(gradient, cos, -sin)

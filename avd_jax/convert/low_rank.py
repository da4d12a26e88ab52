"""The leading part of a matrix: a randomised singular value decomposition with power iterations.

Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithms 4.4 and 5.1: a random sketch of the range, multiplied a few
times with the matrix and its transpose, and the decomposition of what the matrix has in that range.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_OVERSAMPLING, _POWER_ITERATIONS = 16, 3


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u [O r], s [r] and vt [r I] such that `u * s @ vt` is nearly the best approximation of rank r.

    Args:
      matrix: [O I], float32.
      rank: how many; r is no more than the matrix has. Near that it is decomposed exactly.
    """
    rank = min(rank, *matrix.shape)
    if rank + _OVERSAMPLING >= min(matrix.shape):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = jax.device_get(_randomised(jnp.asarray(matrix), rank + _OVERSAMPLING))
    return u[:, :rank], s[:rank], vt[:rank]


@partial(jax.jit, static_argnums=1)
def _randomised(matrix: jax.Array, width: int):
    with jax.default_matmul_precision("highest"):
        sketch = jax.random.normal(jax.random.key(0), (matrix.shape[1], width), matrix.dtype)
        basis, _ = jnp.linalg.qr(matrix @ sketch)

        def sharpen(_, basis):
            across, _ = jnp.linalg.qr(matrix.T @ basis)
            return jnp.linalg.qr(matrix @ across)[0]

        basis = jax.lax.fori_loop(0, _POWER_ITERATIONS, sharpen, basis)
        u, s, vt = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
        return basis @ u, s, vt

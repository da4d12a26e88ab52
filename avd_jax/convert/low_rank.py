"""The leading part of a matrix: a randomised singular value decomposition with power iterations.

Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithms 4.4 and 5.1: a random sketch of the range, multiplied a few
times with the matrix and its transpose, and the decomposition of what the matrix has in that range.
"""

import numpy as np

_OVERSAMPLING, _POWER_ITERATIONS = 16, 3


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u [O r], s [r] and vt [r I] such that `u * s @ vt` is nearly the best approximation of rank r.

    Args:
      matrix: [O I], float32.
      rank: how many; r is no more than the matrix has. Near that it is decomposed exactly.
    """
    rank = min(rank, *matrix.shape)
    width = rank + _OVERSAMPLING
    if width >= min(matrix.shape):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], width), np.float32)
    basis, _ = np.linalg.qr(matrix @ sketch)
    for _ in range(_POWER_ITERATIONS):
        across, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ across)
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank]

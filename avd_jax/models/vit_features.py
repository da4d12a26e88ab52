"""What is told from the features of a video's frames: how consistent they are, and how they score under a linear head.

Sources: VBench's `subject_consistency.py` (with DINO ViT-B/16), `background_consistency.py` (with CLIP ViT-B/32) and
`aesthetic_quality.py` (a tenth of the score of LAION's linear head on CLIP ViT-L/14).
"""

import numpy as np

CONSISTENCY = "mean over the frames from the second on of (max(0, cos to the previous) + max(0, cos to the first)) / 2"


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the vectors [... D] with norm 1, in float64; zero stays zero."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def consistencies(features: np.ndarray) -> np.ndarray:
    """Return what CONSISTENCY is the mean of, [F-1] in 0..1, for features [F D] of the frames of a video.

    Raises:
      ValueError: fewer than two frames.
    """
    if len(features) < 2:
        raise ValueError("consistency is between two frames at least")
    units = unit(features)
    to_previous, to_first = np.sum(units[1:] * units[:-1], -1), units[1:] @ units[0]
    return (np.maximum(to_previous, 0) + np.maximum(to_first, 0)) / 2


def linear_scores(features: np.ndarray, *, weight: np.ndarray, bias: float) -> np.ndarray:
    """Return the scores [F] of the unit-norm features [F D] under a linear head with weight [D] and bias."""
    return unit(features) @ np.asarray(weight, np.float64) + bias

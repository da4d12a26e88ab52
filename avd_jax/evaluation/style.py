"""How far a set of videos has gone from one style to another, by statistics of colours and edges.

Styles are told by sets of example videos; nothing here knows which they are. Videos are [F H W 3] in [-1, 1].
"""

import numpy as np


def style_features(video: np.ndarray) -> np.ndarray:
    """Return what a style shows in: brightness, its spread, saturation, its spread, and edges in brightness, [5]."""
    pixels = (np.clip(video, -1, 1) + 1) / 2
    high, low = pixels.max(-1), pixels.min(-1)
    saturation = (high - low) / np.maximum(high, 1e-6)
    brightness = pixels.mean(-1)
    edges = np.mean([np.abs(np.diff(brightness, axis=axis)).mean() for axis in (1, 2)])
    return np.asarray([brightness.mean(), brightness.std(), saturation.mean(), saturation.std(), edges])


def style_position(features: np.ndarray, *, start: np.ndarray, end: np.ndarray) -> float:
    """Return where a set of videos is between two styles: 0 at `start`, 1 at `end`.

    The mean features, in units of their deviation within the two styles, are projected on the line through the means
    of the styles.

    Args:
      features: [N 5], of the set.
      start: [M 5], of examples of the one style.
      end: [K 5], of examples of the other.

    Raises:
      ValueError: the two styles have the same means.
    """
    scale = np.sqrt((start.var(0) + end.var(0)) / 2) + 1e-6
    way = (end.mean(0) - start.mean(0)) / scale
    length = float(way @ way)
    if length == 0:
        raise ValueError("the two styles do not differ")
    return float(((features.mean(0) - start.mean(0)) / scale) @ way / length)

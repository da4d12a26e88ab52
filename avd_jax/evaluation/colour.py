"""How colourful a video is: the two numbers by which oversaturation shows. Videos are [F H W 3] in [-1, 1]."""

import numpy as np


def saturation(video: np.ndarray) -> float:
    """Return the mean HSV saturation, (max - min) / max of a pixel's channels, 0..1."""
    pixels = (np.clip(video, -1, 1) + 1) / 2
    high, low = pixels.max(-1), pixels.min(-1)
    return float(np.mean((high - low) / np.maximum(high, 1e-6)))


def colourfulness(video: np.ndarray) -> float:
    """Return Hasler and Suesstrunk's colourfulness (Measuring colourfulness in natural images, 2003), mean over frames.

    0 is grey, about 33 "moderately" and 109 "extremely colourful" in the authors' study; channels count 0..255.
    """
    red, green, blue = np.moveaxis((np.clip(video, -1, 1) + 1) * 127.5, -1, 0)
    opponents = np.stack([red - green, 0.5 * (red + green) - blue])  # [2 F H W]
    spread = np.sqrt(np.sum(opponents.var(axis=(2, 3)), axis=0))
    offset = np.sqrt(np.sum(np.square(opponents.mean(axis=(2, 3))), axis=0))
    return float(np.mean(spread + 0.3 * offset))

"""How colourful and how sharp a single picture is. Pictures are uint8 [height width 3], R'G'B'."""

from collections.abc import Mapping

import cv2
import numpy as np

BAR = 24  # a border that is nowhere brighter is a black bar


def hue_entropy(picture: np.ndarray, settings: Mapping) -> float:
    """Return the entropy of the histogram of HSV hues, each pixel counting for the chroma that it has above `floor`.

    A grey pixel has no hue; what noise gives it must not count. `grey` is a mean weight that joins the fullest bin, so
    that the entropy of a picture goes to 0 with its colours.
    """
    hue = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)[..., 0]
    chroma = picture.max(-1).astype(np.int32) - picture.min(-1)
    weights = np.maximum(chroma - settings["floor"], 0)
    bins = hue.astype(np.int32) * settings["bins"] // 256
    counts = np.bincount(bins.ravel(), weights.ravel(), settings["bins"]) / hue.size
    counts[counts.argmax()] += settings["grey"]
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(settings["base"])) + 0.0


def laplacian_variance(picture: np.ndarray) -> float:
    """Return the variance of the Laplacian (OpenCV's, 3x3) of the luma, without black bars."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    laplacian = cv2.Laplacian(grey, cv2.CV_32F)
    rows, columns = np.flatnonzero(grey.max(1) > BAR), np.flatnonzero(grey.max(0) > BAR)
    if len(rows) and len(columns):
        laplacian = laplacian[_inside(rows, grey.shape[0]), _inside(columns, grey.shape[1])]
    return float(laplacian.var())


def _inside(lit: np.ndarray, size: int) -> slice:
    """Return the lit lines without the edge to a bar."""
    first, last = int(lit[0]), int(lit[-1]) + 1
    first, last = first + 2 * (first > 0), last - 2 * (last < size)
    return slice(first, last) if first < last else slice(0, size)


def colour_method(settings: Mapping) -> str:
    """Say how `hue_entropy` measures."""
    return (
        f"least entropy (logarithm to base {settings['base']:.6g}) of a histogram of {settings['bins']} HSV hues, "
        f"weighted by the chroma above {settings['floor']} of 255, with "
        f"{settings['grey']} of it added to the fullest bin"
    )


def sharpness_method(settings: Mapping) -> str:
    """Say how `laplacian_variance` measures."""
    return (
        f"least variance of the 3x3 Laplacian of 8-bit luma at a shorter side of {settings['short_side']} pixels (or "
        "its own, if that is less), without black bars"
    )

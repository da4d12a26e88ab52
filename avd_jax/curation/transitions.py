"""Fades and dissolves: pictures that are a mixture of what stands before and behind them."""

from collections import deque
from collections.abc import Mapping

import cv2
import numpy as np

SIZE = (32, 18)  # pixels of the pictures that are compared
FLAT = 2.0  # levels of spread below which a picture shows nothing


class GradualFinder:
    """Finds fades and dissolves in pictures that come in order.

    While A fades into B, the picture in the middle is the mean of the two. Of a picture that moves it is not, as what
    moves is then in two places. Where A and B show the same, the light has only changed.
    """

    METHOD = (
        f"the middle of three pictures at {SIZE[0]}x{SIZE[1]} is the mean of the outer two, which do not resemble each "
        "other"
    )

    def __init__(self, settings: Mapping):
        self._step = settings["step"]
        self._spans = sorted({max(1, round(span / self._step)) for span in settings["spans"]})
        self._residual, self._resemblance = settings["residual"], settings["resemblance"]
        self._change = settings["change"]
        self._history: deque[tuple[float, np.ndarray]] = deque(maxlen=2 * self._spans[-1] + 1)

    def add(self, time: float, luma: np.ndarray, cut: bool) -> tuple[float, float] | None:
        """Take the next picture, uint8 [height width]; return (begin, end) of a transition that ended by now."""
        if cut:
            self._history.clear()
        if self._history and time < self._history[-1][0] + self._step * 0.999:
            return None
        self._history.append((time, cv2.resize(luma, SIZE, interpolation=cv2.INTER_AREA).astype(np.float32).ravel()))
        found = None
        for span in self._spans:
            if len(self._history) > 2 * span and self._is_mixture(span):
                begin = self._history[-1 - 2 * span][0]
                found = (begin if found is None else min(begin, found[0]), time)
        return found

    def _is_mixture(self, span: int) -> bool:
        before, middle, after = (self._history[-1 - steps * span][1] for steps in (2, 1, 0))
        return is_mixture(before, middle, after, self._change, self._residual, self._resemblance)


def is_mixture(before, middle, after, change: float, residual: float, resemblance: float) -> bool:
    """Whether the middle one of three pictures is a mixture of the outer ones, which differ."""
    difference = float(np.abs(after - before).mean())
    if difference < change:
        return False
    if float(np.abs(middle - (before + after) / 2).mean()) > residual * difference:
        return False
    spreads = before.std(), after.std()
    if min(spreads) < max(FLAT, max(spreads) / 4):
        return True
    covariance = float(((before - before.mean()) * (after - after.mean())).mean())
    return covariance < resemblance * spreads[0] * spreads[1]

"""Fades and dissolves: pictures that are a mixture of what stands before and behind them."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

SIZE = (32, 18)  # pixels of the pictures that are compared
EDGE = 0.05  # of the way from one picture to the other: so little of a mixture is not seen


@dataclass
class Sample:
    """A picture without its mean, as a vector of levels, and its contrast (their standard deviation)."""

    time: float
    levels: np.ndarray
    contrast: float


class GradualFinder:
    """Finds fades and dissolves in pictures that come in order.

    While A dissolves into B, the picture in the middle resembles both, which do not resemble each other, and has no
    more contrast than their mean. What moves keeps its contrast. Where the light changes, what is left without the mean
    is the same picture. In a fade, one of the two is plain and the middle one has half the contrast of the other.
    """

    METHOD = (
        f"of three luma pictures at {SIZE[0]}x{SIZE[1]} without their means, the middle one resembles both of the "
        "outer two, which differ, and has the contrast of their mean; or one is plain and the contrast goes evenly"
    )

    def __init__(self, settings: Mapping):
        self._settings, self._step = settings, settings["step"]
        self._spans = sorted({max(1, round(span / self._step)) for span in settings["spans"]})
        self._history: deque[Sample] = deque(maxlen=2 * self._spans[-1] + 1)

    def add(self, time: float, luma: np.ndarray) -> tuple[float, float] | None:
        """Take the next picture, uint8 [height width]; return (begin, end) of a transition in the last pictures."""
        # Pictures are as far apart as the rate allows, so that a tie must not depend on rounding.
        if self._history and time < self._history[-1].time + 0.999 * self._step:
            return None
        levels = cv2.resize(luma, SIZE, interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
        levels -= levels.mean()
        self._history.append(Sample(time, levels, float(levels.std())))
        found = None
        for span in self._spans:
            if len(self._history) > 2 * span:
                samples = [self._history[step] for step in range(-1 - 2 * span, 0)]
                if is_transition(samples, self._settings):
                    found = samples
        return None if found is None else _within(found)


def is_transition(samples: Sequence[Sample], settings: Mapping) -> bool:
    """Whether the first of these pictures fades or dissolves into the last; their number is odd."""
    before, middle, after = samples[0], samples[len(samples) // 2], samples[-1]
    low, high = sorted((before.contrast, after.contrast))
    if low < max(settings["plain"], settings["faded"] * high):
        return high > 3 * settings["plain"] and _goes_evenly(samples, settings["residual"])
    if _resemblance(before, after) >= settings["resemblance"]:
        return False
    if min(_resemblance(before, middle), _resemblance(middle, after)) < settings["kinship"]:
        return False
    mean = (before.levels + after.levels) / 2
    if middle.contrast >= settings["contrast"] * float(mean.std()):
        return False
    # Over most of the picture, not only where something moves.
    change = np.abs(after.levels - before.levels)
    return float(np.median(change)) >= max(settings["change"], settings["spread"] * float(change.mean()))


def _within(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return when a transition begins and ends: pictures that still are the first one, or already the last, are none.

    How far each is on the way is its projection on the difference. What moves within a scene seems to be on its way.
    """
    way = samples[-1].levels - samples[0].levels
    shares = [float((sample.levels - samples[0].levels) @ way) / float(way @ way) for sample in samples]
    first, last = 0, len(samples) - 1
    while first + 1 < last and shares[first + 1] <= EDGE:
        first += 1
    while last - 1 > first and shares[last - 1] >= 1 - EDGE:
        last -= 1
    return samples[first].time, samples[last].time


def _goes_evenly(samples: Sequence[Sample], residual: float) -> bool:
    """Whether the contrast goes from that of the first to that of the last about evenly."""
    contrasts = np.array([sample.contrast for sample in samples])
    even = np.linspace(contrasts[0], contrasts[-1], len(contrasts))
    return float(np.abs(contrasts - even).max()) <= residual * abs(contrasts[-1] - contrasts[0])


def _resemblance(one: Sample, other: Sample) -> float:
    """Return the correlation of two pictures."""
    return float(one.levels @ other.levels) / max(one.contrast * other.contrast * one.levels.size, 1e-6)

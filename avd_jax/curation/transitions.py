"""Fades and dissolves: pictures that are a mixture of what stands before and behind them.

While a scene A gives way to a scene B, each picture is a A + b B. The share a falls from 1 to 0, b rises from 0 to 1,
and a + b is 1 in a dissolve and less on the way through black. (Without its mean, a plain picture is 0, whatever its
colour.) Nothing else does that: where something moves, the pictures between are no mixture of those around; where it is
so smooth that they are, as in a wave, a + b is above 1, and the change went on before and goes on afterwards.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

SIZE = (32, 18)  # pixels of the pictures that are compared
EDGE = 0.05  # of the way from one picture to the other: so little of a mixture is not seen
BETWEEN = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)  # of a span: where the pictures between are looked at
SLACK = 0.15  # by which a share may be off 0 or 1, or go the wrong way
LONGEST_AFTER = 10  # steps; nothing is told of a transition before so much behind it is known
MIDDLE = 128  # of the levels: around it, a product of two pictures is a whole number that float32 holds
FASTEST = 61  # pictures a second that are looked at, at most


class GradualFinder:
    """Finds fades and dissolves in pictures that come in order: short ones picture by picture, long ones in steps."""

    METHOD = (
        f"luma pictures at {SIZE[0]}x{SIZE[1]} without their means: those of a span are a A + b B of its first and "
        "last, a falls, b rises, a + b is at most 1; A and B differ over most of the picture, and change less around"
    )

    def __init__(self, settings: Mapping):
        short = _Level(settings["short_spans"], 1 / FASTEST, settings)
        self._levels = [short, _Level(settings["long_spans"], settings["step"], settings, settings["moving_spans"])]

    def add(self, time: float, luma: np.ndarray) -> list[tuple[float, float]]:
        """Take the next picture, uint8 [height width]; return (begin, end) of transitions a while ago."""
        small = cv2.resize(luma, SIZE, interpolation=cv2.INTER_AREA)
        return [found for level in self._levels if (found := level.add(time, small)) is not None]

    def finish(self) -> list[tuple[float, float]]:
        """Return (begin, end) of the transitions at the end of the video."""
        return [found for level in self._levels for found in level.finish()]


class _Level:
    """The last pictures, some time apart, and the spans of them that may be a transition."""

    def __init__(self, spans: Sequence[int], step: float, settings: Mapping, moving: Sequence[int] = ()):
        self._step, self._settings = step, settings
        spans = np.array(sorted({*spans, *moving}))
        self._moving = np.isin(spans, moving)
        around = np.clip(spans // 2, 1, LONGEST_AFTER)
        self._count = int((spans + 2 * around).max()) + 1
        self._last = self._count - 1 - around
        self._first = self._last - spans
        self._before, self._after = self._first - around, np.full_like(spans, self._count - 1)
        self._between = np.clip(np.rint(np.outer(BETWEEN, spans)).astype(int), 1, spans - 1) + self._first
        self._delay = int(around.max())
        self._pairs = np.ravel_multi_index(
            ((self._first, self._last, self._first), (self._first, self._last, self._last)), (self._count, self._count)
        )
        self._times: np.ndarray | None = None

    def add(self, time: float, small: np.ndarray) -> tuple[float, float] | None:
        """Take the next picture, uint8 at SIZE; return (begin, end) of a transition."""
        # Pictures are as far apart as the rate allows, so that a tie must not depend on rounding.
        if self._times is not None and time < self._times[-1] + 0.999 * self._step:
            return None
        pixels = small.ravel().astype(np.float32) - MIDDLE
        if self._times is None:
            self._begin(time, pixels)
        return self._take(time, pixels)

    def finish(self) -> list[tuple[float, float]]:
        """Return the transitions behind which too little has come."""
        if self._times is None:
            return []
        last = self._pixels[-1].copy()
        rest = [self._take(self._times[-1], last, there=False) for _ in range(self._delay)]
        return [found for found in rest if found is not None]

    def _begin(self, time: float, pixels: np.ndarray) -> None:
        """Make room, as if the first picture had been there for long."""
        self._times, self._there = np.full(self._count, time), np.zeros(self._count, bool)
        self._kept, self._end = np.zeros((4 * self._count, pixels.size), np.float32), self._count
        self._sums, self._lit = np.zeros(self._count), np.zeros(self._count, bool)
        self._products = np.zeros((self._count, self._count))
        for _ in range(self._count):
            self._push(time, pixels, there=False)

    def _take(self, time: float, pixels: np.ndarray, *, there: bool = True) -> tuple[float, float] | None:
        self._push(time, pixels, there=there)
        found = [self._within(span) for span in self._transitions()]
        return (min(begin for begin, _ in found), max(end for _, end in found)) if found else None

    def _push(self, time: float, pixels: np.ndarray, *, there: bool) -> None:
        if self._end == len(self._kept):  # to move them each time would take longer than to look at them
            self._kept[: self._count], self._end = self._kept[-self._count :], self._count
        self._kept[self._end] = pixels
        self._end += 1
        size = pixels.size
        for kept, new in ((self._times, time), (self._there, there), (self._sums, pixels.sum()), (self._lit, True)):
            kept[:-1], kept[-1] = kept[1:], new
        # Those of the pictures without their means, times size: whole numbers, which are the same in whichever order
        # they are added.
        products = size * (size * (self._pixels @ pixels).astype(np.float64) - self._sums * self._sums[-1])
        self._lit[-1] = np.sqrt(products[-1] / size) / size >= self._settings["plain"]
        products *= self._lit & self._lit[-1]
        self._products[:-1, :-1] = self._products[1:, 1:]
        self._products[-1] = self._products[:, -1] = products

    @property
    def _pixels(self) -> np.ndarray:
        return self._kept[self._end - self._count : self._end]

    def _levels(self, index: int) -> np.ndarray:
        """Return a picture without its mean, times its size."""
        pixels = self._pixels[index].astype(np.float64)
        return (pixels * pixels.size - self._sums[index]) * self._lit[index]

    def _transitions(self) -> list[int]:
        """Return the numbers of the spans that are one now."""
        said, products = self._settings, self._products
        first, last = self._first, self._last
        aa, bb, ab = products.ravel().take(self._pairs)
        high = np.maximum(aa, bb)
        unit = float(self._kept.shape[1]) ** 3  # of a product where contrast is 1 level
        differ = (high > said["contrast"] ** 2 * unit) & (ab < said["resemblance"] * np.sqrt(aa * bb) + unit)
        if not differ.any():
            return []
        # How much the scenes change in themselves, around the span. What is plain does not.
        distance = aa + bb - 2 * ab
        before = np.where(aa == 0, 0, _distance(products, self._before, first)) / np.maximum(distance, 1)
        after = np.where(bb == 0, 0, _distance(products, last, self._after)) / np.maximum(distance, 1)
        there = (self._there[self._before] | (aa == 0)) & (self._there[self._after] | (bb == 0))
        around, limit = np.maximum(before, after), np.where(self._moving, said["moving_around"], said["around"])
        fades = self._moving & (np.minimum(aa, bb) < said["faded"] ** 2 * high)
        spans = np.flatnonzero(differ & (fades | there & (around <= limit**2)))
        if not len(spans):
            return []
        aa, bb, ab, distance, around = aa[spans], bb[spans], ab[spans], distance[spans], around[spans]
        first, last, between = first[spans], last[spans], self._between[:, spans]
        am, bm, mm = products[first, between], products[last, between], products[between, between]
        a, b = _shares(aa, bb, ab, am, bm)
        off = (mm - 2 * (a * am + b * bm) + a * a * aa + b * b * bb + 2 * a * b * ab) / distance
        mixed = (a + b <= said["sum"]).all(0) & (np.minimum(a, b) >= -SLACK).all(0)
        mixed &= (np.diff(a, axis=0) <= SLACK).all(0) & (np.diff(b, axis=0) >= -SLACK).all(0)
        # A cut has nothing between.
        mixed &= (((a > SLACK) & (a < 1 - SLACK)) | ((b > SLACK) & (b < 1 - SLACK))).any(0)
        still = there[spans] & (off <= said["residual"] ** 2).all(0) & (around <= said["around"] ** 2)
        moving = there[spans] & (off <= said["moving_residual"] ** 2).all(0) & self._moving[spans]
        moving &= around <= said["moving_around"] ** 2
        # A scene that moves while it fades: its contrast goes evenly.
        begin, end = np.sqrt(aa), np.sqrt(bb)
        uneven = np.sqrt(mm) - (begin + np.array(BETWEEN)[:, None] * (end - begin))
        even = (np.abs(uneven) <= said["uneven"] * np.abs(end - begin)).all(0) & fades[spans]
        return [span for span in spans[mixed & (still | moving) | even] if self._is_everywhere(span)]

    def _is_everywhere(self, span: int) -> bool:
        """Whether most of the picture changes, not only where something moves; a fade leaves it as it is."""
        said, before, after = self._settings, self._levels(self._first[span]), self._levels(self._last[span])
        low, high = sorted(float(np.sqrt(x @ x / x.size)) / x.size for x in (before, after))
        if low < max(said["plain"], said["faded"] * high):
            return True
        change = np.abs(after - before) / before.size
        return float(np.median(change)) >= max(said["change"], said["spread"] * float(change.mean()))

    def _within(self, span: int) -> tuple[float, float]:
        """Return when a transition begins and ends: pictures that still are A, or already B, are not in it."""
        first, last, products = self._first[span], self._last[span], self._products
        aa, bb, ab = products[first, first], products[last, last], products[first, last]
        a, b = _shares(aa, bb, ab, products[first, first : last + 1], products[last, first : last + 1])
        way = 1 - a if bb == 0 else b if aa == 0 else (1 - a + b) / 2
        inside = np.flatnonzero((way > EDGE) & (way < 1 - EDGE))
        if not len(inside):  # scenes that move are like themselves for too short a time
            return float(self._times[first]), float(self._times[last])
        begin, end = first + max(inside[0] - 1, 0), first + inside[-1] + 1
        return float(self._times[begin]), float(self._times[end])


def _shares(aa, bb, ab, am, bm) -> tuple[np.ndarray, np.ndarray]:
    """Return a and b of the mixture a A + b B that is nearest to a picture M, from the products of the three."""
    scale = np.maximum(aa * bb - ab * ab, 1)
    a, b = (am * bb - bm * ab) / scale, (bm * aa - am * ab) / scale
    return np.where(bb == 0, am / np.maximum(aa, 1), a), np.where(aa == 0, bm / np.maximum(bb, 1), b)


def _distance(products: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return products[one, one] + products[other, other] - 2 * products[one, other]

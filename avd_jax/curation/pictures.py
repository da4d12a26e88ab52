"""A decoded picture, and the small planes of it that the cheap measures need, straight from the decoder's memory."""

from dataclasses import dataclass, field

import av
import cv2
import numpy as np

# Their planes are 8-bit luma and two of chroma, which OpenCV can shrink where they lie.
PLANAR = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
GREY = frozenset({"gray", "gray8"})
NEUTRAL = 128


@dataclass
class Picture:
    """A frame of the video, as curation hands it on.

    Attributes:
      index: its number among the decoded frames.
      time: seconds after the first frame.
      frame: as decoded; not turned yet.
    """

    index: int
    time: float
    frame: av.VideoFrame
    _greys: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def grey(self, size: tuple[int, int]) -> np.ndarray:
        """Return the luma as uint8 [height width] of `size` (width, height), averaged over areas."""
        if size not in self._greys:
            frame = self.frame
            if frame.format.name not in PLANAR | GREY:
                frame = frame.reformat(width=size[0], height=size[1], format="yuv420p", interpolation="AREA")
            self._greys[size] = _plane(frame, 0, size)
        return self._greys[size]

    def colours(self, size: tuple[int, int]) -> np.ndarray:
        """Return luma and chroma as uint8 [height width 3] of `size` (width, height), averaged over some pixels."""
        frame = self.frame
        if frame.format.name in GREY:
            luma = self.grey(size)
            return np.dstack([luma, np.full_like(luma, NEUTRAL), np.full_like(luma, NEUTRAL)])
        if frame.format.name not in PLANAR:
            frame = frame.reformat(width=size[0], height=size[1], format="yuv444p", interpolation="AREA")
        return cv2.merge([_plane(frame, plane, size, quick=True) for plane in range(3)])


def shrunk(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a picture [height width ...] at `size` (width, height), by halves first, which is quicker."""
    while pixels.shape[1] >= 2 * size[0] and pixels.shape[0] >= 2 * size[1]:
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


def small_size(width: float, height: float, short: int) -> tuple[int, int]:
    """Return (width, height), even, of a picture of this shape whose shorter side is about `short` pixels."""
    scale = short / min(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _plane(frame: av.VideoFrame, index: int, size: tuple[int, int], *, quick: bool = False) -> np.ndarray:
    plane = frame.planes[index]
    pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
    if quick:  # leaves four pixels or more for each
        step = max(1, min(plane.width // size[0], plane.height // size[1]) // 2)
        pixels = np.ascontiguousarray(pixels[::step, ::step])
    return shrunk(pixels, size)

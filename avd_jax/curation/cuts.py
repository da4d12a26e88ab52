"""Where one scene ends and the next begins, told while the pictures pass by once.

Hard cuts are PySceneDetect's AdaptiveDetector's. Fades and dissolves are `transitions.py`'s.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from avd_jax.curation.pictures import Picture, small_size
from avd_jax.curation.transitions import GradualFinder
from avd_jax.errors import UserError

try:
    import scenedetect
except ImportError:  # an extra; `check_installed` says so where it is needed
    scenedetect = None

BRIGHTER = 20  # levels that a flash is, at least
SAME = 10  # times as much as the scene that goes on behind it has changed


def check_installed() -> None:
    """Raise a UserError if the extra `curation` is not installed."""
    if scenedetect is None:
        raise UserError(
            "curation needs PySceneDetect, which is not installed: pip install 'scenedetect-headless>=0.7.2'"
        )


@dataclass
class Step:
    """A picture, and what is known of it by now.

    Attributes:
      picture: the pictures come in order, a few behind the decoder.
      cut: whether a new scene begins with it.
      gradual: fades and dissolves that have been found to end before it, as (begin, end) in seconds.
    """

    picture: Picture
    cut: bool = False
    gradual: Sequence[tuple[float, float]] = ()


class CutFinder:
    """The detectors of one video, fed picture by picture.

    Attributes:
      cuts: what was found, as rows.
      method: the detectors, their version and their parameters.
    """

    def __init__(self, settings: Mapping, shape: tuple[float, float], rate: float):
        """Begin a video whose pictures have this (width, height), in square pixels, and so many frames a second."""
        self._window = settings["window_width"]
        self._rate = scenedetect.FrameTimecode(0, fps=rate).frame_rate  # a fraction, which is slow to find
        self._size = small_size(*shape, settings["short_side"])
        self._adaptive = scenedetect.AdaptiveDetector(
            adaptive_threshold=settings["adaptive_threshold"],
            min_content_val=settings["min_content_val"],
            window_width=self._window,
            min_scene_len=settings["min_scene_frames"],
        )
        self._quiet = _deadened(settings["quiet_chroma"])
        self._gradual = GradualFinder(settings["gradual"])
        self._close = 1.5 * settings["gradual"]["step"]
        self.cuts: list[dict] = []
        self._before: np.ndarray | None = None
        self._flash_until = -1

    @staticmethod
    def method(settings: Mapping) -> dict:
        """Return the names, versions and parameters of the detectors."""
        hard = {name: value for name, value in settings.items() if name != "gradual"}
        return {
            "adaptive": {"detector": "PySceneDetect AdaptiveDetector", "version": scenedetect.__version__, **hard},
            "gradual": {"detector": GradualFinder.METHOD, **settings["gradual"]},
        }

    def steps(self, pictures: Iterable[Picture]) -> Iterator[Step]:
        """Yield the pictures again, each once it is known whether a scene begins with it."""
        waiting: deque[tuple[Picture, np.ndarray]] = deque()
        cuts: set[int] = set()
        last = None
        for picture in pictures:
            small = self._small(picture)
            if last is None:
                # The detector judges a picture among its neighbours: without these it would see no cut at the ends.
                for index in range(self._window):
                    cuts.update(self._judge(index, small))
            cuts.update(self._judge(picture.index + self._window, small))
            waiting.append((picture, small))
            last = picture, small
            if len(waiting) > self._window:
                yield self._step(*waiting.popleft(), cuts, waiting)
        for index in range(self._window if last is not None else 0):
            cuts.update(self._judge(last[0].index + 1 + self._window + index, last[1]))
        while waiting:
            yield self._step(*waiting.popleft(), cuts, waiting)

    def _small(self, picture: Picture) -> np.ndarray:
        return cv2.LUT(picture.colours(self._size), self._quiet)

    def _judge(self, index: int, small: np.ndarray) -> list[int]:
        timecode = scenedetect.FrameTimecode(index, fps=self._rate)
        bgr = cv2.cvtColor(small, cv2.COLOR_YUV2BGR)
        return [cut.frame_num - self._window for cut in self._adaptive.process_frame(timecode, bgr)]

    def _step(self, picture: Picture, small: np.ndarray, cuts: set[int], following: Sequence) -> Step:
        cut = picture.index in cuts and picture.index > self._flash_until
        cuts.discard(picture.index)
        luma = small[..., 0].astype(np.int16)
        if cut and (length := self._flash(luma, [later[..., 0] for _, later in following])):
            cut, self._flash_until = False, picture.index + length
        self._before = luma
        if cut:
            self.cuts.append({"seconds": round(picture.time, 6), "detector": "adaptive"})
        found = self._gradual.add(picture.time, small[..., 0])
        return Step(picture, cut, [one for one in found if self._note(*one)])

    def _flash(self, luma: np.ndarray, following: Sequence[np.ndarray]) -> int:
        """Return for how many pictures from this one on there is more light, before the same scene goes on; 0: none."""
        before = self._before
        if before is None or luma.mean() < before.mean() + BRIGHTER:
            return 0
        change = np.abs(luma - before).mean()
        same = (number for number, later in enumerate(following, 1) if np.abs(later - before).mean() < change / SAME)
        return next(same, 0)

    def finish(self) -> list[tuple[float, float]]:
        """Return the fades and dissolves at the end of the video, as (begin, end) in seconds; after all `steps`."""
        return [one for one in self._gradual.finish() if self._note(*one)]

    def _note(self, begin: float, end: float) -> bool:
        """Write a gradual transition down, and return whether that is new; one that overlaps others is the same one."""
        row = {"seconds": round(begin, 6), "until": round(end, 6), "detector": "gradual"}
        same = [
            one
            for one in self.cuts
            if one["detector"] == "gradual" and one["seconds"] <= row["until"] and one["until"] >= row["seconds"]
        ]
        if any(one["seconds"] <= begin + self._close and end <= one["until"] + self._close for one in same):
            return False  # a longer span finds again what a shorter one has found
        row["seconds"] = min(one["seconds"] for one in [row, *same])
        row["until"] = max(one["until"] for one in [row, *same])
        self.cuts = [one for one in self.cuts if one not in same] + [row]
        return True


def _deadened(quiet: int) -> np.ndarray:
    """Return a table uint8 [256 1 3] that leaves luma alone and takes chroma of less than `quiet` for none.

    The hue of an almost grey pixel is noise, and the detector weighs hue like brightness.
    """
    values = np.arange(256, dtype=np.uint8)
    chroma = np.where(np.abs(values.astype(int) - 128) < quiet, 128, values).astype(np.uint8)
    return np.stack([values, chroma, chroma], -1)[:, None]

"""Clips of a scene: which pictures each is made of, and its scores, collected while the pictures pass by once."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from avd_jax.curation.cuts import Step
from avd_jax.curation.pictures import Picture
from avd_jax.data.video import TIE

MILLISECOND = 1e-3


class Clip:
    """A clip that is being filled.

    Attributes:
      start: seconds, a whole number of milliseconds.
      times: of its frames, in seconds.
      filled: how many of its frames are known.
      last: time of the latest picture that it uses.
    """

    def __init__(self, start: float, frames: int, fps: float, measure):
        self.start, self.times = start, (start + np.arange(frames) / fps).tolist()
        self.filled, self.last = 0, start
        self.measure = measure

    def fill(self, picture: Picture) -> None:
        """Take the picture as the next frame."""
        self.measure.frame(self.filled, picture)
        self.filled, self.last = self.filled + 1, picture.time

    @property
    def is_full(self) -> bool:
        """Whether all its frames are known."""
        return self.filled == len(self.times)


class ClipCutter:
    """Lays clips back to back into each scene.

    Frame i of a clip is the picture nearest to `start + i / fps`, as `data.video.read_video` has it, and a clip is only
    kept if all these lie in its scene.

    Attributes:
      scenes: (begin, end) in seconds.
      clips: rows of the clips, without what was dropped.
    """

    def __init__(self, settings: Mapping, measures: Callable[[], object]):
        self._frames, self._fps = settings["frames"], settings["fps"]
        self._most, self._trim = settings["clips_per_scene"], settings["cuts"]["trim_seconds"]
        self._measures = measures
        self.scenes: list[list[float]] = []
        self.clips: list[dict] = []
        self._begin: float | None = None  # of the scene; None between two
        self._done: list[Clip] = []
        self._clip: Clip | None = None
        self._before: Picture | None = None
        self._from = 0.0  # when the next clip may begin

    def add(self, step: Step) -> None:
        """Take the next picture."""
        picture = step.picture
        if step.gradual is not None:
            # The transition is behind us only now, so the next scene begins here.
            self._close(step.gradual[0])
        elif step.cut:
            self._fill(picture, inside=False)
            self._close(picture.time)
        if self._begin is None:
            trim = self._trim if self.scenes or step.gradual is not None else 0.0
            self._begin, self._from, self._before = picture.time, picture.time + trim, None
        self._fill(picture, inside=True)
        if self._clip is not None:
            self._clip.measure.passing(picture)
        self._before = picture

    def finish(self, end: float) -> None:
        """End the last scene with the video, at `end` seconds."""
        self._fill(None, inside=False, end=end)
        self._close(end, trimmed=False)

    def _fill(self, picture: Picture | None, *, inside: bool, end: float = math.inf) -> None:
        """Settle the frames that this picture decides: it is the first behind them, or there is none (at `end`)."""
        if self._begin is None:
            return
        while True:
            if self._clip is None:
                start = math.ceil(round(self._from / MILLISECOND, 3)) * MILLISECOND
                self._clip = Clip(round(start, 3), self._frames, self._fps, self._measures())
            clip, before = self._clip, self._before
            target = clip.times[clip.filled]
            if picture is None:
                if before is None or target >= end - TIE:
                    return
                clip.fill(before)
            elif picture.time + TIE < target:
                return
            elif before is not None and target - before.time <= picture.time - target + TIE:
                clip.fill(before)
            elif inside:
                clip.fill(picture)
            else:
                return
            if clip.is_full:
                self._done.append(clip)
                self._from, self._clip = clip.start + self._frames / self._fps, None

    def _close(self, end: float, *, trimmed: bool = True) -> None:
        """End the scene; clips that reach behind `end` are dropped."""
        begin, done, self._clip, self._done = self._begin, self._done, None, []
        self._begin = None
        if begin is None or end <= begin:
            return
        self.scenes.append([round(begin, 6), round(end, 6)])
        until = end - (self._trim if trimmed else 0.0)
        length = self._frames / self._fps
        # Its start was rounded up by up to a millisecond.
        fitting = [clip for clip in done if clip.start + length <= until + MILLISECOND + TIE and clip.last < end]
        if not fitting:
            self.clips.append(self._row(begin, end, None))
        if self._most and len(fitting) > self._most:
            fitting = [fitting[i] for i in np.rint(np.linspace(0, len(fitting) - 1, self._most)).astype(int)]
        for clip in fitting:
            self.clips.append(self._row(clip.start, min(clip.start + length, end), clip))

    def _row(self, start: float, end: float, clip: Clip | None) -> dict:
        # Rounded down, so that it does not reach over the cut.
        end = math.floor(round(end / MILLISECOND, 3)) * MILLISECOND
        row = {"start": round(start, 3), "end": round(end, 3), "frames": self._frames, "fps": self._fps}
        return row | {"scores": {} if clip is None else clip.measure.scores(), "too_short": clip is None}

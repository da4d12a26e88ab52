"""Clips of the scenes: which pictures each is made of, and its scores, collected while the pictures pass by once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from avd_jax.curation.cuts import Step
from avd_jax.curation.measures import ClipMeasures
from avd_jax.curation.pictures import Picture
from avd_jax.data.video import TIE


class Clip:
    """A clip that is being filled.

    Attributes:
      start: seconds, a whole number of milliseconds.
      times: of its frames, in seconds.
      filled: how many of its frames are known.
      last: time of the latest picture that it uses.
      measures: its scores, so far.
    """

    def __init__(self, start: float, frames: int, fps: float, measures: ClipMeasures):
        self.start, self.times = start, (start + np.arange(frames) / fps).tolist()
        self.filled, self.last, self.measures = 0, start, measures

    def fill(self, picture: Picture) -> None:
        """Take the picture as the next frame."""
        self.measures.frame(self.filled, picture)
        self.filled, self.last = self.filled + 1, picture.time


@dataclass
class Scene:
    """From one cut to the next; `margin` is what the clips keep away from its end, all in seconds."""

    begin: float
    end: float = math.inf
    margin: float = 0.0
    clips: list[Clip] = field(default_factory=list)


class ClipCutter:
    """Lays clips back to back into each scene.

    Frame i of a clip is the picture nearest to `start + i / fps`, as `data.video.read_video` has it. A clip is kept if
    it lasts no longer than its scene and all its pictures lie in there.
    """

    def __init__(self, settings: Mapping, measures: Callable[[], ClipMeasures]):
        """Begin a video.

        Args:
          settings: as `analysis.DEFAULTS`.
          measures: makes the measures of a new clip.
        """
        self._frames, self._fps = settings["frames"], settings["fps"]
        self._length = self._frames / self._fps
        self._most, self._trim = settings["clips_per_scene"], settings["cuts"]["trim_seconds"]
        self._measures = measures
        self._scenes: list[Scene] = []
        self._scene: Scene | None = None
        self._clip: Clip | None = None
        self._before: Picture | None = None  # in this scene
        self._from = 0.0  # seconds, when the next clip may begin

    def add(self, step: Step) -> None:
        """Take the next picture."""
        picture = step.picture
        for begin, end in step.gradual:
            self.end_before(begin, end)
        if step.cut:
            self._fill(picture, inside=False)
            self._end(picture.time, self._trim)
        if self._scene is None:
            self._scene = Scene(picture.time)
            # The first picture of a video is no cut.
            self._from = picture.time + (self._trim if picture.index else 0.0)
        self._fill(picture, inside=True)
        self._before = picture

    def finish(self, end: float) -> None:
        """End the last scene with the video, at `end` seconds."""
        self._fill(None, inside=False, end=end)
        self._end(end, 0.0)

    @property
    def scenes(self) -> list[list[float]]:
        """The scenes as [begin, end] in seconds."""
        return [[round(scene.begin, 6), round(scene.end, 6)] for scene in self._scenes]

    def rows(self) -> list[dict]:
        """Return a row for each clip, and for each scene that has none."""
        rows = []
        for scene in self._scenes:
            fitting = [clip for clip in scene.clips if self._fits(clip, scene)]
            if self._most and len(fitting) > self._most:
                fitting = [fitting[i] for i in np.rint(np.linspace(0, len(fitting) - 1, self._most)).astype(int)]
            for clip in fitting:
                end = min(clip.start + self._length, scene.end)
                rows.append(self._row(clip.start, end, clip.measures.scores(), too_short=False))
            if not fitting:
                rows.append(self._row(scene.begin, scene.end, {}, too_short=True))
        return rows

    def _fill(self, picture: Picture | None, *, inside: bool, end: float = math.inf) -> None:
        """Settle the frames that this picture decides: it is the first behind them, or there is none (at `end`)."""
        while self._scene is not None:
            if self._clip is None:
                self._clip = Clip(_up(self._from), self._frames, self._fps, self._measures())
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
            if clip.filled == self._frames:
                self._scene.clips.append(clip)
                self._from, self._clip = clip.start + self._length, None

    def _end(self, end: float, margin: float) -> None:
        if self._scene is not None and self._scene.begin < end:
            self._scene.end, self._scene.margin = end, margin
            self._scenes.append(self._scene)
        self._scene = self._clip = self._before = None

    def end_before(self, begin: float, end: float) -> None:
        """End all scenes before a gradual transition, of which nothing was known until it was over."""
        if self._scene is not None and self._scene.begin < end:
            self._end(math.inf, self._trim)
        while self._scenes and self._scenes[-1].begin >= begin:
            self._scenes.pop()
        if self._scenes and self._scenes[-1].end > begin:
            self._scenes[-1].end, self._scenes[-1].margin = begin, self._trim

    def _fits(self, clip: Clip, scene: Scene) -> bool:
        # Its start was rounded up by up to a millisecond.
        return clip.start + self._length <= scene.end - scene.margin + 0.001 + TIE and clip.last < scene.end

    def _row(self, start: float, end: float, scores: dict, *, too_short: bool) -> dict:
        row = {"start": _up(start), "end": _down(end), "frames": self._frames, "fps": self._fps}
        return row | {"scores": scores, "too_short": too_short}


def _up(seconds: float) -> float:
    """Return the next whole millisecond: a scene begins there or before."""
    return math.ceil(round(seconds * 1000, 3)) / 1000


def _down(seconds: float) -> float:
    """Return the whole millisecond before, so that a clip ends in its scene."""
    return math.floor(round(seconds * 1000, 3)) / 1000

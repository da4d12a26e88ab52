"""Clips to encode, from rows of captions and the videos that they are about."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from avd_jax.data.captions import Row, video_folder
from avd_jax.data.video import ROUNDING, duration, frame_rate_and_size, read_video
from avd_jax.errors import UserError

WAN_SIZE: Mapping[str, int] = {"frames": 81, "height": 480, "width": 832}  # what Wan was trained on
READ_THREADS = 4  # that look at, or decode, files at once


@dataclass(frozen=True)
class Clip:
    """One clip that can be encoded.

    Attributes:
      clip_id: unique and the same in every run.
      caption: what is seen.
      source: the file the clip is cut from.
      read: returns float32 [F H W 3] in [-1, 1]; a UserError from it skips the clip.
      scores: name -> number, of curation.
    """

    clip_id: str
    caption: str
    source: str
    read: Callable[[], np.ndarray]
    scores: Mapping[str, float] = field(default_factory=dict)


def check_clip_size(*, frames: int, height: int, width: int, prefix: str = "") -> None:
    """Raise a UserError if Wan's VAE and transformer cannot take clips of this size.

    Args:
      frames: must be 4n + 1.
      height: pixels, a multiple of 16.
      width: likewise.
      prefix: what the user writes before these names, for the message.
    """
    if frames < 1 or frames % 4 != 1:
        raise UserError(f"{prefix}frames {frames} is not 4n+1; try {max(0, frames // 4) * 4 + 1}.")
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 16 or pixels % 16:
            raise UserError(f"{prefix}{name} {pixels} is not a multiple of 16; try {max(1, pixels // 16) * 16}.")


def clips_of(
    rows: Sequence[Row],
    folder: str | os.PathLike,
    *,
    frames: int,
    fps: float,
    height: int,
    width: int,
    clips_per_video: int = 1,
) -> tuple[list[Clip], list[str]]:
    """Return the clips that rows of captions ask for, in their order, and why others are left out.

    A row with a start or an end is one clip, from the start on (0 without one), of frames before the end only. One
    that would reach beyond its end is left out. Of a row without them the first clip starts with its video; further
    ones, as many as fit without overlap, are spread evenly. A row whose file is missing gives a clip that cannot be
    read.

    Args:
      rows: see `read_captions`.
      folder: to which their names are relative.
      frames: of each clip.
      fps: frames per second of each clip.
      height: pixels.
      width: pixels.
      clips_per_video: the most clips to take from one video; above 1 no row may have a start or an end.

    Raises:
      UserError: a row has a start or an end, though several clips a video are asked for.
    """
    folder, length = video_folder(folder), frames / fps
    clips, left_out = [], []
    for row in rows:
        path, cut = folder / row.name, row.start is not None or row.end is not None
        if cut and clips_per_video > 1:
            raise UserError(
                f"{row.where}: says where its clip lies, so it is one clip; leave out --clips_per_video, or its start."
            )
        if row.end is not None and (row.start or 0.0) + length > row.end + ROUNDING:
            left_out.append(
                f"{row.name}@{row.start or 0.0:.3f}: a clip of {frames} frames at {fps:g} fps reaches beyond its end, "
                f"{row.end:g} s ({row.where})."
            )
            continue
        for start in [row.start or 0.0] if cut else _starts(path, length, clips_per_video):
            size = {"frames": frames, "fps": fps, "height": height, "width": width}
            read = partial(read_video, path, **size, start=start, end=row.end)
            clips.append(Clip(f"{row.name}@{start:.3f}", row.caption, row.name, read, row.scores))
    return clips, left_out


def read_sizes(text: str, *, frames: int) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of `480x832,832x480`.

    Raises:
      UserError: it is not written so, one of them is a size that the networks cannot take, or two have the same aspect
        ratio, of which no video would go to the second.
    """
    sizes: list[tuple[int, int]] = []
    for part in text.split(","):
        height, times, width = part.strip().lower().partition("x")
        if not (times and height.isdecimal() and width.isdecimal()):
            raise UserError(f"--sizes {part!r}: write HEIGHTxWIDTH with commas between, as 480x832,832x480.")
        size = int(height), int(width)
        check_clip_size(frames=frames, height=size[0], width=size[1], prefix="--sizes ")
        if same := [other for other in sizes if other[0] * size[1] == other[1] * size[0]]:
            raise UserError(
                f"--sizes {part.strip()} has the aspect ratio of {same[0][0]}x{same[0][1]}; give one of the two."
            )
        sizes.append(size)
    return sizes


def by_size(
    rows: Sequence[Row], folder: str | os.PathLike, sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], list[Row]]:
    """Return size -> the rows of the videos whose aspect ratio is nearest to it, on a logarithmic scale.

    A video right between two sizes goes to the first of them, and so does one that cannot be read, to be reported when
    it is encoded.

    Args:
      rows: see `read_captions`.
      folder: to which their names are relative.
      sizes: (height, width), of different aspect ratios.
    """
    folder, names = video_folder(folder), list(dict.fromkeys(row.name for row in rows))

    def nearest(name: str) -> tuple[int, int]:
        try:
            _, height, width = frame_rate_and_size(folder / name)
        except UserError:
            return sizes[0]
        # Rounded, so that what is equally far on paper is so here.
        return min(sizes, key=lambda size: round(abs(math.log(width * size[0] / (height * size[1]))), 9))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        chosen = dict(zip(names, pool.map(nearest, names), strict=True))
    return {size: [row for row in rows if chosen[row.name] == size] for size in sizes}


def _starts(path: Path, length: float, most: int) -> list[float]:
    if most == 1:
        return [0.0]
    try:
        total = duration(path)
    except UserError:
        return [0.0]  # reading that one clip reports what is wrong with the file
    # Containers round time stamps to milliseconds, and the length is a difference of two.
    count = max(1, min(most, math.floor((total + ROUNDING) / length)))
    spare = max(0.0, total - length) / max(1, count - 1)
    # Whole milliseconds, so that the name of a clip says its start exactly.
    return [math.floor(1000 * i * spare + 1e-6) / 1000 for i in range(count)]

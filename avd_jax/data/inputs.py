"""Clips to encode, from a folder of videos and a file of captions."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from avd_jax.data.video import duration, read_video
from avd_jax.errors import UserError, closest

ROUNDING = 0.0015  # seconds
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})


@dataclass(frozen=True)
class Clip:
    """One clip that can be encoded.

    Attributes:
      clip_id: unique and the same in every run.
      caption: what is seen.
      source: the file the clip is cut from.
      read: returns float32 [F H W 3] in [-1, 1]; a UserError from it skips the clip.
    """

    clip_id: str
    caption: str
    source: str
    read: Callable[[], np.ndarray]


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


def read_captions(path: str | os.PathLike) -> dict[str, str]:
    """Return file name -> caption, in the order of a file with one `{"file": ..., "caption": ...}` a line.

    Empty lines are passed over. A UserError names the line that is wrong, or names a file for the second time.
    """
    captions: dict[str, str] = {}
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not a JSON object ({error.msg}, column {error.colno}).") from error
        if not isinstance(entry, dict):
            raise UserError(f'{where}: is not a JSON object; write {{"file": "a.mp4", "caption": "..."}}.')
        for key in ("file", "caption"):
            if key not in entry:
                raise UserError(f"{where}: has no {key!r}{closest(key, entry)}.")
            if not isinstance(entry[key], str) or not entry[key].strip():
                raise UserError(f"{where}: {key!r} is not a text, or is empty.")
        name = os.path.normpath(entry["file"])
        if name in captions:
            raise UserError(f"{where}: {entry['file']} has a caption already; use one line a file.")
        captions[name] = entry["caption"].strip()
    if not captions:
        raise UserError(f"{path}: holds no captions.")
    return captions


def clips_from_folder(
    folder: str | os.PathLike,
    captions: dict[str, str],
    *,
    frames: int,
    fps: float,
    height: int,
    width: int,
    clips_per_video: int = 1,
) -> tuple[list[Clip], list[str]]:
    """Return the clips of the captioned videos, and the names of the videos without a caption.

    The first clip starts with its video; further ones, as many as fit without overlap, are spread evenly. Clips
    come in the order of the captions; a caption whose file is missing gives a clip that cannot be read.

    Args:
      folder: searched with its subfolders.
      captions: file name, relative to the folder, -> caption.
      frames: of each clip.
      fps: frames per second of each clip.
      height: pixels.
      width: pixels.
      clips_per_video: the most clips to take from one video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder of videos.")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
    uncaptioned = sorted({str(path.relative_to(folder)) for path in found} - set(captions))
    clips = []
    for name, caption in captions.items():
        path = folder / name
        for start in _starts(path, frames / fps, clips_per_video):
            read = partial(read_video, path, frames=frames, fps=fps, height=height, width=width, start=start)
            clips.append(Clip(clip_id=f"{name}@{start:.3f}", caption=caption, source=name, read=read))
    return clips, uncaptioned


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


def _read_lines(path: str | os.PathLike) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error

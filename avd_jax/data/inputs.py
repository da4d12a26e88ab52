"""Clips to encode, from a folder of videos and a file of captions."""

import functools
import math
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from avd_jax.data.records import Record, check_text, lower_keys, printable, read_records, read_text
from avd_jax.data.video import duration, read_video
from avd_jax.errors import UserError, closest
from avd_jax.paths import local_path

ROUNDING = 0.0015  # seconds
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})
# As the layouts that people bring spell them; the first is ours.
NAME_FIELDS = ("file", "file_name", "video_path", "path", "video")
CAPTION_FIELDS = ("caption", "cap", "text", "prompt")


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


def read_captions(path: str | os.PathLike | None, folder: str | os.PathLike | None = None) -> dict[str, str]:
    """Return file name -> caption, in the order of the file.

    Args:
      path: None for the captions beside the videos (see `read_sidecars`), else a list (see `read_records`) of which
        every entry has a name, in a field `file`, `file_name`, `video_path`, `path` or `video`, and a caption, in
        `caption`, `cap`, `text` or `prompt`; the first of them counts.
      folder: of the videos; names become those of the files there, relative to it, however Unicode composes them,
        whether they are absolute, and with `/` for a `\\` of Windows. Names of files elsewhere stay as they are.

    Raises:
      UserError: names the line that is wrong, or both lines that name one file.
    """
    if path is None:
        return read_sidecars(folder)
    captions: dict[str, str] = {}
    lines: dict[str, str] = {}
    names = _Names(folder)
    records = read_records(path, NAME_FIELDS)
    if records is None:
        raise UserError(f'{path}: is no list of captions; write one {{"file": "a.mp4", "caption": "..."}} a line.')
    for record in records:
        where = record.where
        if not isinstance(record.value, dict):
            raise UserError(f'{where}: is not a JSON object; write {{"file": "a.mp4", "caption": "..."}}.')
        written = _field(record, "the name", NAME_FIELDS)
        caption = _field(record, "the caption", CAPTION_FIELDS).strip()
        try:
            name, identity = names.find(written)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if identity in lines:
            raise UserError(f"{where}: {written} has a caption already, in {lines[identity]}; use one line a file.")
        captions[name], lines[identity] = caption, where
    if not captions:
        raise UserError(f"{path}: holds no captions.")
    return captions


def read_sidecars(folder: str | os.PathLike) -> dict[str, str]:
    """Return file name -> caption of the videos below a folder, in the order of the names: `a.txt` is that of `a.mp4`.

    A video without such a file, or with an empty one, has no caption.

    Raises:
      UserError: none has one, or a file or a name is not UTF-8.
    """
    folder = _video_folder(folder)
    found = _files_in(folder)
    texts = {_composed(name.with_suffix("")): name for name in found if name.suffix.lower() == ".txt"}
    captions = {}
    for name in sorted(filter(_is_video, found)):
        if (beside := texts.get(_composed(name.with_suffix("")))) is None:
            continue
        check_text(printable(f"{folder / name}"), "its name", str(name))
        if caption := read_text(folder / beside).strip():
            captions[str(name)] = caption
    if not captions:
        raise UserError(f"{folder}: no video has a caption; give --captions, or write a.txt beside a.mp4.")
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
    folder = _video_folder(folder)
    uncaptioned = sorted({str(name) for name in filter(_is_video, _files_in(folder))} - set(captions))
    clips = []
    for name, caption in captions.items():
        path = folder / name
        for start in _starts(path, frames / fps, clips_per_video):
            read = partial(read_video, path, frames=frames, fps=fps, height=height, width=width, start=start)
            clips.append(Clip(clip_id=f"{name}@{start:.3f}", caption=caption, source=name, read=read))
    return clips, [printable(name) for name in uncaptioned]


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


class _Names:
    """Which file a name means."""

    def __init__(self, folder: str | os.PathLike | None):
        self._folder = None if folder is None else _video_folder(folder)
        self._root = self._folder and Path(os.path.realpath(self._folder))
        self._real_folder = functools.lru_cache(os.path.realpath)

    def find(self, written: str) -> tuple[str, str]:
        """Return the name to use, and what two names of one file have in common.

        Raises:
          UserError: a scheme that is not supported.
        """
        if self._folder is None:
            name = os.path.normpath(local_path(written))
            return name, _composed(name)
        if os.path.isfile(self._folder / written):
            path = Path(written)
        else:
            path = local_path(written.replace("\\", "/"))
        name = self._relative(path)
        if not os.path.isfile(self._folder / name):
            name = self._on_disk.get(_composed(name), name)
        file = self._folder / name
        identity = os.path.join(self._real_folder(file.parent), file.name)
        return name, identity if file.exists() else _composed(identity)

    def _relative(self, path: Path) -> str:
        """Return a path relative to the folder if it lies in there, else as it is."""
        full = Path(os.path.abspath(self._folder / path))
        places = ((full, Path(os.path.abspath(self._folder))),)
        if path.is_absolute() or ".." in path.parts:  # the folder, or one above it, may be a link
            places += ((Path(self._real_folder(full.parent)) / full.name, self._root),)
        for file, root in places:
            if file.is_relative_to(root):
                return str(file.relative_to(root))
        return os.path.normpath(path)

    @functools.cached_property
    def _on_disk(self) -> dict[str, str]:
        return {_composed(name): str(name) for name in _files_in(self._folder)}


def _video_folder(path: str | os.PathLike) -> Path:
    folder = local_path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder of videos.")
    return folder


def _files_in(folder: Path) -> list[Path]:
    """Return the files below a folder, relative to it."""
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def _is_video(name: Path) -> bool:
    return name.suffix.lower() in VIDEO_SUFFIXES


def _composed(name: str | Path) -> str:
    """Return a name with its letters composed: on disk macOS may have their accents apart, which look the same."""
    return unicodedata.normalize("NFC", str(name))


def _field(record: Record, what: str, names: Sequence[str]) -> str:
    fields = lower_keys(record.value)
    key = next((name for name in names if fields.get(name) is not None), None)
    if key is None:
        raise UserError(f"{record.where}: has no {names[0]!r}{closest(names[0], fields)}.")
    value = fields[key]
    if isinstance(value, list) and len(value) == 1:  # videos2caption.json has its one caption in a list
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{record.where}: {key!r} is not a text, or is empty.")
    check_text(record.where, what, value)
    return value

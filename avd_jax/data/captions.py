"""What users write about their videos: rows of file, caption and, for a clip within the file, its start and end."""

import functools
import json
import math
import os
import posixpath
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avd_jax.data.records import Record, check_text, lower_keys, printable, read_records, read_text
from avd_jax.errors import UserError, closest
from avd_jax.paths import any_path, is_bucket, local_path

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})
# As the layouts that people bring spell them; the first is ours.
NAME_FIELDS = ("file", "file_name", "video_path", "path", "video")
CAPTION_FIELDS = ("caption", "cap", "text", "prompt")
SPAN_FIELD = "duration_span"  # cosmos-curate's, [start, end]


@dataclass(frozen=True)
class Row:
    """One entry of a list of captions.

    Attributes:
      name: of the file, relative to the folder of the videos if it lies in there.
      caption: what is seen.
      start: seconds after the first frame of the video; None: clips are cut anywhere.
      end: seconds; no frame from there on belongs to the clip. None: the end of the video.
      scores: name -> number, of curation.
      where: file and line, for messages.
    """

    name: str
    caption: str
    start: float | None = None
    end: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    where: str = ""


def video_folder(path: str | os.PathLike) -> Path:
    """Return the path of a folder (UserError if it is none)."""
    folder = any_path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder of videos.")
    return folder


def read_captions(path: str | os.PathLike | None, folder: str | os.PathLike | None = None) -> list[Row]:
    """Return the rows of a list of captions, in its order.

    Args:
      path: None for the captions beside the videos (see `read_sidecars`), else a list (see `read_records`) of which
        every entry has a name, in a field `file`, `file_name`, `video_path`, `path` or `video`, and a caption, in
        `caption`, `cap`, `text` or `prompt`; the first of them counts. It may have `start` and `end` in seconds, or
        `duration_span`, both of them; and `scores`, an object of names and numbers, or of objects with a `value`, of
        which those that are numbers are kept.
      folder: of the videos, None for that of the list; names become those of the files there, relative to it, however
        Unicode composes them, whether they are absolute, and with `/` for a `\\` of Windows. Names of files elsewhere
        stay as they are.

    Raises:
      UserError: names the line that is wrong, or both lines that say the same of one file.
    """
    if path is None:
        return read_sidecars(folder)
    records = read_records(path, NAME_FIELDS)
    if records is None:
        raise UserError(f'{path}: is no list of captions; write one {{"file": "a.mp4", "caption": "..."}} a line.')
    rows: list[Row] = []
    lines: dict[tuple[str, str], str] = {}
    names = _Names(any_path(path).parent if folder is None else folder)
    for record in records:
        where = record.where
        if not isinstance(record.value, dict):
            raise UserError(f'{where}: is not a JSON object; write {{"file": "a.mp4", "caption": "..."}}.')
        written = _field(record, "the name", NAME_FIELDS)
        caption = _field(record, "the caption", CAPTION_FIELDS).strip()
        start, end = _span(record)
        try:
            name, identity = names.find(written)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        key = identity, f"{start or 0:.3f}"
        if key in lines:
            at = "" if start is None else f" at {start:g} s"
            raise UserError(
                f"{where}: {written}{at} has a caption already, in {lines[key]}; use one line a file, or a clip."
            )
        lines[key] = where
        rows.append(Row(name, caption, start, end, _scores(record), where))
    if not rows:
        raise UserError(f"{path}: holds no captions.")
    return rows


def read_sidecars(folder: str | os.PathLike) -> list[Row]:
    """Return a row for each captioned video below a folder, in the order of the names: `a.txt` is that of `a.mp4`.

    A video without such a file, or with an empty one, has no caption.

    Raises:
      UserError: none has one, or a file or a name is not UTF-8.
    """
    folder = video_folder(folder)
    found = files_in(folder)
    texts = {_composed(name.with_suffix("")): name for name in found if name.suffix.lower() == ".txt"}
    rows = []
    for name in sorted(filter(is_video, found)):
        if (beside := texts.get(_composed(name.with_suffix("")))) is None:
            continue
        check_text(printable(f"{folder / name}"), "its name", str(name))
        if caption := read_text(folder / beside).strip():
            rows.append(Row(str(name), caption, where=str(folder / beside)))
    if not rows:
        raise UserError(f"{folder}: no video has a caption; give --captions, or write a.txt beside a.mp4.")
    return rows


def without_caption(folder: str | os.PathLike, rows: Sequence[Row]) -> list[str]:
    """Return the names of the videos below a folder of which no row speaks, sorted and printable."""
    names = {str(name) for name in filter(is_video, files_in(video_folder(folder)))} - {row.name for row in rows}
    return [printable(name) for name in sorted(names)]


def files_in(folder: Path) -> list[Path]:
    """Return the files below a folder, relative to it."""
    return [path.relative_to(folder) for path in folder.rglob("*") if is_bucket(path) or path.is_file()]


def is_video(name: Path) -> bool:
    """Return whether a file's name is that of a video."""
    return name.suffix.lower() in VIDEO_SUFFIXES


class _Names:
    """Which file a name means."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = video_folder(folder)
        self._root = Path(os.path.realpath(self._folder))
        self._real_folder = functools.lru_cache(os.path.realpath)
        self._entries = functools.lru_cache(_entries)

    def find(self, written: str) -> tuple[str, str]:
        """Return the name to use, and what two names of one file have in common.

        Raises:
          UserError: a scheme that is not supported.
        """
        if is_bucket(self._folder):
            return self._in_bucket(written)
        if os.path.isfile(self._folder / written):
            path = Path(written)
        else:
            path = local_path(written.replace("\\", "/"))
        name = self._relative(path)
        if not os.path.isfile(self._folder / name):
            name = self._as_on_disk(name)
        file = self._folder / name
        identity = os.path.join(self._real_folder(file.parent), file.name)
        return name, identity if file.exists() else _composed(identity)

    def _in_bucket(self, written: str) -> tuple[str, str]:
        file = any_path(written) if is_bucket(written) else self._folder / posixpath.normpath(written)
        inside = file.is_relative_to(self._folder)
        return str(file).removeprefix(f"{self._folder}/") if inside else str(file), str(file)

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

    def _as_on_disk(self, name: str) -> str:
        """Return a name with each of its parts composed as on disk, if it is there."""
        parts: list[str] = []
        for part in Path(name).parts:
            parts.append(self._entries(self._folder.joinpath(*parts)).get(_composed(part), part))
        return str(Path(*parts))


def _entries(folder: Path) -> dict[str, str]:
    try:
        return {_composed(name): name for name in os.listdir(folder)}
    except OSError:
        return {}


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
        raise UserError(
            f"{record.where}: {key!r} is not a text, or is empty; fill it in (curate.py: config.caption.endpoint)."
        )
    check_text(record.where, what, value)
    return value


def _span(record: Record) -> tuple[float | None, float | None]:
    """Return the start and the end that a row gives, in seconds, each None if it is not there."""
    fields, where = lower_keys(record.value), record.where
    given = {name: fields.get(name) for name in ("start", "end")}
    if (span := _parsed(fields.get(SPAN_FIELD))) is not None:
        if not isinstance(span, list) or len(span) != 2 or None in span:
            raise UserError(f"{where}: {SPAN_FIELD!r} is not [start, end] in seconds.")
        given |= {name: value for name, value in zip(given, span, strict=True) if given[name] in (None, "")}
    start, end = (_seconds(where, name, value) for name, value in given.items())
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: 'end' is {end:g} s, not after the start, {start or 0.0:g} s.")
    return start, end


def _seconds(where: str, name: str, value: object) -> float | None:
    if value is None or value == "":
        return None
    seconds = _number(value)
    if seconds is None or seconds < 0:
        raise UserError(f"{where}: {name!r} is {value!r}; write seconds after the beginning of the video, as 12.5.")
    return seconds


def _scores(record: Record) -> dict[str, float]:
    """Return the scores of a row that are numbers."""
    scores = _parsed(lower_keys(record.value).get("scores"))
    if scores is None:
        return {}
    if not isinstance(scores, dict):
        raise UserError(f"{record.where}: 'scores' is not an object of names and numbers.")
    found = {}
    for name, score in scores.items():
        check_text(record.where, "the name of a score", name)
        value = score.get("value") if isinstance(score, dict) else score
        number = _number(value)
        if number is not None:
            found[name] = number
        elif (not isinstance(score, dict) and score is not None) or isinstance(value, (int, float)):
            raise UserError(f"{record.where}: the score {name!r} is {value!r}, not a number.")
    return found


def _parsed(value: object) -> object:
    """Return what a cell of a table holds as JSON, a text where it is none; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _number(value: object) -> float | None:
    """Return a finite number, or a text of one, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or "_" in str(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None

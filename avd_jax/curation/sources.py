"""Which videos there are to curate: of a folder, or of a list that may bring captions."""

import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from avd_jax.data.captions import CAPTION_FIELDS, NAME_FIELDS, VIDEO_SUFFIXES
from avd_jax.data.records import Record, check_text, lower_keys, printable, read_records, read_text
from avd_jax.errors import UserError, closest
from avd_jax.paths import local_path


@dataclass(frozen=True)
class Source:
    """One video, readable or not.

    Attributes:
      name: the path relative to the folder, or to the folder of the list, with `/`; the one of a file elsewhere is
        absolute.
      path: of the file.
      caption: the one that came with it, or None.
      problem: why it cannot be used, or None.
    """

    name: str
    path: Path
    caption: str | None = None
    problem: str | None = None


def find(videos: str | os.PathLike) -> list[Source]:
    """Return the videos of a folder with its subfolders, or of a list, in the order of their names.

    A folder's captions are the texts beside the videos, `a.txt` for `a.mp4`. A list is JSON lines, JSON, CSV or TSV
    (`records.read_records`); its fields are spelled as in `captions.NAME_FIELDS` and `CAPTION_FIELDS`, and a caption
    may be missing.

    Raises:
      UserError: there is no such folder or list, it cannot be read, holds no videos, or a line of it names none.
    """
    path = local_path(videos)
    if path.is_dir():
        found = list(_of_folder(path))
        if not found:
            raise UserError(f"{path}: holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))}); name their folder")
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        raise UserError(f"{path}: is no folder of videos; name the folder that a video is in, or a list of videos")
    else:
        if not path.exists():
            raise UserError(f"{path}: there is no such folder of videos, or list of them")
        found = list(_of_list(path))
        if not found:
            raise UserError(f"{path}: names no videos")
    return sorted(found, key=lambda source: source.name)


def _of_folder(folder: Path) -> Iterator[Source]:
    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend its permissions") from error

    for place, names in _folders(folder, stop):
        texts = {_stem(name): name for name in names if name.lower().endswith(".txt")}
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() not in VIDEO_SUFFIXES or not os.path.isfile(path):
                continue
            beside = texts.get(_stem(name))
            try:
                caption = " ".join(read_text(path.with_name(beside)).split()) if beside else ""
            except UserError as error:
                yield _source(folder, path, problem=str(error))
            else:
                yield _source(folder, path, caption=caption)


def _folders(top: Path, stop: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below, once, with the names of its files; links last, so that they take no folder its name."""
    seen, waiting = set(), [str(top)]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=stop):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:  # a link to what is above it, or a second way there
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()
            waiting += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            yield place, names


def _of_list(path: Path) -> Iterator[Source]:
    records = read_records(path, NAME_FIELDS)
    if records is None:
        raise UserError(f'{path}: is no list of videos; write one {{"file": "a.mp4"}} a line, or give their folder')
    lines: dict[str, str] = {}
    for record in records:
        written = _text(record, NAME_FIELDS)
        if written is None:
            hint = closest(NAME_FIELDS[0], lower_keys(record.value))
            raise UserError(f"{record.where}: has no {NAME_FIELDS[0]!r}{hint}; it names a video")
        caption = " ".join((_text(record, CAPTION_FIELDS) or "").split())
        try:
            source = _source(path.parent, _file(path.parent, written), caption=caption)
        except UserError as error:
            source = Source(printable(written), Path(written), problem=str(error))
        if source.name in lines:
            raise UserError(
                f"{record.where}: {written} is named already, in {lines[source.name]}; use one line a video"
            )
        lines[source.name] = record.where
        yield source


def _source(folder: Path, path: Path, *, caption: str = "", problem: str | None = None) -> Source:
    """Return the source at a path; `folder` is where names begin."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    name = (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
    if printable(name) != name:
        problem = "its name is not UTF-8; rename it"
    elif problem is None and not os.path.isfile(path):
        there = "is a folder; name its files" if os.path.isdir(path) else "is no file that can be searched"
        problem = there if os.path.exists(path) else "there is no such file"
    return Source(printable(name), path, caption or None, problem)


def _file(folder: Path, written: str) -> Path:
    """Return the file that a name in a list means: relative to the list, however its letters are composed."""
    spellings = (written, written.replace("\\", "/"))
    spellings += tuple(unicodedata.normalize(form, spellings[1]) for form in ("NFC", "NFD"))
    paths = [folder / local_path(spelling) for spelling in spellings]
    return next((path for path in paths if os.path.isfile(path)), paths[1])


def _text(record: Record, names: tuple[str, ...]) -> str | None:
    """Return the first of some fields of a record that is not empty."""
    if not isinstance(record.value, dict):
        raise UserError(f'{record.where}: is not a JSON object; write {{"file": "a.mp4"}}')
    fields = lower_keys(record.value)
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 1:  # videos2caption.json has its one caption in a list
            value = value[0]
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str):
            raise UserError(f"{record.where}: {name!r} is not a text")
        check_text(record.where, repr(name), value)
        return value.strip()
    return None


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", name.rpartition(".")[0])

"""Finished results, a small file each, kept with all that they were made from: whoever asks for the same need not wait.

A file is written whole or not at all, so that a killed run leaves nothing half done. Results of other settings, or of
a video that has changed, count as missing and are overwritten.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError


class Store:
    """A folder of results by kind, such as `analysis`, and name, such as that of a video."""

    def __init__(self, folder: str | os.PathLike):
        """Open the folder; it is made when something is written."""
        self.folder = Path(folder)

    def get(self, kind: str, name: str, made_from: Mapping) -> object | None:
        """Return the result that was kept under this name and made from the same, or None."""
        try:
            text = self._path(kind, name).read_text(encoding="utf-8")
            kept = json.loads(text, parse_constant=lambda _: None)  # JSON knows neither NaN nor infinity
            return kept["result"] if _canonical(kept["made_from"]) == _canonical(made_from) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing, or damaged by something else than this program: made again

    def put(self, kind: str, name: str, made_from: Mapping, result: object) -> None:
        """Keep a result, which is anything that JSON can hold.

        Raises:
          UserError: it cannot be written.
        """
        text = json.dumps({"name": name, "made_from": made_from, "result": result}, ensure_ascii=False)
        with writing(self.folder):
            write_text(self._path(kind, name), f"{text}\n")

    def _path(self, kind: str, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return self.folder / kind / digest[:2] / f"{digest}.json"  # file systems dislike folders of a million files


def identity(name: str, path: Path) -> dict:
    """Return what a result of a video is made from besides settings: name, size and time of its last change.

    Raises:
      OSError: the file is gone, or must not be looked at.
    """
    stat = os.stat(path)
    return {"source": name, "bytes": stat.st_size, "modified": stat.st_mtime_ns}


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says while something is written into a line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{folder}: the disk is full; free some space, then the same command goes on where it stopped"
            ) from error
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another folder") from error


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)

"""Paths in a bucket of Google Cloud Storage, with the methods that `pathlib.Path` has where they make sense there.

A bucket holds objects under names with slashes; folders are only what such names have in common. So an object appears
whole or not at all when its upload ends, making a folder does nothing, and nothing can be appended to or renamed.
"""

import fnmatch
import functools
import io
import os
import re
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
from etils import epath

from avd_jax.bucket_requests import FileSystem

_RANGE_BYTES = 32 * 2**20  # of a large object that are read at once
_RANGES_AT_ONCE = 4
_ONE_UPLOAD_BYTES = 8 * 2**20  # what is smaller is uploaded with one request


class BucketPath(epath.gpath.PosixGPath):
    """A path `gs://bucket/name`; errors are those of `FileSystem`."""

    @property
    def _bucket(self) -> str:
        return self.parts[2]

    @property
    def _key(self) -> str:
        return "/".join(self.parts[3:])

    def exists(self) -> bool:
        """Whether there is an object of this name, or one in such a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            return bool(self._key) and bool(self._about())
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there is an object in such a folder; a bucket is one."""
        page = self._page(prefix=self._prefix, maxResults=1)
        return not self._key or bool(page.get("items") or page.get("prefixes"))

    def is_symlink(self) -> bool:
        """There are none."""
        return False

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield what is in the folder, in the order of names (FileNotFoundError if it does not exist)."""
        start = len(self._prefix)
        names = {name[start:].strip("/") for name in self._names(delimiter="/")} - {""}
        if not names and self._key:
            raise FileNotFoundError(2, "no such folder", str(self))
        yield from (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield what matches a pattern, folder by folder; of `**` only what `rglob` does."""
        first, _, rest = pattern.partition("/")
        if first == "**":
            yield from self.rglob(rest)
            return
        if any(sign in first for sign in "*?["):
            try:
                found = [child for child in self.iterdir() if fnmatch.fnmatchcase(child.name, first)]
            except FileNotFoundError:
                return
        else:
            found = [self / first]
        for child in found:
            if rest:
                yield from child.glob(rest)
            elif (first == child.name and child.exists()) or first != child.name:
                yield child

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the objects below the folder whose last name matches, and no folders."""
        for name in sorted(self._names()):
            path = self._new(f"gs://{self._bucket}/{name}")
            if not name.endswith("/") and fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def stat(self) -> types.SimpleNamespace:
        """Return `st_size` and `generation`, which is another one for each content that an object had."""
        about = self._about()
        return types.SimpleNamespace(st_size=int(about.get("size", 0)), generation=str(about.get("generation", "")))

    def read_bytes(self) -> bytes:
        """Return an object's bytes, with one request."""
        return self._get({})

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return an object's text, with one request."""
        return self.read_bytes().decode(encoding, errors)

    def read_range(self, start: int, stop: int) -> bytes | bytearray:
        """Return the bytes from `start` to before `stop`, large ranges with several requests at once."""
        if stop <= start:
            return b""
        starts = range(start, stop, _RANGE_BYTES)
        parts = _together(lambda first: self._part(first, min(first + _RANGE_BYTES, stop)), starts)
        if len(starts) == 1:
            return next(parts)
        whole = bytearray(stop - start)  # joined at the end, the parts would need their memory twice
        for first, part in zip(starts, parts, strict=True):
            whole[first - start : first - start + len(part)] = part
        return whole

    def open(self, mode: str = "r", *, encoding: str | None = None, errors: str | None = None, newline=None, **_):
        """Open for reading; writing is for `write_bytes`, `write_text` and `upload`, whose objects are whole."""
        if mode == "rb":
            return io.BufferedReader(_Reader(self), buffer_size=2**20)
        if mode in ("r", "rt"):
            return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding or "utf-8", errors, newline)
        raise io.UnsupportedOperation(f"{self}: opened for {mode!r}; an object in a bucket is written whole")

    def write_bytes(self, data: bytes, *, generation: str | None = None) -> str:
        """Write an object, with one request; returns its generation.

        Args:
          data: its content.
          generation: write only over this one, "0" if there must be none (else FileExistsError).
        """
        condition = {} if generation is None else {"ifGenerationMatch": generation}
        _, answer = _files().call(
            "POST",
            f"{_files()._location}/upload/storage/v1/b/{self._bucket}/o",
            data=bytes(data),
            headers={"Content-Type": "application/octet-stream"},
            uploadType="media",
            name=self._key,
            **condition,
        )
        found = re.search(rb'"generation":\s*"?(\d+)', answer)
        return found[1].decode() if found else ""

    def write_text(self, data: str, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Write an object, with one request; returns its generation."""
        return self.write_bytes(data.encode(encoding, errors))

    def upload(self, local: str | os.PathLike) -> None:
        """Write an object from a local file; it appears once all of it is there."""
        if os.path.getsize(local) < _ONE_UPLOAD_BYTES:
            with open(local, "rb") as file:
                self.write_bytes(file.read())
            return
        _files().put_file(os.fspath(local), str(self))

    def download(self, local: str | os.PathLike) -> None:
        """Copy an object to a local file."""
        size = self.stat().st_size
        starts = range(0, size, _RANGE_BYTES)
        with open(local, "wb") as file:
            for part in _together(lambda first: self._part(first, min(first + _RANGE_BYTES, size)), starts):
                file.write(part)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            _files().call("DELETE", "b/{}/o/{}", self._bucket, self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects of a folder."""
        names = list(self._names())
        if not names and not missing_ok:
            raise FileNotFoundError(2, "no such folder", str(self))
        for _ in _together(lambda name: self._new(f"gs://{self._bucket}/{name}").unlink(missing_ok=True), names):
            pass

    def rmdir(self) -> None:
        """Do nothing: a folder is gone with its last object."""

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with its first object."""

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Return itself."""
        return self

    def absolute(self) -> "BucketPath":
        """Return itself."""
        return self

    @property
    def _prefix(self) -> str:
        return f"{self._key}/" if self._key else ""

    def _about(self) -> dict:
        return _files().call("GET", "b/{}/o/{}", self._bucket, self._key, json_out=True)

    def _page(self, **query) -> dict:
        return _files().call("GET", "b/{}/o", self._bucket, json_out=True, **query)

    def _names(self, **query) -> Iterator[str]:
        """Yield the names below the folder, also those of folders if there is a delimiter."""
        token = None
        while True:
            page = self._page(prefix=self._prefix or None, pageToken=token, **query)
            yield from (item["name"] for item in page.get("items", ()))
            yield from page.get("prefixes", ())
            if not (token := page.get("nextPageToken")):
                return

    def _get(self, headers: dict) -> bytes:
        return _files().call("GET", _files().url(str(self)), headers=headers)[1]

    def _part(self, start: int, stop: int) -> bytes:
        part = self._get({"Range": f"bytes={start}-{stop - 1}"})
        if len(part) != stop - start:
            raise OSError(5, f"has {len(part)} bytes where {stop - start} were asked for", str(self))
        return part


class _Reader(io.RawIOBase):
    """An object as a file that can be read and sought in."""

    def __init__(self, path: BucketPath):
        self._path, self._size, self._at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        data = self._path.read_range(self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@functools.cache
def _files() -> FileSystem:
    """Return the file system, which epath finds under the same name and with the same options."""
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _together(call, arguments) -> Iterator:
    """Yield `call(argument)` in order, a few under way at once."""
    arguments = list(arguments)
    if len(arguments) < 2:
        yield from map(call, arguments)
        return
    with ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
        waiting = [pool.submit(call, argument) for argument in arguments[:_RANGES_AT_ONCE]]
        for following in [*arguments[_RANGES_AT_ONCE:], *[None] * len(waiting)]:
            done = waiting.pop(0).result()
            if following is not None:
                waiting.append(pool.submit(call, following))
            yield done

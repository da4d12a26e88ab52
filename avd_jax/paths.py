"""Paths as a user writes them, in flags, config fields and lists of files: the one place that says what they may be.

A local path is a `pathlib.Path`. One in a bucket is a `buckets.BucketPath`, which has the same methods, so that most
code need not know which it was given. What differs is here: a file that others need as a file on a disk, and writing.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from avd_jax.errors import UserError

# `hf://ORG/NAME[@REVISION]`, with one slash or two as above.
_HUB = re.compile(r"hf:/{1,2}([^/@\s]+/[^/@\s]+)(?:@(\S+))?/?$")

# Two letters at least: `C:/` is no scheme. One slash is enough, since `Path` makes `gs:/bucket` of `gs://bucket`.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")

# Orbax, TFDS and grain open buckets through epath, which would take TensorFlow for it where that is installed.
os.environ.setdefault("EPATH_USE_TF", "false")


def user_cache() -> Path:
    """Return the user's folder for what can be made again: `$XDG_CACHE_HOME/avd_jax`, `~/.cache/avd_jax` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avd_jax"


def any_path(path: str | os.PathLike) -> Path:
    """Return the path that is meant, local as by `local_path`, or in a bucket (`gs://`).

    Args:
      path: as it was written; also one that has been through here, or through `Path`.

    Raises:
      UserError: as `local_path`; or what buckets need is not installed.
    """
    text = os.fspath(path)
    return _in_bucket(text) if _scheme(text) == "gs" else local_path(path)


def local_path(path: str | os.PathLike) -> Path:
    """Return the local path that is meant: `~` is the home folder, `file:///x` is `/x`.

    Args:
      path: as it was written; also one that has been through here, or through `Path`.

    Raises:
      UserError: another scheme, such as `gs://`, a `file://` of another machine, or the home of an unknown user.
    """
    text = os.fspath(path)
    scheme = _scheme(text)
    if scheme == "gs":
        raise UserError(
            f"{text}: gs:// is not supported here, only local paths are; copy it to a local disk (gcloud storage cp -r)"
        )
    if scheme not in ("", "file"):
        raise UserError(
            f"{text}: {scheme}:// is not supported, only local paths and gs:// are; copy it to a local disk, or mount "
            "it there"
        )
    if scheme:
        text = text[len("file:") :]
        if text.startswith("//"):
            host, _, rest = text[2:].partition("/")
            if host not in ("", "localhost"):
                raise UserError(f"{path}: is on another machine; a local path has three slashes, as file:///data")
            text = f"/{rest}"
        text = unquote(text)
    try:
        local = Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        name = Path(text).parts[0]
        raise UserError(
            f"{text}: there is no home folder of {name}; for a folder of that name write ./{name}"
        ) from None
    # Of `./~x` and `./gs:/x` only `~x` and `gs:/x` are left, which would mean something else next time.
    return local.absolute() if str(local).startswith("~") or _SCHEME.match(str(local)) else local


def hub_name(path: str | os.PathLike) -> tuple[str, str | None] | None:
    """Return repository and revision, or None, of weights on the Hugging Face Hub; None for any other path.

    Raises:
      UserError: an `hf://` that names no repository.
    """
    text = os.fspath(path)
    if not text.lower().startswith("hf:/"):
        return None
    found = _HUB.match(text)
    if not found:
        raise UserError(f"{text}: names no repository of weights; write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return found[1], found[2]


def weights_path(path: str | os.PathLike) -> str:
    """Return a path of weights as a text: by `any_path`, one on the Hub as it is."""
    return str(any_path(path)) if hub_name(path) is None else os.fspath(path)


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return _scheme(os.fspath(path)) == "gs"


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """Yield a file as one on a local disk: itself, or a copy that is removed at the end.

    For what seeks, maps or is read by a library that knows local files only.
    """
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        path.download(copy)
        yield copy


def read_values(path: Path, dtype: np.dtype, count: int, offset: int = 0) -> np.ndarray:
    """Return `count` values of a file from byte `offset` on, fewer if it ends before."""
    if not is_bucket(path):
        return np.fromfile(path, dtype, count, offset=offset)
    return np.frombuffer(path.read_range(offset, offset + count * np.dtype(dtype).itemsize), dtype)


def in_time(path: str | os.PathLike, call: Callable[[], Any]) -> Any:
    """Return `call()`, which reads a path; a TimeoutError if that is in a bucket and is not answered for 5 minutes."""
    if not is_bucket(path):
        return call()
    from avd_jax.bucket_requests import in_time

    return in_time(call)


def bucket_trouble(path: str | os.PathLike, error: BaseException) -> UserError | None:
    """Return in one line what kept a library from a path in a bucket; None for other paths, and other errors."""
    if not is_bucket(path):
        return None
    from avd_jax.bucket_requests import trouble

    return trouble(path, error)


def state_of(path: Path) -> tuple:
    """Return what is another for other contents of a file, as far as its file system tells."""
    about = path.stat()
    return about.st_size, about.generation if is_bucket(path) else about.st_mtime_ns


def _scheme(text: str) -> str:
    found = _SCHEME.match(text)
    return found[1].lower() if found else ""


def _in_bucket(text: str) -> Path:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError(f'{text}: buckets need more packages; pip install -e ".[gcs]"') from None
    from avd_jax.buckets import BucketPath  # imports what is an extra

    inside = text.partition(":")[2].strip("/")
    if not inside:
        raise UserError(f"{text}: names no bucket; write gs://BUCKET/FOLDER")
    return BucketPath(f"gs://{inside}")

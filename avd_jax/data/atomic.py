"""Files that are either whole or absent: written beside their final name and renamed once complete.

In a bucket, where an upload appears whole, they are written on the local disk and uploaded. And folders that one
process writes at a time.
"""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from avd_jax.data import bucket_lock
from avd_jax.errors import UserError
from avd_jax.paths import any_path, is_bucket

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that know none, such as some clusters'


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, owner: str = "") -> Iterator[Path]:
    """Yield a temporary local path; a clean exit makes it `path`, by a rename or an upload, an exception removes it.

    Missing parent folders are made. The temporary name is fixed, so that what a killed process left behind is
    overwritten by the next attempt and does not pile up. Who finds another process or thread at the same file waits
    until it has ended.

    Args:
      path: the file.
      owner: part of the temporary name, where several hosts may write the same file at once, which see no locks of
        each other on some file systems.
    """
    path = any_path(path)
    if is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{owner}tmp")
    lock = _locked(temporary, wait=True)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            # The rename must not reach the disk before the bytes do.
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


def write_text(path: str | os.PathLike, text: str, *, owner: str = "") -> None:
    """Write a UTF-8 text file through `replacing`."""
    if is_bucket(path):
        any_path(path).write_text(text)
        return
    with replacing(path, owner=owner) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def only_writer(folder: Path, part: str = "") -> Iterator[Callable[[], None]]:
    """Keep other processes from writing to a folder; it is made if missing, and removed again if it stays empty.

    The lock is the kernel's, on a file in the folder, so a process that is killed takes it along. In a bucket it is an
    object, see `bucket_lock.py`; other parts are not looked at there.

    Yields:
      A function that raises a UserError once another process has taken the folder over, which only a bucket lets it.

    Args:
      folder: what is written to.
      part: "0-of-3" if the process writes one of several parts, which others may write to at the same time.

    Raises:
      UserError: another process writes to the folder, or it cannot be written.
    """
    name = f"{_LOCK}-{part}" if part else _LOCK
    if is_bucket(folder):
        with _only_writer_in_bucket(folder, name) as check:
            yield check
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / name)
        try:
            _check_no_other_writes(folder, name)
        except BaseException:
            _release(folder / name, lock)
            raise
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing to it; wait for it, or give another folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error
    try:
        yield lambda: None
    finally:
        _release(folder / name, lock)
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for a local folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".turn"
    lock = _locked(path, wait=True)
    try:
        yield
    finally:
        _release(path, lock)


@contextlib.contextmanager
def _only_writer_in_bucket(folder: Path, name: str) -> Iterator[Callable[[], None]]:
    try:
        lock = bucket_lock.Lock(folder / name)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing to it; wait for it, or give another folder") from None
    try:
        # Of other parts only whether they are there is known, not whether they are alive; what they write is theirs.
        yield lock.check
    finally:
        lock.release()


def _check_no_other_writes(folder: Path, name: str) -> None:
    """Raise a BlockingIOError if a process is at work that may not be beside the holder of this lock."""
    for path in folder.glob(f"{_LOCK}*"):
        of_same_parts = "-of-" in name and path.name.partition("-of-")[2] == name.partition("-of-")[2]
        if path.name != name and not of_same_parts:
            _release(path, _locked(path))  # what a killed process left


def _release(path: Path, lock: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(lock)


def _locked(path: Path, *, wait: bool = False) -> int:
    """Return an open file that is locked and still has this name: who had the lock before may have removed it."""
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, operation)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)

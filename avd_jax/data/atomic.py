"""Files that are either whole or absent: written beside their final name and renamed once complete.

And folders that one process writes at a time.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from avd_jax.errors import UserError

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that know none, such as some clusters'


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, owner: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; a clean exit renames it to `path`, an exception removes it.

    Missing parent folders are made. The temporary name is fixed, so that what a killed process left behind is
    overwritten by the next attempt and does not pile up.

    Args:
      path: the file.
      owner: part of the temporary name, where several processes may write the same file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{owner}tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            # The rename must not reach the disk before the bytes do.
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str, *, owner: str = "") -> None:
    """Write a UTF-8 text file through `replacing`."""
    with replacing(path, owner=owner) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def only_writer(folder: Path, part: str = "") -> Iterator[None]:
    """Keep other processes from writing to a folder; it is made if missing, and removed again if it stays empty.

    The lock is the kernel's, on a file in the folder, so a process that is killed takes it along.

    Args:
      folder: what is written to.
      part: "0-of-3" if the process writes one of several parts, which others may write to at the same time.

    Raises:
      UserError: another process writes to the folder, or it cannot be written.
    """
    made, name = not folder.exists(), f"{_LOCK}-{part}" if part else _LOCK
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
        yield
    finally:
        _release(folder / name, lock)
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


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


def _locked(path: Path) -> int:
    """Return an open file that is locked and still has this name: who had the lock before may have removed it."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)

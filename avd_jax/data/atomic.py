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
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; a clean exit renames it to `path`, an exception removes it.

    Missing parent folders are made. The temporary name is fixed, so that what a killed process left behind is
    overwritten by the next attempt and does not pile up.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            # The rename must not reach the disk before the bytes do.
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; it is made if missing, and removed again if it stays empty.

    The lock is the kernel's, on a file in the folder, so a process that is killed takes it along.

    Raises:
      UserError: another process writes to the folder, or it cannot be written.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / _LOCK)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing to it; wait for it, or give another folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
        os.close(lock)
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


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

"""The file of votes: one JSON object a line, appended by several servers and threads at once, of which none is lost.

Its first line says which study it is of. A vote is written with one call under a lock of the kernel and is on the disk
before it is confirmed. So a killed server can only leave half a line behind, of a vote that was not confirmed: the next
one to append cuts it off, and readers pass over it. A last line that only lacks its end, as some editors leave it, is
a vote and stays. A file that is not of votes is never changed.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from beartype.door import is_bearable

from avd_jax.errors import UserError

QUESTIONS = {"quality": "Which video looks better?", "agreement": "Which video fits the description better?"}
COMPARABLE = "comparable"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that know none


@dataclass(frozen=True)
class Study:
    """What a file of votes is of.

    Attributes:
      methods: their names, in the order in which they were given.
      seed: decides order and side of the pairs.
      key: of the names under which the page knows pairs and videos, so that nobody can tell a method by them.
    """

    methods: list[str]
    seed: int
    key: str


@dataclass(frozen=True)
class VoteLine:
    """A vote.

    Attributes:
      pair: which was voted on.
      prompt, seed: of its videos.
      methods: as they were shown, first and second video.
      annotator: who voted.
      quality, agreement: the better method by that question, or COMPARABLE.
      time: when, in ISO 8601.
    """

    pair: str
    prompt: str
    seed: int | None
    methods: list[str]
    annotator: str
    quality: str
    agreement: str
    time: str


class VoteFile:
    """A file of votes, and what is in it."""

    def __init__(self, path: Path, new: Study | None = None):
        """Open a file, or make one for a new study.

        Args:
          path: of the file.
          new: the study to begin if there is no file, or an empty one.

        Raises:
          UserError: there is no file, it cannot be read or written, or a line is no vote.
        """
        self.path = path
        self._lock, self._offset, self._lines = threading.Lock(), 0, 0
        self._rest = b""  # behind the last end of a line
        self._votes: dict[tuple[str, str], VoteLine] = {}
        self.study: Study | None = None
        with self._reporting():
            if new is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._locked() as file:
                    self._read()
                    if self.study is None:
                        self._append(file, {"study": asdict(new)})
            self._read()
        if self.study is None:
            raise UserError(f"{path}: holds no votes; give the file of scripts/serve.py --compare")

    def votes(self) -> list[VoteLine]:
        """Return all votes, those of other servers too, in the order in which they were given."""
        with self._reporting(), self._lock:
            self._read()
            return list(self._votes.values())

    def append(self, vote: VoteLine) -> bool:
        """Write a vote; on return it is on the disk.

        Returns:
          Whether it counts: of one person's votes on one pair the first does.

        Raises:
          UserError: it cannot be written, and then it is not in the file.
        """
        with self._reporting(), self._locked() as file:
            self._read()
            if (vote.annotator, vote.pair) in self._votes:
                return False
            self._append(file, asdict(vote))
            self._read()
            return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the open file, which no other thread, process or host writes to meanwhile."""
        with self._lock:
            file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o666)
            try:
                _flock(file)
                yield file
            finally:
                os.close(file)

    def _append(self, file: int, entry: dict) -> None:
        """Write a line behind the last whole one, or nothing."""
        line, end = (json.dumps(entry, ensure_ascii=False) + "\n").encode(), self._offset
        if _parsed(self._rest) is not None:
            line, end = b"\n" + line, end + len(self._rest)
        elif self._rest and self.study is None:
            self._take(self._rest, 1)  # refuses it
        os.ftruncate(file, end)  # what a killed server left half-written
        try:
            written = os.write(file, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise

    def _read(self) -> None:
        """Take note of the lines that were added; a last one that lacks its end is looked at again the next time."""
        if not self.path.is_file():
            if self._offset:
                raise UserError(f"{self.path}: is gone; restore it, and start the server again")
            return
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                raise UserError(f"{self.path}: has become shorter; restore it, and start the server again")
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            self._take(line, self._lines)
        self._offset += len(whole)
        self._rest = added[len(whole) :]
        if _parsed(self._rest) is not None:
            self._take(self._rest, self._lines + 1)

    def _take(self, line: bytes, number: int) -> None:
        entry = _parsed(line)
        if number == 1:
            study = entry.get("study") if isinstance(entry, dict) else None
            self.study = _as(Study, study)
            if self.study is None:
                raise UserError(f"{self.path}:1: does not say of which study the votes are; give another file")
            return
        vote = _as(VoteLine, entry)
        if vote is None or not {vote.quality, vote.agreement} <= {*vote.methods, COMPARABLE}:
            raise UserError(f"{self.path}:{number}: is no vote; restore the line, or remove it")
        if len(vote.methods) != 2 or not set(vote.methods) <= set(self.study.methods):
            raise UserError(f"{self.path}:{number}: is of methods that the first line does not name; remove it")
        self._votes.setdefault((vote.annotator, vote.pair), vote)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written or read ({error.strerror}); nothing was kept") from error


def _flock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _parsed(line: bytes) -> object:
    """Return the JSON of a line, or None if it is none: half an object never is."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _as(kind: type, entry: object):
    """Return a JSON object as a dataclass, or None if it is none."""
    hints = kind.__annotations__
    if not isinstance(entry, dict) or set(entry) != set(hints):
        return None
    fits = all(is_bearable(entry[name], hint) and not isinstance(entry[name], bool) for name, hint in hints.items())
    return kind(**entry) if fits else None

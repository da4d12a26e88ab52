"""One writer of a folder in a bucket, where there are no locks of a kernel.

The writer keeps an object there and writes it again every few seconds, each time on the condition that it is the one
it wrote before. Who finds one watches it: if it changes, its writer is at work; if it stays the same for long enough,
its writer was killed, and the object is taken over on the same condition. No clock of another host is trusted.

A writer that lost its object, since it was cut off from the bucket for long, learns so at its next beat.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from avd_jax.errors import UserError

BEAT = 15.0  # seconds between two writes of the object
DEAD = 60.0  # seconds without a change, after which its writer is taken for dead


class LostError(UserError):
    """Another process writes to the folder now."""


@contextlib.contextmanager
def held(path: Path) -> Iterator["Lock"]:
    """Hold the lock whose object is at `path` (in a bucket).

    Raises:
      BlockingIOError: another process holds it.
    """
    lock = Lock(path)
    try:
        yield lock
    finally:
        lock.release()


class Lock:
    """A lock that is held; see `held`."""

    def __init__(self, path: Path):
        self._path, self._name = path, uuid.uuid4().hex
        self._generation = self._taken()
        self._lost, self._over = False, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="bucket lock")
        self._thread.start()

    def release(self) -> None:
        """Remove the object, if it is still ours."""
        self._over.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(UserError, OSError):
                self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise a LostError if another process has taken the folder over."""
        if self._lost:
            raise LostError(
                f"{self._path.parent}: another process has taken it over, since this one did not reach the bucket for "
                f"{DEAD:.0f} s; let only one of them go on"
            )

    def _taken(self) -> str:
        """Return the generation of the object once it is ours."""
        said = self._said()
        try:
            return self._path.write_bytes(said, generation="0")
        except FileExistsError:
            pass
        before, until = self._look(), time.monotonic() + DEAD
        if before is not None and before[1] == said:  # the answer to our first try was lost
            return before[0]
        dead = before is not None and _is_dead(before[1])
        if not dead and before is not None:
            print(f"{self._path.parent}: was written to by {_words(before[1])}; waiting to see if it is", flush=True)
        while not dead and before is not None and time.monotonic() < until:
            time.sleep(min(BEAT / 3, DEAD / 10))
            now = self._look()
            if now is not None and now[0] != before[0]:
                raise BlockingIOError(f"{self._path} is held by {_words(now[1])}")
            before = now
        try:
            return self._path.write_bytes(said, generation=before[0] if before else "0")
        except FileExistsError:
            raise BlockingIOError(f"{self._path} has just been taken") from None

    def _look(self) -> tuple[str, bytes] | None:
        """Return generation and content of the object; None if it is gone."""
        try:
            return self._path.stat().generation, self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _said(self) -> bytes:
        return json.dumps({"writer": self._name, "at": time.time(), **_this_process()}).encode()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            said = self._said()
            try:
                self._generation = self._path.write_bytes(said, generation=self._generation)
            except FileExistsError:
                now = None
                with contextlib.suppress(UserError, OSError):
                    now = self._look()
                if now is not None and json.loads(now[1]).get("writer") == self._name:
                    self._generation = now[0]  # written, but the answer was lost
                    continue
                self._lost = True
                return
            except (UserError, OSError):
                continue  # the bucket does not answer; what is written to it next says so


def _this_process() -> dict:
    return {"host": _place(), "pid": os.getpid(), "started": _started(os.getpid())}


def _place() -> list[str]:
    """Return what is the same for two processes only if each can see whether the other is alive."""
    place = [socket.gethostname()]
    with contextlib.suppress(OSError):
        place.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        place.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return place


def _started(pid: int) -> str:
    """Return when a process of this machine was started, in the kernel's count; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(content: bytes) -> bool:
    """Whether the writer was a process of this machine that is gone; others can only be watched."""
    try:
        about = json.loads(content)
        here = len(about["host"]) == 3 and about["host"] == _place()
        return here and _started(about["pid"]) != about["started"]
    except (ValueError, KeyError, TypeError):
        return False


def _words(content: bytes) -> str:
    try:
        about = json.loads(content)
        return f"process {about['pid']} of {about['host'][0]}"
    except (ValueError, KeyError, TypeError, IndexError):
        return "another process"

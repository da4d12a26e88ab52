"""A bounded queue of wishes, worked off one at a time in a thread of its own; a wish that fails is a message."""

import itertools
import sys
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from avd_jax.errors import UserError

MOST_REMEMBERED = 200  # wishes whose outcome can still be asked for


@dataclass
class Job:
    """A wish and how far it is.

    Attributes:
      wish: what is to be done.
      status: waiting, working, done, failed or cancelled.
      doing: what is being done, in words.
      step, steps: of the denoising.
      results: what is there already.
      notes: what the visitor should know.
      message: why it failed.
    """

    wish: object
    status: str = "waiting"
    doing: str = ""
    step: int = 0
    steps: int = 0
    results: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    message: str = ""


class Jobs:
    """The queue and its worker."""

    def __init__(self, work: Callable[[Job], object], *, most: int):
        """Start the worker.

        Args:
          work: does what a job wishes; an error is kept in the job.
          most: wishes that may wait.
        """
        self._work, self._most = work, most
        self._changed, self._numbers = threading.Condition(), itertools.count(1)
        self._waiting: deque[int] = deque()
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, wish: object) -> int:
        """Return the number of a new job (UserError if too many wait)."""
        with self._changed:
            if len(self._waiting) >= self._most:
                raise UserError(f"{self._most} wishes are waiting already; try again in a while")
            number = next(self._numbers)
            self._jobs[number] = Job(wish)
            self._waiting.append(number)
            for old in [n for n, job in self._jobs.items() if job.status not in ("waiting", "working")]:
                if len(self._jobs) > MOST_REMEMBERED:
                    del self._jobs[old]
            self._changed.notify()
            return number

    def state(self, number: object) -> dict:
        """Return what a page shows of a job (UserError if it is not known)."""
        with self._changed:
            job = self._jobs.get(number) if isinstance(number, int) else None
            if job is None:
                raise UserError("this wish is not known any more; send it again")
            ahead = self._waiting.index(number) + 1 if number in self._waiting else 0
            shown = {name: value for name, value in vars(job).items() if name != "wish"}
            return {"job": number, "ahead": ahead, **shown, "results": list(job.results), "notes": list(job.notes)}

    def cancel(self, number: object) -> dict:
        """Take a job out of the queue, if it still waits there; return its state."""
        with self._changed:
            if number in self._waiting:
                self._waiting.remove(number)
                self._jobs[number].status = "cancelled"
        return self.state(number)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self._jobs[self._waiting.popleft()]
                job.status = "working"
            try:
                self._work(job)
                job.status = "done"
            except UserError as error:
                job.message, job.status = str(error), "failed"
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                told = (str(error).strip().splitlines() or [""])[0][:200]
                job.message, job.status = f"it failed: {type(error).__name__}: {told}", "failed"

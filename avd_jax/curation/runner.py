"""The same function for many jobs at once, in processes; a job that breaks its process stops no other."""

import queue
import threading
from collections.abc import Iterable, Iterator

from avd_jax.curation.worker import Worker, WorkerDied

TRIES = 2  # a process that was killed may have been the wrong one


def run_pool(
    function: str, jobs: Iterable[tuple[str, list]], *, workers: int, seconds: float, memory_gib: float
) -> Iterator[tuple[str, object, str | None]]:
    """Call a function in processes; yield (job's name, result, None) or (job's name, None, what went wrong).

    The order is that in which jobs finish. No more than a few of them are in memory. If the caller stops, by an
    exception or by Ctrl-C, so do the processes.

    Args:
      function: `module:name`.
      jobs: name and arguments of each.
      workers: processes.
      seconds: that a job may take.
      memory_gib: that a process may allocate.
    """
    waiting, turn, stopped = iter(jobs), threading.Lock(), threading.Event()
    finished: queue.Queue = queue.Queue(maxsize=2 * workers)
    crew = [Worker(function, seconds=seconds, memory_gib=memory_gib) for _ in range(workers)]

    def work(worker: Worker) -> None:
        try:
            while not stopped.is_set():
                with turn:
                    job = next(waiting, None)
                if job is None:
                    break
                name, arguments = job
                result, wrong = call(worker, arguments, stopped)
                _put(finished, (name, result, wrong), stopped)
        except BaseException as error:
            _put(finished, error, stopped)
        finally:
            worker.close()
            _put(finished, None, stopped)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in crew]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            outcome = finished.get()
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                running -= 1
            else:
                yield outcome
    finally:
        stopped.set()
        for worker in crew:
            worker.close()
        for thread in threads:
            thread.join()


def call(worker: Worker, arguments: list, stopped: threading.Event | None = None) -> tuple[object, str | None]:
    """Return (result, None), or (None, what went wrong) once a second try has failed as well."""
    for attempt in range(TRIES):
        try:
            return worker.call(*arguments), None
        except WorkerDied as error:
            if attempt + 1 == TRIES or (stopped is not None and stopped.is_set()):
                return None, str(error)
    raise AssertionError


def _put(finished: queue.Queue, outcome: object, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            return finished.put(outcome, timeout=0.1)
        except queue.Full:
            continue

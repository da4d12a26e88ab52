"""A process of its own that calls one function again and again: what breaks in there stops nobody else.

Decoders of damaged videos crash, hang or take all memory, and no `except` helps against that. `Worker` starts
`python -m avd_jax.curation.worker MODULE:FUNCTION`, sends a JSON list of arguments a line and reads a JSON result a
line. This is not multiprocessing's pool, which fails as a whole when one process dies, and whose processes would each
import the script with all of JAX.
"""

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time

MODULE = "avd_jax.curation.worker"
GIB = 2**30
_ORPHANED = 0.5  # seconds between two looks for the parent


class WorkerDied(Exception):
    """The process ended before it answered; the message says how, as the end of a sentence about the job."""


class Worker:
    """One process, started when it is first needed, and again after it has died."""

    def __init__(self, function: str, *, seconds: float, memory_gib: float):
        """Describe the process.

        Args:
          function: `module:name`; takes and returns what JSON can hold.
          seconds: that a call may take.
          memory_gib: that the process may allocate.
        """
        self._command = [sys.executable, "-P", "-m", MODULE, function, str(memory_gib)]
        self._seconds = seconds
        self._process: subprocess.Popen | None = None

    def call(self, *arguments: object) -> object:
        """Return what the function returns.

        Raises:
          WorkerDied: it crashed, raised, or took too long.
        """
        if self._process is None:
            # It finds what this process finds, and has one thread for arithmetic: there is a process a core.
            environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        process, late = self._process, threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # the pipe broke
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            self.close()
            raise WorkerDied(_how(process.wait(), late.is_set(), self._seconds))
        outcome = json.loads(answer)
        if "raised" in outcome:
            raise WorkerDied(outcome["raised"])
        return outcome["returned"]

    def close(self) -> None:
        """End the process, also in the middle of a call of another thread."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


def _how(status: int, late: bool, seconds: float) -> str:
    if late:
        return f"took longer than {seconds:g} s"
    if status == -9:
        return "its process was killed, perhaps for its memory"
    return f"crashed its process ({f'signal {-status}' if status < 0 else f'status {status}'})"


def _serve(name: str, memory_gib: float) -> None:
    """Answer until there are no more calls."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * GIB), resource.RLIM_INFINITY))
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    for line in sys.stdin:
        try:
            outcome = {"returned": function(*json.loads(line))}
        except MemoryError:
            outcome = {"raised": f"needs more than {memory_gib:g} GiB of memory"}
        except Exception as error:
            outcome = {"raised": f"stopped with {type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


def _leave_with_parent(parent: int) -> None:
    """End the process once its parent has: one that is killed cannot tell."""
    while os.getppid() == parent:
        time.sleep(_ORPHANED)
    os._exit(1)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))

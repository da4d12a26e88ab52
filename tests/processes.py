"""Python programs as processes of their own, started by `fork_server.py`, which spares them most of their imports.

`start` is `subprocess.Popen` and `run` is `subprocess.run`, as far as the tests use them.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
# Of the tests as a whole: whichever starts the first program may have set variables of its own.
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # whoever forks has one thread


def _for_jax(environment: Mapping[str, str]) -> dict[str, str]:
    """What JAX reads while it is imported; XLA_FLAGS are read later, with the first device."""
    return {name: value for name, value in environment.items() if name.startswith("JAX_")}


@functools.cache
def _server() -> socket.socket:
    """Return the way to a server of this process, with which it ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(SERVER), str(theirs.fileno())]
    process = subprocess.Popen(command, env=ENVIRONMENT, pass_fds=[theirs.fileno()])
    theirs.close()

    def stop():
        ours.close()
        process.wait()

    atexit.register(stop)
    return ours


class Process:
    """A Python program in a process of its own; methods and attributes are those of `subprocess.Popen`.

    What it writes is kept in files, so that it never waits for a reader.
    """

    def __init__(self, command: Sequence, env: Mapping[str, str] | None = None, cwd: str | Path | None = None):
        self.args, self.returncode = [str(part) for part in command], None
        environment = dict(os.environ if env is None else env)
        assert _for_jax(environment) == _for_jax(ENVIRONMENT), "JAX is imported already: what it reads then is set"
        paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        message = {"folder": str(cwd or Path.cwd()), "environment": environment, "paths": paths, "command": self.args}
        reader, writer = os.pipe()
        with contextlib.ExitStack() as stack:
            nothing = stack.enter_context(open(os.devnull))
            written = [stack.enter_context(tempfile.NamedTemporaryFile()) for _ in range(2)]
            self._output, self._errors = (
                os.fdopen(os.open(file.name, os.O_RDONLY), encoding="utf-8") for file in written
            )
            streams = [writer, nothing.fileno(), *(file.fileno() for file in written)]
            socket.send_fds(_server(), [json.dumps(message).encode()], streams)
        os.close(writer)
        self._status = os.fdopen(reader)
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._output.read(), self._errors.read()

    def lines(self) -> Iterator[str]:
        """Yield what it writes to stdout, a line as soon as it is whole, until it ends."""
        line, ended = "", False
        while not ended:
            ended = self.poll() is not None
            while found := self._output.readline():
                line += found
                if line.endswith("\n"):
                    yield line
                    line = ""
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(command: Sequence, **options) -> Process:
    """Start `-c CODE` or a file, with its arguments; options are `env` and `cwd`."""
    return Process(command, **options)


def run(command: Sequence, timeout: float | None = None, **options) -> subprocess.CompletedProcess:
    """Run a program to its end; it is killed after `timeout` seconds."""
    process = start(command, **options)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

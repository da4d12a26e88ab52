"""Forks Python programs off one process that has the libraries imported, as `processes.py` asks it to.

A fresh interpreter takes three seconds to import JAX and its kin. Of our own code nothing is imported here: each
program imports it by itself, as it does when a user starts it.

python fork_server.py SOCKET, the number of an open socket of whole messages
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import sys

LIBRARIES = (
    *("absl.app", "av", "beartype", "einops", "flax.nnx", "ftfy", "grain.python", "jaxtyping"),
    *("jax.experimental.multihost_utils", "jax.experimental.pallas.ops.tpu.splash_attention"),
    *("jax.experimental.pallas.tpu", "ml_collections.config_flags", "optax.contrib", "orbax.checkpoint"),
    *("tensorboardX", "tensorflow_datasets", "tqdm"),
)


def serve(channel: socket.socket) -> dict:
    """Fork a process for each message until the other side is gone; in each of them, return its message."""
    while True:
        message, given, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that are done
                pass
        if not message:
            sys.exit()
        if os.fork():
            for number in given:
                os.close(number)
        else:
            channel.close()
            return keep(json.loads(message), given)


def keep(message: dict, given: list[int]) -> dict:
    """Fork the program and tell its number, then the status with which it ends; return in the program alone."""
    status, *streams = given
    pid = os.fork()
    if pid:
        for number in (0, 1, 2, *streams):
            os.close(number)
        os.write(status, b"%d\n" % pid)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(status)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return message


def become(folder: str, environment: dict[str, str], paths: list[str], command: list[str]) -> None:
    """Run a command, `-c CODE` or a file with its arguments, as Python runs it."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = command
    here = "" if first == "-c" else os.path.dirname(os.path.abspath(first))
    sys.path[:] = [here, *paths, *sys.path[1:]]
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__ | {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    number = int(sys.argv[1])
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # what is there is of no one program: neither searched nor taken apart when one ends
    gc.set_threshold(200_000, 20, 50)  # as in conftest.py: tracing makes many objects that live
    become(**serve(socket.socket(fileno=number)))

"""The one error class for what a user can do wrong, its one-line report, and notes on what is taken all the same."""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input of any kind. The message is one line that names the file, key or field and says what to do."""


def closest(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the candidate most like `name`, or an empty string when none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


@functools.cache
def note(line: str) -> None:
    """Print a line on stderr, once a process: on input that is taken, though in another way than it may be meant."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def leave(line: str, status: int) -> NoReturn:
    """End the process at once: Orbax, grain and compilers have threads that would hold up a normal exit."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def report_user_errors(main: Callable) -> Callable:
    """Wrap a script's `main(argv)`: a UserError becomes `error: <message>` on stderr and exit status 1.

    After Ctrl-C, which is one line and status 130, nothing is waited for either, as a program that is being compiled.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            leave(f"error: {error}", 1)
        except KeyboardInterrupt:
            leave("interrupted", 130)

    return wrapped

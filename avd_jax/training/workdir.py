"""A run's folder and the signals that stop it: what every training program does before and around its loop."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.fields import Fields, flatten
from avd_jax.parallel.hosts import barrier, from_first, is_first

CHANGES = "changes.jsonl"
SEEN_WITHIN = 20.0  # seconds in which a file of one host must show on the others


def check_shared(workdir: Path) -> None:
    """Check that all hosts see the same folder: the first one leaves a token there, and the others look for it.

    Raises:
      UserError: on every host, if one of them does not find it.
    """
    if jax.process_count() == 1:
        return
    token = int(from_first(np.asarray(int.from_bytes(os.urandom(3), "big"))))
    path = workdir / f".seen_by_all_{token}"
    if is_first():
        with _usable(path):
            write_text(path, "")
    barrier("token is written")
    until = time.monotonic() + SEEN_WITHIN
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    blind = np.flatnonzero(~np.asarray(multihost_utils.process_allgather(np.asarray(seen))).reshape(-1))
    if is_first():
        path.unlink(missing_ok=True)
    if blind.size:
        raise UserError(
            f"{workdir}: is not the same folder on all hosts (what process 0 writes does not show on process "
            f"{', '.join(map(str, blind))}); give a --workdir on a disk that all of them share"
        )


def changed_settings(config, workdir: Path, fields: Fields) -> dict[str, list]:
    """Compare a config with that of the run in the workdir, if it holds a checkpoint.

    Returns:
      field -> [its value before, its value now] of those that differ, may do so, and decide what the run computes.

    Raises:
      UserError: naming the fields that differ and may not.
    """
    path, now = workdir / "config.json", jsonable(flatten(config))
    with _usable(path):
        # Until there is something to resume from, a setting that was wrong can be put right.
        started = any(child.name.isdigit() for child in (workdir / "checkpoints").glob("*"))
        before = json.loads(path.read_text()) if started and path.exists() else {}
    changed = {name: [before[name], now[name]] for name in _differing(workdir, before, now, fields)}
    barrier("config is checked")
    return changed


def record_config(config, workdir: Path, *, step: int, changed: Mapping[str, list]) -> None:
    """Write the config to the workdir, and what changed in it to `changes.jsonl`, with the step that it follows."""
    path = workdir / "config.json"
    with _usable(path):
        if changed:
            path_of_changes = workdir / CHANGES
            before = path_of_changes.read_text(encoding="utf-8") if path_of_changes.exists() else ""
            write_text(path_of_changes, before + json.dumps({"step": step, "changed": changed}) + "\n")
        write_text(path, json.dumps(jsonable(flatten(config)), indent=2) + "\n")


def _differing(workdir: Path, before: dict, now: dict, fields: Fields) -> list[str]:
    """Return which recorded fields differ; raises a UserError if others do that may not."""
    differing = [name for name in now if name in before and before[name] != now[name] and not fields[name].changeable]
    if "method" in differing:
        raise UserError(
            f"{workdir}: holds a run of the method {before['method']!r}, the config is of {now['method']!r}; use its "
            "own config, or another --workdir"
        )
    refused = [name for name in differing if not fields[name].recorded]
    if refused:
        shown = ", ".join(f"config.{name} was {before[name]!r}, is {now[name]!r}" for name in refused)
        raise UserError(f"{workdir}: holds a run with other settings ({shown}); use them, or another --workdir")
    return differing


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be used ({error.strerror}); choose another --workdir") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); remove it or choose another --workdir") from error


def check_inputs(before: Mapping[str, str] | None, now: Mapping[str, str], checkpoint: Path) -> None:
    """Raise a UserError if weights or sets are not those that the run of `checkpoint` began with.

    Args:
      before, now: field -> what identifies the contents of the path in that field, wherever it lies; None if the
        checkpoint does not say.
      checkpoint: that the run is to resume from.
    """
    before = now if before is None else before
    changed = sorted(f"config.{name}" for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{checkpoint}: the run began with other contents of {', '.join(changed)}; name a copy of those, several "
            "sets in the same order and with the same weights, or another --workdir (docs/data.md says how to have a "
            "set back that has grown)"
        )


class StopSignals:
    """Notes SIGTERM and SIGINT, so that the loop can end after the cycle under way; a second one kills as usual.

    On several hosts JAX's preemption service catches SIGTERM on any of them and chooses the step at which all stop;
    SIGINT is turned into a SIGTERM.

    Attributes:
      signal: the number of the signal that stops the run, on all hosts alike; 0 without one.
    """

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> "StopSignals":
        if jax.process_count() == 1:
            handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        else:
            handlers = {signal.SIGINT: self._pass_on}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def before(self, step: int) -> int:
        """Return `signal`, before each step; if it is not 0, no host makes that step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number, _frame) -> None:
        self.signal = number
        self._restore()

    def _pass_on(self, _number, _frame) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def jsonable(values) -> dict:
    """Return what JSON makes of a dict: tuples become lists."""
    return json.loads(json.dumps(values))

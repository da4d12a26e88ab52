"""A run's folder and the signals that stop it: what every training program does before and around its loop."""

import json
import os
import signal
from collections.abc import Mapping, Set
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.parallel.hosts import barrier, is_first
from avd_jax.training.fields import Fields, flatten


def record_config(config, workdir: Path, fields: Fields, *, write: bool = True) -> None:
    """Write the config to the workdir; one that holds a checkpoint must have the same, but for the changeable fields.

    Args:
      config: of the run.
      workdir: its folder.
      fields: of the config.
      write: whether to write at all; False to check only.

    Raises:
      UserError: naming the fields that differ.
    """
    path, now = workdir / "config.json", jsonable(flatten(config))
    changeable = {name for name, field in fields.items() if field.changeable}
    try:
        # Until there is something to resume from, a setting that was wrong can be put right.
        started = any(child.name.isdigit() for child in (workdir / "checkpoints").glob("*"))
        before = json.loads(path.read_text()) if started and path.exists() else {}
        _check_unchanged(workdir, before, now, changeable)
        if not write:
            return
        barrier("config is checked")
        if is_first():
            write_text(path, json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be used ({error.strerror}); choose another --workdir") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); remove it or choose another --workdir") from error


def _check_unchanged(workdir: Path, before: dict, now: dict, changeable: Set[str]) -> None:
    changed = [name for name in now if name in before and before[name] != now[name] and name not in changeable]
    if "method" in changed:
        raise UserError(
            f"{workdir}: holds a run of the method {before['method']!r}, the config is of {now['method']!r}; use its "
            "own config, or another --workdir"
        )
    if changed:
        shown = ", ".join(f"config.{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise UserError(f"{workdir}: holds a run with other settings ({shown}); use them, or another --workdir")


def check_inputs(before: Mapping[str, str] | None, now: Mapping[str, str], checkpoint: Path) -> None:
    """Raise a UserError if weights or sets are not those that the run of `checkpoint` began with.

    Args:
      before, now: field -> what identifies the contents of the path in that field, wherever it lies; None if the
        checkpoint does not say.
      checkpoint: that the run is to resume from.
    """
    before = now if before is None else before
    changed = sorted(f"config.{name}" for name in {*before, *now} if before.get(name) != now.get(name))
    if "method" in changed:
        raise UserError(
            f"{workdir}: holds a run of the method {before['method']!r}, the config is of {now['method']!r}; use its "
            "own config, or another --workdir"
        )
    if changed:
        raise UserError(
            f"{checkpoint}: the run began with other contents of {', '.join(changed)}; name a copy of those, or "
            "another --workdir"
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

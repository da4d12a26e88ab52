"""A run's folder and the signals that stop it: what every training program does before and around its loop."""

import json
import signal
from pathlib import Path

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.training.fields import flatten

# What may differ when a run goes on: what is kept of it, and on what it runs. All else decides its parameters.
CHANGEABLE = ("log_every", "checkpoint_every", "checkpoint.", "sample_every", "sample.", "mesh.")


def claim(config, workdir: Path, *, changeable: tuple[str, ...] = CHANGEABLE) -> None:
    """Write the config to the workdir; one that holds a checkpoint must have the same, but for the changeable fields.

    Raises:
      UserError: naming the fields that differ.
    """
    path, now = workdir / "config.json", jsonable(flatten(config))
    try:
        # Until there is something to go on from, a setting that was wrong can be put right.
        started = any(child.name.isdigit() for child in (workdir / "checkpoints").glob("*"))
        if not (started and path.exists()):
            write_text(path, json.dumps(now, indent=2) + "\n")
            return
        before = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be used ({error.strerror}); choose another --workdir") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); remove it or choose another --workdir") from error
    changed = [name for name in now if name in before and before[name] != now[name] and not name.startswith(changeable)]
    if changed:
        shown = ", ".join(f"config.{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise UserError(f"{workdir}: holds a run with other settings ({shown}); use them, or another --workdir")
    write_text(path, json.dumps(now, indent=2) + "\n")


class StopSignals:
    """Notes SIGTERM and SIGINT, so that the loop can end after the cycle under way; a second one kills as usual."""

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number, _frame) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def jsonable(values) -> dict:
    """Return what JSON makes of a dict: tuples become lists."""
    return json.loads(json.dumps(values))

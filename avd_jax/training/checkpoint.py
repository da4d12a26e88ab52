"""Checkpoints of a run: Orbax, written in the background, the newest N and the best one kept.

A checkpoint `workdir/checkpoints/<step>/` has an item with the parameters of each network, under the network's name,
one with its running mean (`<name>_ema`) if the run keeps one, `optimizers` and `progress`, all arrays; and `meta` as
JSON: the method, the main network and its architecture, what else the method records, the whole config, the run's
random key and the position in the data.
"""

import errno
import functools
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from avd_jax.errors import UserError, closest
from avd_jax.paths import bucket_trouble


class State(Protocol):
    """A run's state, as checkpoints see it: arrays in named items, each of which can be read alone."""

    def to_items(self) -> dict:
        """Return the state's arrays by item."""

    def from_items(self, items: Mapping) -> "State":
        """Return a state of the same kind with these items."""


class Checkpoints:
    """The checkpoints of one workdir; `best_metric` is the name of the metric that rates them, or empty."""

    def __init__(self, workdir: Path, *, keep: int, best_metric: str = "", best_mode: str = "min"):
        """Open or create `workdir/checkpoints`.

        Args:
          workdir: folder of the run.
          keep: newest checkpoints to keep.
          best_metric: keep the best checkpoint by this metric too; empty for none.
          best_mode: whether the best is the "min" or the "max".

        Raises:
          UserError: the folder cannot be written.
        """
        _ignore_closed_loops()
        self.folder = workdir.absolute() / "checkpoints"
        policies = [preservation_policy.LatestN(keep)]
        self.best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        best = {}
        if self.best_metric:
            best["best_fn"] = self._rank  # without it Orbax does not write the metrics, and forgets the best on resume
            policies.append(
                preservation_policy.BestN(get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed run left half-written
            create=True,
            **best,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(epath.Path(os.fspath(self.folder)), options=options)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another --workdir") from error

    def _rank(self, metrics: Mapping[str, float]) -> float:
        """Return how good a checkpoint is; one whose metric is not finite is never the best."""
        value = metrics[self.best_metric]
        return self._sign * value if math.isfinite(value) else -math.inf

    def check_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Raise a UserError if the metric that chooses the best checkpoint is not among those that are logged."""
        if self.best_metric and self.best_metric not in metrics:
            raise UserError(
                f"config.checkpoint.best_metric={self.best_metric!r} is not logged"
                f"{closest(self.best_metric, metrics)}; use one of {', '.join(metrics)}"
            )

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, meta: Mapping, metrics: Mapping[str, float]) -> None:
        """Start writing a checkpoint; returns once the arrays are copied from the devices.

        Raises:
          UserError: the disk is full, or the bucket not reached (now, or while the one before was written); the
            complete ones stay.
        """
        if step in self._manager.all_steps():
            return
        best = {}
        if self.best_metric in metrics:
            best = {"metrics": {self.best_metric: metrics[self.best_metric]}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in state.to_items().items()}
        with self._reporting(step):
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(dict(meta)), **items), **best)

    def check(self) -> None:
        """Raise a UserError, as for `save`, if what is written in the background failed; it is not waited for."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return once everything is on disk (UserError as for `save`)."""
        with self._reporting(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def meta(self, step: int) -> dict:
        """Return the JSON part of a checkpoint."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:  # Orbax raises what its parsers do
            raise self._damaged(step, error) from error

    def restore(self, step: int, abstract: State) -> State:
        """Read a checkpoint into arrays with the shapes, dtypes and shardings of `abstract`."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.to_items().items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._damaged(step, error) from error
        return abstract.from_items(restored)

    def _damaged(self, step: int, error: Exception) -> UserError:
        if away := bucket_trouble(self.folder / str(step), error):
            return away
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return UserError(
            f"{self.folder / str(step)}: cannot be read ({first[:200]}); remove it to go on from the one before"
        )

    def _reporting(self, step: int | None) -> "_WriteErrors":
        return _WriteErrors(self, step)


class _WriteErrors:
    """Turns a full disk, or a bucket that is not reached, wherever in Orbax it shows, into one line."""

    def __init__(self, checkpoints: Checkpoints, step: int | None):
        self._checkpoints, self._step = checkpoints, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            return False
        if away := bucket_trouble(self._checkpoints.folder, error):
            raise away from error
        if not _is_disk_full(error):
            return False
        complete = sorted(int(path.name) for path in self._checkpoints.folder.iterdir() if path.name.isdigit())
        kept = f"step {complete[-1]} is the last good one" if complete else "there is no earlier one"
        what = "the last checkpoint" if self._step is None else f"the checkpoint of step {self._step}"
        raise UserError(
            f"{self._checkpoints.folder}: no space left on the disk for {what}; {kept}. Free some space and run "
            "the same command again"
        ) from error


def _is_disk_full(error: BaseException) -> bool:
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in text or "ENOSPC" in text or "RESOURCE_EXHAUSTED: write" in text


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep Python from printing a traceback for each write that was under way when another one failed.

    Orbax closes its event loop then, and the first error, which we report, is the one that says what happened.
    """
    show = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook

"""Checkpoints of a run: Orbax, written in the background, the newest N and the best one kept.

A checkpoint `workdir/checkpoints/<step>/` has the items `generator`, `fake_score`, `ema` (where the run keeps one),
`optimizers` and `progress` as arrays, and `meta` as JSON: the architecture, the student's schedule and guidance, the
whole config, the run's random key and the position in the data.
"""

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from avd_jax.errors import UserError
from avd_jax.losses.adaptive_regression import LossHistory
from avd_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, settings):
        """Open or create `workdir/checkpoints`; `settings` is `config.checkpoint`."""
        self.folder = workdir.absolute() / "checkpoints"
        policies = [preservation_policy.LatestN(settings.keep)]
        self._best_metric = settings.best_metric
        if self._best_metric:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[self._best_metric],
                    n=1,
                    reverse=settings.best_mode == "min",  # Orbax sorts ascending and keeps the last
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed run left half-written
            create=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another --workdir") from error

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: Mapping, metrics: Mapping[str, float]) -> None:
        """Start writing a checkpoint; returns once the arrays are copied from the devices.

        Raises:
          UserError: the disk is full (now, or while the one before was written); the complete ones stay.
        """
        if step in self._manager.all_steps():
            return
        best = {}
        if self._best_metric:
            names = ", ".join(metrics)
            if metrics and self._best_metric not in metrics:
                raise UserError(
                    f"config.checkpoint.best_metric={self._best_metric!r} is not logged; use one of {names}"
                )
            best = {"metrics": {self._best_metric: metrics[self._best_metric]}} if metrics else {}
        items = {name: ocp.args.StandardSave(tree) for name, tree in _to_items(state).items()}
        with self._reporting(step):
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(dict(meta)), **items), **best)

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

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Read a checkpoint into arrays with the shapes, dtypes and shardings of `abstract`."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _to_items(abstract).items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._damaged(step, error) from error
        return _from_items(restored, abstract)

    def _damaged(self, step: int, error: Exception) -> UserError:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return UserError(
            f"{self.folder / str(step)}: cannot be read ({first[:200]}); remove it to go on from the one before"
        )

    def _reporting(self, step: int | None) -> "_DiskErrors":
        return _DiskErrors(self, step)


class _DiskErrors:
    """Turns a full disk, wherever in Orbax it shows, into one line."""

    def __init__(self, checkpoints: Checkpoints, step: int | None):
        self._checkpoints, self._step = checkpoints, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or not _is_disk_full(error):
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


def _to_items(state: TrainState) -> dict:
    items = {
        "generator": state.generator,
        "fake_score": state.fake_score,
        "optimizers": {"generator": state.generator_optimizer, "fake_score": state.fake_score_optimizer},
        "progress": {
            "step": state.step,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
            "history": {"mean": state.history.mean, "seen": state.history.seen},
        },
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _from_items(items, abstract: TrainState) -> TrainState:
    progress = items["progress"]
    state = replace(
        abstract,
        step=progress["step"],
        generator=items["generator"],
        fake_score=items["fake_score"],
        ema=None if abstract.ema is None else items["ema"],
        generator_optimizer=items["optimizers"]["generator"],
        fake_score_optimizer=items["optimizers"]["fake_score"],
        history=LossHistory(**progress["history"]),
        skipped=progress["skipped"],
        skipped_in_row=progress["skipped_in_row"],
    )
    return state

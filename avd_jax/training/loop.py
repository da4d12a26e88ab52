"""The host's side of every training run: dispatch a step, log the one before, save, stop.

The loop never waits for the devices: it dispatches a step, a cycle of updates, and then fetches the metrics of the one
before.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import jax

from avd_jax.errors import UserError
from avd_jax.fields import flatten
from avd_jax.training.checkpoint import Checkpoints, State
from avd_jax.training.ledger import Ledger, in_words
from avd_jax.training.metrics import MetricsWriter, NoMetrics
from avd_jax.training.profiling import Profile
from avd_jax.training.workdir import StopSignals, jsonable

SomeState = TypeVar("SomeState", bound=State)


@dataclass(frozen=True)
class Driven(Generic[SomeState]):
    """What the loop drives.

    Attributes:
      config: `num_steps`, `log_every`, `checkpoint_every` and `max_nonfinite` are read here, all of it is recorded.
      dispatch: `(state, step) -> (state, metrics)`, the step from `step` to `step + 1`; it must not wait for it.
      describe: says what a checkpoint records besides arrays, step and settings, such as the data's position.
      summarise: `(step, metrics) -> numbers to log`, once they are on the host; `skipped/in_row` is among them.
      ratings: further numbers, of earlier steps, that a checkpoint may be rated by.
      sample: called with `(step, state)` every `sample_every` steps and after the last, after the checkpoint unless
        that is rated by the samples; its time is not a step's.
      sample_every: 0 never samples.
      seconds_at_peak: that the step just dispatched would take if every device worked at its peak; None if unknown.
      ledger: of the run's time, which the loop keeps.
      profile: folder for a trace of a few steps; None traces none.
    """

    config: object
    dispatch: Callable[[SomeState, int], tuple[SomeState, object]]
    describe: Callable[[], dict]
    summarise: Callable[[int, Mapping], dict[str, float]]
    ratings: Callable[[], dict[str, float]] = dict
    sample: Callable[[int, SomeState], object] = lambda step, state: None
    sample_every: int = 0
    seconds_at_peak: Callable[[], float | None] = lambda: None
    ledger: Ledger = field(default_factory=Ledger)
    profile: Path | None = None


def run_steps(
    driven: Driven[SomeState],
    state: SomeState,
    checkpoints: Checkpoints,
    writer: MetricsWriter | NoMetrics,
    stop: StopSignals,
) -> tuple[int, SomeState]:
    """Make the steps from `state.step` to `config.num_steps`, or until a signal.

    Returns:
      The exit status, 0 or 128 + the number of the signal that stopped the run, and the last state, which is saved.

    Raises:
      UserError: the loss stays non-finite, the best metric does not exist, or the disk is full.
    """
    return _HostLoop(driven, checkpoints, writer, stop, int(state.step)).go(state)


class _HostLoop:
    """One process's way from the first to the last step."""

    def __init__(self, driven: Driven, checkpoints, writer, stop, step: int):
        self.driven, self.config = driven, driven.config
        self.checkpoints, self.writer, self.stop = checkpoints, writer, stop
        self.pending: tuple[int, object, float | None] | None = None
        self.latest: dict[str, float] = {}
        self.step = self.written = step
        self.clock, self.at_peak = time.monotonic(), 0.0
        self.profile = Profile(driven.profile, first_step=step, num_steps=driven.config.num_steps)

    def go(self, state):
        config = self.config
        self.driven.ledger.turn_to("step")
        while self.step < config.num_steps and not self.stop.before(self.step):
            self.profile.before(self.step)
            with jax.profiler.StepTraceAnnotation("step", step_num=self.step):
                state, metrics = self.driven.dispatch(state, self.step)
            self._fetch()  # of the step before, while the devices work on this one
            self.profile.after(self.step, metrics)
            self.step += 1
            self.pending = self.step, metrics, self.driven.seconds_at_peak()
            actions = [self._sample] if self._is_due(self.driven.sample_every) else []
            if self._is_due(config.checkpoint_every):
                rated_by_samples = self.checkpoints.best_metric in self.driven.ratings()
                actions.insert(len(actions) if rated_by_samples else 0, self._save)
            for act in actions:
                act(state)
            self._stop_if_broken(state)
        self.profile.close()
        self._save(state)
        self._wait()
        spent = self.driven.ledger.numbers()
        self.writer.message(in_words(spent))
        if self.stop.signal and self.step < config.num_steps:
            if self.step != self.written:
                self.writer.record(self.step, spent)  # from here on the run is down
            name = signal.Signals(self.stop.signal).name
            self.writer.message(
                f"stopped by {name} after step {self.step}, which is saved; the same command goes on from it"
            )
            return 128 + self.stop.signal, state
        self.writer.message(f"done: {self.step} steps, checkpoints in {self.checkpoints.folder}")
        return 0, state

    def _is_due(self, every: int) -> bool:
        """Return whether what happens every so many steps, and after the last, is to happen now; 0: never."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.num_steps)

    def _sample(self, state) -> None:
        self._fetch()
        started = time.monotonic()
        with self.driven.ledger.spending("sample"):
            self.driven.sample(self.step, state)
        self.clock += time.monotonic() - started

    def _fetch(self) -> None:
        """Bring the last step's metrics to the host and log them."""
        if self.pending is None:
            return
        step, metrics, at_peak = self.pending
        self.pending = None
        self.at_peak += at_peak or 0.0
        self.latest = values = self.driven.summarise(step, jax.device_get(metrics))
        self.checkpoints.check_best_metric(self.driven.ratings() | values)  # now, not when hours later it is needed
        self.writer.advance(step)
        if step % self.config.log_every == 0 or step == self.config.num_steps:
            self.checkpoints.check()  # now, not at the next checkpoint
            now = time.monotonic()
            seconds = (now - self.clock) / (step - self.written)
            speed = {"time/step_seconds": seconds, "time/steps_per_second": 1 / seconds}
            if self.at_peak:
                speed["time/mfu"] = self.at_peak / (now - self.clock)
            self.clock, self.written, self.at_peak = now, step, 0.0
            self.writer.write(step, values | speed | self.driven.ledger.numbers())

    def _save(self, state) -> None:
        self._fetch()
        with self.driven.ledger.spending("save"):
            self._write(state)

    def _write(self, state) -> None:
        self.writer.flush()
        meta = self.driven.describe() | {"step": self.step, "settings": jsonable(flatten(self.config))}
        self.checkpoints.save(self.step, state, meta, self.driven.ratings() | self.latest)

    def _wait(self) -> None:
        with self.driven.ledger.spending("save"):
            self.checkpoints.wait()

    def _stop_if_broken(self, state) -> None:
        skipped = self.latest.get("skipped/in_row", 0)
        if skipped < self.config.max_nonfinite:
            return
        self._save(state)
        self._wait()
        raise UserError(
            f"the loss was not finite in {int(skipped)} updates in a row (config.max_nonfinite); stopped after step "
            f"{self.step}, which is saved with the last good weights. Look at metrics.jsonl; a lower "
            "optimizer.learning_rate or clean data may help"
        )

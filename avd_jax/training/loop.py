"""The host loop of a distillation run: cycles of updates, logs, samples, checkpoints; resumable at any moment.

The loop never waits for the devices: it dispatches a cycle and then fetches the metrics of the one before. A run that
is killed or stopped goes on from its last checkpoint and ends with the same parameters, bit for bit.
"""

import signal
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.training.checkpoint import Checkpoints
from avd_jax.training.config import FIELDS, validate
from avd_jax.training.cost import cycle_cost, fake_score_updates
from avd_jax.training.fields import describe, flatten
from avd_jax.training.metrics import MetricsWriter
from avd_jax.training.run import Run, build_run
from avd_jax.training.samples import SampleWriter
from avd_jax.training.state import TrainState
from avd_jax.training.workdir import CHANGEABLE, StopSignals, claim, jsonable


def train(config, workdir: Path) -> int:
    """Train, or go on training, in `workdir`.

    Returns:
      The exit status: 0 when the run is complete, 128 + the signal's number when a signal stopped it (after a
      checkpoint; the same command goes on).

    Raises:
      UserError: for what the user can put right.
    """
    validate(config)
    claim(config, workdir, changeable=(*CHANGEABLE, "num_steps"))
    print(describe(config, FIELDS), flush=True)
    _print_cost(config)
    with StopSignals() as stop:
        run = build_run(config, workdir)
        overview = parameter_overview.get_parameter_overview(run.abstract.generator, include_stats=False)
        write_text(workdir / "parameters.txt", f"{overview}\n")
        checkpoints = Checkpoints(workdir, **config.checkpoint)
        state, key, batches = _start(run, checkpoints)
        first_step = int(state.step)
        writer = MetricsWriter(workdir, first_step=first_step, num_steps=config.num_steps)
        try:
            if first_step >= config.num_steps:
                writer.message(f"the run is complete: {first_step} of {config.num_steps} steps are in {workdir}")
                return 0
            if first_step:
                writer.message(f"going on from step {first_step}")
            samples = SampleWriter(run, workdir, writer) if config.sample_every else None
            return _Loop(run, checkpoints, writer, samples, stop, key, batches).go(state)
        finally:
            writer.close()


class _Loop:
    """One process's way from the first to the last step."""

    def __init__(self, run, checkpoints, writer, samples, stop, key, batches):
        self.run, self.config, self.updates = run, run.config, fake_score_updates(run.config)
        self.checkpoints, self.writer, self.samples, self.stop = checkpoints, writer, samples, stop
        self.key, self.batches = key, batches
        self.pending: tuple[int, dict, list[dict]] | None = None
        self.logged: dict[str, float] = {}
        self.clock = time.monotonic()

    def go(self, state: TrainState) -> int:
        step = int(state.step)
        while step < self.config.num_steps and not self.stop.signal:
            if self.samples and step == 0:
                self.samples.write(step, state)
            state, metrics, fake_metrics = self._cycle(state, step)
            self._fetch()  # of the step before, while the devices work on this one
            step += 1
            self.pending = (step, metrics, fake_metrics)
            if self.samples and step % self.config.sample_every == 0:
                self._fetch()
                self.samples.write(step, state)
                self.clock = time.monotonic()  # samples are no part of a step's time
            if self.config.checkpoint_every and step % self.config.checkpoint_every == 0:
                self._save(step, state)
            self._stop_if_broken(step, state)
        self._save(step, state)
        self.checkpoints.wait()
        if self.stop.signal and step < self.config.num_steps:
            name = signal.Signals(self.stop.signal).name
            self.writer.message(
                f"stopped by {name} after step {step}, which is saved; the same command goes on from it"
            )
            return 128 + self.stop.signal
        self.writer.message(f"done: {step} steps, checkpoints in {self.checkpoints.folder}")
        return 0

    def _cycle(self, state: TrainState, step: int):
        """Dispatch one cycle: the updates of fake_score, then the one of the generator."""
        run, cycle_key = self.run, jax.random.fold_in(self.key, step)
        batch = next(self.batches)
        fake_metrics = []
        for i in range(self.updates):
            prompts = {"prompt_embeds": run.on_devices(batch["prompt_embeds"][:, i])}
            state, metrics = run.fake_score_step(state, run.frozen, prompts, jax.random.fold_in(cycle_key, i))
            fake_metrics.append(metrics)
        real = {name: run.on_devices(batch[name]) for name in ("latents", "caption_embeds")}
        real["prompt_embeds"] = run.on_devices(batch["prompt_embeds"][:, -1])
        state, metrics = run.generator_step(state, run.frozen, real, jax.random.fold_in(cycle_key, self.updates))
        return state, metrics, fake_metrics

    def _fetch(self) -> None:
        """Bring the last step's metrics to the host and log them."""
        if self.pending is None:
            return
        step, metrics, fake_metrics = self.pending
        self.pending = None
        metrics, fake_metrics = jax.device_get((metrics, fake_metrics))
        values = {name: float(value) for name, value in metrics.items()}
        for name in ("loss/fake_score", "grad_norm/fake_score"):
            if fake_metrics:
                values[name] = float(np.mean([update[name] for update in fake_metrics]))
        now = time.monotonic()
        values["time/step_seconds"] = now - self.clock
        self.checkpoints.check_best_metric(values)  # now, not when hours later it is needed
        self.clock, self.logged = now, values
        self.writer.advance(step)
        if step % self.config.log_every == 0 or step == self.config.num_steps:
            self.writer.write(step, values)

    def _save(self, step: int, state: TrainState) -> None:
        self._fetch()
        meta = {
            "architecture": self.run.architecture(),
            "student": self.run.student_settings(),
            "step": step,
            "settings": jsonable(flatten(self.config)),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "data": self.batches.get_state(),
        }
        self.checkpoints.save(step, state, meta, self.logged)

    def _stop_if_broken(self, step: int, state: TrainState) -> None:
        skipped = self.logged.get("skipped/in_row", 0)
        if skipped < self.config.max_nonfinite:
            return
        self._save(step, state)
        self.checkpoints.wait()
        raise UserError(
            f"the loss was not finite in {int(skipped)} updates in a row (config.max_nonfinite); stopped after step "
            f"{step}, which is saved with the last good weights. Look at metrics.jsonl; a lower "
            "optimizer.learning_rate or clean data may help"
        )


def _start(run: Run, checkpoints: Checkpoints):
    """Return (state, key, batches) of a new run or of the last checkpoint."""
    batches = run.batches()
    step = checkpoints.latest_step()
    if step is None:
        return run.init_state(), jax.random.key(run.config.seed), batches
    meta = checkpoints.meta(step)
    here = jsonable(run.architecture())
    if meta["architecture"] != here:
        difference = _difference(meta["architecture"], here)
        raise UserError(
            f"{checkpoints.folder / str(step)}: is of another architecture ({difference}); "
            "give its own init_from or another --workdir"
        )
    batches.set_state(meta["data"])
    key = jax.random.wrap_key_data(np.asarray(meta["key"], np.uint32))
    return checkpoints.restore(step, run.abstract), key, batches


def _print_cost(config) -> None:
    cost = cycle_cost(config)
    print(
        f"one cycle ({fake_score_updates(config)} fake_score updates, 1 generator update) costs {cost.cycle:g} forward "
        f"passes of the DiT an example: {cost.fake_score:g} a fake_score update, {cost.generator:g} a generator update",
        flush=True,
    )


def _difference(before: Mapping, now: Mapping) -> str:
    old, new = before.get("config", {}), now["config"]
    return ", ".join(f"{name} {old.get(name)} there, {new[name]} here" for name in new if old.get(name) != new[name])

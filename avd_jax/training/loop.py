"""A distillation run: cycles of updates, logs, samples, checkpoints; resumable at any moment.

A run that is killed or stopped goes on from its last checkpoint and ends with the same parameters, bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError
from avd_jax.parallel.hosts import is_first
from avd_jax.training.checkpoint import Checkpoints
from avd_jax.training.config import FIELDS, validate
from avd_jax.training.cost import cycle_cost, fake_score_updates
from avd_jax.training.fields import describe
from avd_jax.training.host_loop import Work, run_steps
from avd_jax.training.meters import BINS, Meters
from avd_jax.training.metrics import MetricsWriter, NoMetrics, open_metrics
from avd_jax.training.run import Run, build_run
from avd_jax.training.samples import SampleWriter
from avd_jax.training.state import TrainState
from avd_jax.training.throughput import seconds_at_peak
from avd_jax.training.workdir import CHANGEABLE, StopSignals, check_inputs, claim, jsonable


def train(config, workdir: Path, *, profile: bool = False) -> int:
    """Train, or go on training, in `workdir`; `profile` writes a trace of a few steps to `workdir/profile`.

    Returns:
      The exit status: 0 when the run is complete, 128 + the signal's number when a signal stopped it (after a
      checkpoint; the same command goes on).

    Raises:
      UserError: for what the user can put right.
    """
    validate(config)
    # Paths may change: it is their contents that must be the same (`_start`).
    claim(config, workdir, changeable=(*CHANGEABLE, "num_steps", "init_from", "data.latents", "data.prompts"))
    if is_first():
        print(describe(config, FIELDS), flush=True)
        _print_cost(config)
    with StopSignals() as stop:
        run = build_run(config, workdir)
        overview = parameter_overview.get_parameter_overview(run.abstract.generator, include_stats=False)
        if is_first():
            write_text(workdir / "parameters.txt", f"{overview}\n")
        checkpoints = Checkpoints(workdir, **config.checkpoint)
        state, key, batches = _start(run, checkpoints)
        first_step = int(state.step)
        writer = open_metrics(workdir, first_step=first_step, num_steps=config.num_steps)
        try:
            if first_step >= config.num_steps:
                writer.message(f"the run is complete: {first_step} of {config.num_steps} steps are in {workdir}")
                return 0
            if first_step:
                writer.message(f"going on from step {first_step}")
            meters = Meters(config.meters, config.student.timesteps, writer.message, batch_size=config.batch_size)
            samples = SampleWriter(run, workdir, writer, meters) if config.sample_every else None
            if samples and not first_step and not stop.signal:
                samples.write(0, state)
            folder = workdir / "profile" if profile else None
            work = _work(run, key, batches, samples, meters, writer, folder)
            status, _ = run_steps(work, state, checkpoints, writer, stop)
            return status
        finally:
            writer.close()


def _work(
    run: Run,
    key,
    batches,
    samples: SampleWriter | None,
    meters: Meters,
    writer: MetricsWriter | NoMetrics,
    profile: Path | None,
) -> Work[TrainState]:
    updates = fake_score_updates(run.config)

    def dispatch(state: TrainState, step: int):
        """Dispatch one cycle: the updates of fake_score, then the one of the generator."""
        cycle_key, batch = jax.random.fold_in(key, step), next(batches)
        fake_metrics = []
        for i in range(updates):
            prompts = {"prompt_embeds": run.rows.put(batch["prompt_embeds"][:, i])}
            state, metrics = run.fake_score_step(state, run.frozen, prompts, jax.random.fold_in(cycle_key, i))
            fake_metrics.append(metrics)
        real = {name: run.rows.put(batch[name]) for name in ("latents", "caption_embeds")}
        real["prompt_embeds"] = run.rows.put(batch["prompt_embeds"][:, -1])
        state, metrics = run.generator_step(state, run.frozen, real, jax.random.fold_in(cycle_key, updates))
        return state, (metrics, fake_metrics)

    def describe() -> dict:
        return {
            "architecture": run.architecture(),
            "student": run.student_settings(),
            "inputs": run.inputs,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "data": batches.get_state(),
        }

    def summarise(step: int, metrics: tuple[Mapping, list[Mapping]]) -> dict[str, float]:
        """Return the generator's metrics, the means over fake_score's updates of the cycle, and the meters."""
        values, fake_score = dict(metrics[0]), metrics[1]
        for name, counts in meters.after_update(step, values).items():
            writer.histogram(step, name, counts, BINS)
        values = {name: float(value) for name, value in values.items()}
        for name in ("loss/fake_score", "grad_norm/fake_score"):
            if fake_score:
                values[name] = float(np.mean([update[name] for update in fake_score]))
        return values

    return Work(
        config=run.config,
        dispatch=dispatch,
        describe=describe,
        summarise=summarise,
        standing=lambda: meters.values,
        sample=samples.write if samples else lambda step, state: None,
        sample_every=run.config.sample_every,
        seconds_at_peak=seconds_at_peak(run),
        profile=profile,
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
    check_inputs(meta.get("inputs"), run.inputs, checkpoints.folder / str(step))
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

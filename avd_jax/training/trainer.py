"""A training run of any method: it is put together, resumed, driven to its end, saved.

A run that is killed or stopped resumes from its last checkpoint and ends with the same parameters, bit for bit; on
NVIDIA GPUs up to rounding (docs/training.md).
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from avd_jax.data.atomic import only_writer, write_text
from avd_jax.errors import UserError
from avd_jax.fields import describe
from avd_jax.parallel.hosts import is_first
from avd_jax.parallel.rules import sharding_table
from avd_jax.paths import any_path
from avd_jax.training.assembly import Assembly
from avd_jax.training.checkpoint import Checkpoints
from avd_jax.training.cost import cycle_cost, seconds_at_peak
from avd_jax.training.ledger import Ledger
from avd_jax.training.loop import Driven, run_steps
from avd_jax.training.method import Batches, Method, Recipe, Surroundings
from avd_jax.training.metrics import open_metrics
from avd_jax.training.state import TrainState
from avd_jax.training.workdir import (
    StopSignals,
    changed_settings,
    check_inputs,
    check_shared,
    jsonable,
    record_config,
)

# Of the checkpoints: 1 had a state for distillation and another for everything else.
FORMAT = 2


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      status: the exit status: 0 if the run is complete, 128 + the signal's number if a signal stopped it (after a
        checkpoint; the same command resumes it).
      state: the last one, which is saved.
      method: what was trained.
    """

    status: int
    state: TrainState
    method: Method


def train(recipe: Recipe, config, workdir: Path, *, profile: bool = False) -> Outcome:
    """Train, or resume training, in `workdir`.

    Args:
      recipe: of the method.
      config: of the recipe's fields.
      workdir: folder of the run.
      profile: write a trace of a few steps to `workdir/profile`.

    Raises:
      UserError: for what the user can put right.
    """
    ledger = Ledger()
    recipe.validate(config)
    workdir = any_path(workdir)
    check_shared(workdir)
    changed = changed_settings(config, workdir, recipe.fields)
    if is_first():
        print(describe(config, recipe.fields), flush=True)
    with StopSignals() as stop, contextlib.ExitStack() as held:
        method = recipe.build(config)
        assembly = Assembly(method)
        costs = {size: cycle_cost(assembly, size) for size in assembly.sizes}
        at_peak = {size: seconds_at_peak(assembly, cost) for size, cost in costs.items()}
        still_ours = lambda: None  # noqa: E731 - of the other hosts
        if is_first():
            still_ours = held.enter_context(only_writer(workdir))
            _print_layout(assembly)
            for size, cost in costs.items():
                print(f"{size}: {cost.as_text()}" if len(costs) > 1 else cost.as_text(), flush=True)
            overview = parameter_overview.get_parameter_overview(method.main_network.abstract, include_stats=False)
            write_text(workdir / "parameters.txt", f"{overview}\n")
        inputs = method.inputs()
        frozen = assembly.load_frozen()
        checkpoints = Checkpoints(workdir, **config.checkpoint)
        state, key, batches = _start(assembly, config, checkpoints, inputs, ledger)
        first_step = int(state.step)
        if is_first():
            record_config(config, workdir, step=first_step, changed=changed)
        goes_on = first_step < config.num_steps
        writer = open_metrics(
            workdir, first_step=first_step, num_steps=config.num_steps, ledger=ledger if goes_on else None
        )
        try:
            if not goes_on:
                writer.message(f"the run is complete: {first_step} of {config.num_steps} steps are in {workdir}")
                return Outcome(0, state, method)
            if first_step:
                writer.message(f"going on from step {first_step}" + _in_words(changed))
            observer = method.observer(Surroundings(workdir, writer), frozen)
            if observer.sample_every and observer.samples_at_start and not first_step and not stop.signal:
                with ledger.spending("sample"):
                    observer.sample(0, state)

            size, complete = next(iter(assembly.sizes)), True

            def dispatch(state: TrainState, step: int):
                nonlocal size, complete
                with ledger.spending("data"):
                    batch = next(batches)
                size, complete = assembly.size_of(batch), assembly.complete(step)
                return assembly.dispatch(state, frozen, batch, jax.random.fold_in(key, step), step)

            def record() -> dict:
                still_ours()
                return {
                    **{"format": FORMAT, "method": method.name, "main": method.main, "cycle": assembly.cycle()},
                    **{"key": np.asarray(jax.random.key_data(key)).tolist(), "data": batches.get_state()},
                    "inputs": inputs,
                    **method.record(),
                }

            driven = Driven(
                config=config,
                dispatch=dispatch,
                describe=record,
                summarise=lambda step, metrics: observer.summarise(step, _together(metrics)),
                ratings=lambda: observer.ratings,
                sample=observer.sample,
                sample_every=observer.sample_every,
                seconds_at_peak=lambda: at_peak[size] if complete else None,
                ledger=ledger,
                profile=workdir / "profile" if profile else None,
            )
            status, state = run_steps(driven, state, checkpoints, writer, stop)
            return Outcome(status, state, method)
        finally:
            writer.close()


def _start(
    assembly: Assembly, config, checkpoints: Checkpoints, inputs: Mapping[str, str], ledger: Ledger
) -> tuple[TrainState, jax.Array, Batches]:
    """Return (state, key, batches) of a new run or of the last checkpoint."""
    method, step = assembly.method, checkpoints.latest_step()
    batches = method.batches(assembly.fresh())
    if step is None:
        return assembly.init_state(), jax.random.key(config.seed), batches
    meta, where = checkpoints.meta(step), checkpoints.folder / str(step)
    if meta.get("format") != FORMAT:
        weights = f", from its weights if you like: --config.init_from={checkpoints.folder.parent}"
        raise UserError(
            f"{where}: is of an older version of avd_jax (format {meta.get('format', 1)}, here {FORMAT}) and cannot be "
            "resumed; end the run with that version, or begin one in another --workdir"
            + (weights if "init_from" in config else "")
        )
    if meta["method"] != method.name:
        raise UserError(
            f"{where}: is a run of the method {meta['method']!r}, the config is of {method.name!r}; use its own "
            "config, or another --workdir"
        )
    there, here = meta.get("architecture", {}), jsonable(method.record()).get("architecture", {})
    if there != here:
        difference = _difference(there, here)
        raise UserError(
            f"{where}: is of another architecture ({difference}); give its own init_from or another --workdir"
        )
    if meta["cycle"] != assembly.cycle():
        raise UserError(
            f"{where}: the run trains {_updates(meta['cycle'])}, the config {_updates(assembly.cycle())}; which terms "
            "have a weight decides networks and the order of the data: switch on the same, or take another --workdir"
        )
    check_inputs(meta.get("inputs"), inputs, where)
    batches.set_state(meta["data"])
    key = jax.random.wrap_key_data(np.asarray(meta["key"], np.uint32))
    with ledger.spending("restore"):
        return checkpoints.restore(step, assembly.abstract), key, batches


def _updates(cycle: Mapping) -> str:
    updates = " and ".join(f"{network} {times} times" for network, times in cycle["updates"].items())
    batches = " and ".join(f"{n} batches of {name}" for name, n in cycle["batches"].items())
    return f"{updates} a cycle" + (f", from {batches}" if batches else "")


def _in_words(changed: Mapping[str, list]) -> str:
    shown = ", ".join(f"config.{name} {now!r} instead of {before!r}" for name, (before, now) in changed.items())
    return f", with {shown}" if shown else ""


def _together(metrics: Mapping[str, list[Mapping]]) -> dict:
    """Return a cycle's metrics as one mapping: means over an update's calls, and the last counts of skipped updates."""
    together: dict = {}
    for calls in metrics.values():
        for name, last in calls[-1].items():
            counted = name.startswith("skipped/") or len(calls) == 1
            together[name] = last if counted else np.mean([call[name] for call in calls], axis=0)
    return together


def _print_layout(assembly: Assembly) -> None:
    print(f"mesh {dict(assembly.method.mesh.shape)}", flush=True)
    if table := sharding_table(assembly.abstract.networks[assembly.method.main].params):
        print(f"large leaves of a network, its moments and its EMA:\n{table}", flush=True)


def _difference(before: Mapping, now: Mapping) -> str:
    old, new = ({**of.get("config", {}), "adapters": of.get("adapters")} for of in (before, now))
    differing = (name for name in new if old.get(name) != new[name])
    return ", ".join(f"{name} {old.get(name)} there, {new[name]} here" for name in differing)

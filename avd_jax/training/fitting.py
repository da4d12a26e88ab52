"""Training one network on one loss: what the VAE's training and the transformer's pretraining share.

State and update; host loop, run folder, checkpoints, signals and logs are those of the distillation. A run
that is stopped or killed goes on from its last checkpoint and ends with the same parameters, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from avd_jax.data.pipeline import training_batches
from avd_jax.errors import UserError
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.mesh import replicated
from avd_jax.parallel.rules import tree_shardings
from avd_jax.training.checkpoint import Checkpoints
from avd_jax.training.fields import Fields, check_names
from avd_jax.training.host_loop import Work, run_steps
from avd_jax.training.metrics import open_metrics
from avd_jax.training.networks import Params
from avd_jax.training.workdir import CHANGEABLE, StopSignals, check_inputs, claim, jsonable

Matrices = Callable[[Params], object]
Loss = Callable[[Params, Mapping, jax.Array], tuple[jax.Array, dict]]

SHARED_FIELDS: dict[str, tuple[object, str]] = {
    "optimizer.learning_rate": (1e-3, "AdamW's highest learning rate"),
    "optimizer.warmup_steps": (200, "updates over which it rises from zero"),
    "optimizer.beta1": (0.9, "AdamW's decay of the first moment"),
    "optimizer.beta2": (0.99, "AdamW's decay of the second moment"),
    "optimizer.weight_decay": (0.0, "AdamW's decoupled weight decay"),
    "optimizer.max_grad_norm": (1.0, "gradients are scaled down to this global norm"),
    "ema_decay": (0.999, "decay of the running mean of the weights, which is what is used afterwards"),
    "log_every": (50, "updates between two lines of metrics.jsonl"),
    "checkpoint_every": (500, "updates between two checkpoints; 0: only at the end and on SIGTERM"),
    "checkpoint.keep": (2, "newest checkpoints to keep"),
    "max_nonfinite": (10, "updates in a row that may be skipped for a non-finite loss before the run stops"),
}


def check_shared(config, fields: Fields) -> dict[str, object]:
    """Check the names, which are those of `fields`, and the values of the fields that every training has.

    Returns:
      The flat config.

    Raises:
      UserError: naming the field.
    """
    flat = check_names(config, fields)
    for name in ("num_steps", "batch_size", "log_every", "max_nonfinite", "checkpoint.keep"):
        if flat[name] < 1:
            raise UserError(f"config.{name}={flat[name]} must be at least 1")
    for name in ("ema_decay", "optimizer.beta1", "optimizer.beta2"):
        if not 0 <= flat[name] < 1:
            raise UserError(f"config.{name}={flat[name]} must be at least 0 and below 1")
    for name in ("checkpoint_every", *(name for name in SHARED_FIELDS if name.startswith("optimizer."))):
        if not 0 <= flat[name] < math.inf:
            raise UserError(f"config.{name}={flat[name]} must be 0 or a positive number")
    return flat


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FitState:
    """What an update reads and replaces.

    Attributes:
      step: updates made, int32.
      params: float32 masters.
      ema: running mean of the parameters.
      optimizer: AdamW's state.
      skipped_in_row: updates skipped for a non-finite loss since the last good one, int32.
    """

    step: jax.Array
    params: Params
    ema: Params
    optimizer: optax.OptState
    skipped_in_row: jax.Array

    def to_items(self) -> dict:
        """Return what a checkpoint stores, by item; `load_dit` finds `generator` and `ema`."""
        return {
            "generator": self.params,
            "ema": self.ema,
            "optimizers": self.optimizer,
            "progress": {"step": self.step, "skipped_in_row": self.skipped_in_row},
        }

    def from_items(self, items: Mapping) -> "FitState":
        """Return the state that a checkpoint of a state like this one holds."""
        return FitState(params=items["generator"], ema=items["ema"], optimizer=items["optimizers"], **items["progress"])


def make_optimizer(config, matrices: Matrices | None = None) -> optax.GradientTransformation:
    """Build the optimizer: a linear warm-up, a cosine decay to zero, and a clip of the gradient's global norm.

    Args:
      config: has optimizer and num_steps.
      matrices: which axes of each parameter are the rows and columns of matrices that Muon is to update
        (arXiv 2502.16982), None for the parameters that AdamW updates; without it AdamW updates all.
    """
    settings = config.optimizer
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup_steps, max(config.num_steps, settings.warmup_steps + 1)
    )
    if matrices is None:
        update = optax.adamw(rate, b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay)
    else:
        update = optax.contrib.muon(
            rate,
            weight_decay=settings.weight_decay,
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as AdamW's
        )
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), update)


def init_state(optimizer: optax.GradientTransformation, params: Params) -> FitState:
    """Start from `params`; a pure function of arrays."""
    return FitState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # with buffers of its own, which the step may reuse
        optimizer=optimizer.init(params),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def abstract_state(optimizer: optax.GradientTransformation, abstract_params: Params, mesh: Mesh) -> FitState:
    """Return the state's shapes, dtypes and shardings."""
    shapes = jax.eval_shape(partial(init_state, optimizer), abstract_params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def make_step(loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float) -> Callable:
    """Return the update `(state, batch, key) -> (state, metrics)`; a non-finite one changes only the counters.

    `loss(params, batch, key)` gives a scalar and a dict of further scalars to log.
    """

    def step(state: FitState, batch: Mapping, key: jax.Array) -> tuple[FitState, dict]:
        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        norm = optax.tree.norm(gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A short run's mean must not remember its random start: the decay grows to its final value.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updated = replace(state, params=params, ema=ema, optimizer=moments)
        kept = jax.tree.map(partial(jnp.where, good), updated, state)
        skipped = jnp.where(good, 0, state.skipped_in_row + 1)
        return replace(kept, step=state.step + 1, skipped_in_row=skipped), {
            "loss/total": value,
            **parts,
            "grad_norm": norm,
            "skipped/in_row": skipped,
        }

    return step


def compile_step(step: Callable, abstract: FitState, mesh: Mesh) -> Callable:
    """Jit an update over the mesh; the old state's memory is reused, metrics are global."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


@dataclass(frozen=True)
class Fit:
    """A run put together.

    Attributes:
      config: validated.
      architecture: name and sizes of the network, as checkpoints record them.
      abstract: the state's shapes, dtypes and shardings.
      init: makes the first state.
      step: the compiled update.
      batches: yields what `step` takes, on the devices; `get_state` and `set_state` give and set its JSON position.
      on_checkpoint: called with (step, state) after each checkpoint, such as to write samples.
      inputs: field -> what identifies the weights or the set that its path leads to.
    """

    config: object
    architecture: dict
    abstract: FitState
    init: Callable[[], FitState]
    step: Callable
    batches: Iterator
    on_checkpoint: Callable[[int, FitState], object] = lambda step, state: None
    inputs: Mapping[str, str] = field(default_factory=dict)


def build_fit(
    config,
    mesh: Mesh,
    *,
    loss: Loss,
    abstract_params: Params,
    init_params: Callable[[Params], Params],
    matrices: Matrices | None = None,
    **parts,
) -> Fit:
    """Put a run together from what is its own.

    Args:
      config: validated.
      mesh: where it runs.
      loss: see `make_step`.
      abstract_params: shapes of the parameters.
      init_params: makes the first ones; called with the shardings that the state will give them.
      matrices: see `make_optimizer`.
      **parts: the further attributes of `Fit`.
    """
    optimizer = make_optimizer(config, matrices)
    abstract = abstract_state(optimizer, abstract_params, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = jax.jit(partial(init_state, optimizer), out_shardings=shardings)
    return Fit(
        config=config,
        abstract=abstract,
        init=lambda: start(init_params(shardings.params)),
        step=compile_step(make_step(loss, optimizer, config.ema_decay), abstract, mesh),
        **parts,
    )


def fit(build: Callable[[], Fit], config, workdir: Path, *, movable: tuple[str, ...] = ()) -> tuple[int, FitState]:
    """Train, or go on training, in `workdir`.

    Args:
      build: puts the run together once the workdir is claimed.
      config: validated.
      workdir: folder of the run.
      movable: fields whose paths may change when the run goes on; their contents are in `Fit.inputs`.

    Returns:
      The exit status, 0 or 128 + the number of the signal that stopped the run, and the last state.

    Raises:
      UserError: the workdir holds another run, or the loss stays non-finite.
    """
    # num_steps is not changeable: the learning rate falls to zero over them.
    claim(config, workdir, changeable=(*CHANGEABLE, *movable))
    with StopSignals() as stop:
        run = build()
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
        key, state = jax.random.key(config.seed), None
        latest = checkpoints.latest_step()
        if latest is None:
            state = run.init()
        else:
            meta = checkpoints.meta(latest)
            if meta["architecture"] != jsonable(run.architecture):
                raise UserError(f"{checkpoints.folder / str(latest)}: is of another architecture; use its own config")
            check_inputs(meta.get("inputs"), run.inputs, checkpoints.folder / str(latest))
            run.batches.set_state(meta["data"])
            state = checkpoints.restore(latest, run.abstract)
        writer = open_metrics(workdir, first_step=int(state.step), num_steps=config.num_steps)
        try:
            return run_steps(_work(run, key), state, checkpoints, writer, stop)
        finally:
            writer.close()


def _work(run: Fit, key) -> Work[FitState]:
    return Work(
        config=run.config,
        dispatch=lambda state, step: run.step(state, next(run.batches), jax.random.fold_in(key, step)),
        describe=lambda: {
            "architecture": run.architecture,
            "inputs": dict(run.inputs),
            "data": run.batches.get_state(),
        },
        summarise=lambda step, metrics: {name: float(value) for name, value in metrics.items()},
        sample=run.on_checkpoint,
        sample_every=run.config.checkpoint_every or run.config.num_steps,
    )


class CountedBatches:
    """Endless batches made from their number: `make(number)` -> a batch on the devices."""

    def __init__(self, make: Callable[[int], Mapping[str, np.ndarray]]):
        self._make, self._number = make, 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = self._make(self._number)
        self._number += 1
        return batch

    def get_state(self) -> dict:
        """Return the position."""
        return {"batch": self._number}

    def set_state(self, state: Mapping) -> None:
        """Go on from a position."""
        self._number = state["batch"]


class EncodedBatches:
    """Batches of an encoded set on the devices: `latents` and `caption_embeds`, with the position of their iterator."""

    def __init__(self, folder: Path, config, mesh: Mesh, *, text_len: int, held_out: int = 0):
        """Open the set of latents in `folder`; `config` has batch_size and seed, and see `training_batches`."""
        self._rows = batch_rows(mesh, config.batch_size)
        self._batches = training_batches(
            folder,
            None,
            batch_size=config.batch_size,
            prompt_batches=1,
            seed=config.seed,
            text_len=text_len,
            rows=self._rows.rows,
            held_out=held_out,
        )
        self.get_state, self.set_state = self._batches.get_state, self._batches.set_state

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch = next(self._batches)
        return {name: self._rows.put(batch[name]) for name in ("latents", "caption_embeds")}

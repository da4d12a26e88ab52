"""The state of a run: everything that an update changes, as one pytree of arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from avd_jax.losses.adaptive_regression import LossHistory
from avd_jax.parallel.rules import tree_shardings
from avd_jax.training.networks import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update reads and replaces.

    Attributes:
      step: generator updates made, int32.
      generator, fake_score: float32 masters.
      ema: running mean of the generator's weights, or None.
      generator_optimizer, fake_score_optimizer: AdamW's states.
      history: the regression loss history of each student timestep.
      skipped: updates skipped for a non-finite loss, in the whole run, int32.
      skipped_in_row: such updates since the last good one, of the generator and of fake_score, int32 [2]: each has its
        own count, since good updates of one must not hide that the other makes none.
    """

    step: jax.Array
    generator: Params
    fake_score: Params
    ema: Params | None
    generator_optimizer: optax.OptState
    fake_score_optimizer: optax.OptState
    history: LossHistory
    skipped: jax.Array
    skipped_in_row: jax.Array

    def to_items(self) -> dict:
        """Return what a checkpoint stores, by item."""
        items = {
            "generator": self.generator,
            "fake_score": self.fake_score,
            "optimizers": {"generator": self.generator_optimizer, "fake_score": self.fake_score_optimizer},
            "progress": {
                "step": self.step,
                "skipped": self.skipped,
                "skipped_in_row": self.skipped_in_row,
                "history": {"mean": self.history.mean, "seen": self.history.seen},
            },
        }
        return items if self.ema is None else items | {"ema": self.ema}

    def from_items(self, items: Mapping) -> "TrainState":
        """Return the state that a checkpoint of a state like this one holds."""
        progress = items["progress"]
        return TrainState(
            step=progress["step"],
            generator=items["generator"],
            fake_score=items["fake_score"],
            ema=None if self.ema is None else items["ema"],
            generator_optimizer=items["optimizers"]["generator"],
            fake_score_optimizer=items["optimizers"]["fake_score"],
            history=LossHistory(**progress["history"]),
            skipped=progress["skipped"],
            skipped_in_row=progress["skipped_in_row"],
        )


@dataclass(frozen=True)
class Optimizers:
    """AdamW of the generator and of fake_score (PAPER.md, Training)."""

    generator: optax.GradientTransformation
    fake_score: optax.GradientTransformation


def make_optimizers(config) -> Optimizers:
    """Build both optimizers: the gradient's global norm is clipped, then AdamW."""
    settings = config.optimizer

    def adamw(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(settings.max_grad_norm),
            optax.adamw(
                learning_rate,
                b1=settings.beta1,
                b2=settings.beta2,
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
            ),
        )

    return Optimizers(adamw(settings.learning_rate), adamw(settings.fake_score_learning_rate))


def init_state(config, optimizers: Optimizers, params: Params) -> TrainState:
    """Start a run: generator and fake_score both from `params`, the teacher's weights in float32.

    A pure function of arrays: call it under `jax.jit` with `state_shardings` as its out_shardings.
    """
    copy = partial(jax.tree.map, jnp.copy)  # each has buffers of its own, which the steps may reuse
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=copy(params),
        fake_score=copy(params),
        ema=copy(params) if config.ema_decay else None,
        generator_optimizer=optimizers.generator.init(params),
        fake_score_optimizer=optimizers.fake_score.init(params),
        history=LossHistory.init(len(config.student.timesteps)),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros(2, jnp.int32),
    )


def abstract_state(config, optimizers: Optimizers, abstract_params: Params, mesh: Mesh) -> TrainState:
    """Return the state's shapes, dtypes and shardings, to initialise, restore or compile with."""
    shapes = jax.eval_shape(lambda params: init_state(config, optimizers, params), abstract_params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )

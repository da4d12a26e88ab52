"""The two updates of a cycle as pure functions: `(state, frozen, batch, key) -> (state, metrics)`.

The generator's and fake_score's updates are two programs; the host loop calls them in turn (PAPER.md, Training). An
update whose loss or gradient is not finite changes nothing but the counters of skipped updates.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh

from avd_jax.losses.adaptive_regression import update_history
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.mesh import replicated
from avd_jax.training import objectives
from avd_jax.training.meters import LATENT
from avd_jax.training.networks import Networks
from avd_jax.training.objectives import Frozen
from avd_jax.training.state import Optimizers, TrainState

# Places in `TrainState.skipped_in_row`.
_GENERATOR, _FAKE_SCORE = range(2)

Step = Callable[[TrainState, Frozen, dict, jax.Array], tuple[TrainState, dict]]


def make_generator_step(config, networks: Networks, optimizers: Optimizers) -> Step:
    """Return the generator's update.

    The batch is a dict of `prompt_embeds` [B L D] for distribution matching and `latents` [B F H W C] with
    `caption_embeds` [B L D] for the regression. With accumulation, the temporal loss's expectation runs over one part
    of the batch at a time; everything else is as for the whole batch.
    """

    def step(state: TrainState, frozen: Frozen, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        stop = objectives.stop_step(config, key)

        terms = objectives.generator_terms(config, networks, state.fake_score, frozen, state.history, stop)
        loss, parts, gradient = _accumulate(terms, state.generator, batch, key, config.accumulation_steps)
        parts = objectives.no_parts(batch["prompt_embeds"].shape[0]) | parts
        norm = optax.tree.norm(gradient)
        updates, optimizer = optimizers.generator.update(gradient, state.generator_optimizer, state.generator)
        generator = optax.apply_updates(state.generator, updates)
        history = state.history
        if config.loss.regression:
            history = update_history(
                history, parts["regression"], parts["timestep_index"], alpha=config.loss.adaptive_alpha
            )
        ema = state.ema
        if config.ema_decay:
            ema = optax.incremental_update(generator, ema, 1 - config.ema_decay)
        updated = replace(state, generator=generator, generator_optimizer=optimizer, ema=ema, history=history)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        state = replace(_keep_good(good, updated, state, _GENERATOR), step=state.step + 1)
        metrics = {
            "loss/generator": loss,
            "loss/distribution_matching": jnp.mean(parts["distribution_matching"]),
            "loss/regression": jnp.mean(parts["regression"]),
            "loss/temporal": jnp.mean(parts["temporal"]),
            "regression/weight": jnp.mean(parts["regression_weight"]),
            "regression_weight": parts["regression_weight"],
            "timestep_index": parts["timestep_index"],
            "rollout_stop": stop,
            "grad_norm/generator": norm,
            "skipped/total": state.skipped,
            "skipped/in_row": jnp.max(state.skipped_in_row),
        }
        metrics |= {
            f"meter/{name}": jnp.mean(parts[f"made/{name}"]) / jnp.mean(parts[f"real/{name}"]) for name in LATENT
        }
        metrics |= {f"regression/ema_{i}": mean for i, mean in enumerate(state.history.mean)}
        return state, metrics

    return step


def make_fake_score_step(
    config, networks: Networks, optimizers: Optimizers, *, latents_shape: tuple[int, int, int, int]
) -> Step:
    """Return fake_score's update: flow matching on the student's samples for `prompt_embeds` [B L D] of the batch.

    The samples have `latents_shape` (F, H, W, C).
    """

    def step(state: TrainState, frozen: Frozen, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        stop = objectives.stop_step(config, key)

        def loss_fn(params, part, keys):
            losses = objectives.fake_score_loss(
                config, networks, params, state.generator, part, keys, stop, latents_shape, frozen.interpolator
            )
            return jnp.mean(losses), {}

        loss, _, gradient = _accumulate((loss_fn,), state.fake_score, batch, key, config.accumulation_steps)
        norm = optax.tree.norm(gradient)
        updates, optimizer = optimizers.fake_score.update(gradient, state.fake_score_optimizer, state.fake_score)
        fake_score = optax.apply_updates(state.fake_score, updates)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated = replace(state, fake_score=fake_score, fake_score_optimizer=optimizer)
        state = _keep_good(good, updated, state, _FAKE_SCORE)
        return state, {
            "loss/fake_score": loss,
            "grad_norm/fake_score": norm,
            "skipped/total": state.skipped,
            "skipped/in_row": jnp.max(state.skipped_in_row),
        }

    return step


def compile_step(step: Step, state_shardings: TrainState, mesh: Mesh) -> Step:
    """Jit a step over the mesh: the old state's memory is reused, the new one is sharded alike, metrics are global."""
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(state_shardings, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def _accumulate(terms: Sequence[objectives.Term], params, batch: dict, key, parts: int):
    """Return (loss, auxiliaries, gradient) of the sum of `terms`, worked on in `parts` parts, one after another.

    Example b belongs to part b mod parts: each device cuts its own examples, and none moves.
    """
    size = batch["prompt_embeds"].shape[0]
    keys = objectives.example_keys(key, jnp.arange(size))
    grad_fn = partial(_gradient_of_sum, terms)
    if parts == 1:
        (loss, auxiliaries), gradient = grad_fn(params, batch, keys)
        return loss, auxiliaries, gradient
    cut = partial(jax.tree.map, lambda x: rearrange(x, "(b part) ... -> part b ...", part=parts))

    def add(total, part):
        (loss, auxiliaries), gradient = grad_fn(params, *part)
        return jax.tree.map(lambda t, new: t + new / parts, total, (loss, gradient)), auxiliaries

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    (loss, gradient), auxiliaries = jax.lax.scan(add, zeros, (cut(batch), cut(keys)))
    whole = {
        name: rearrange(value, "part b -> (b part)") if value.ndim == 2 else value
        for name, value in auxiliaries.items()
    }
    return loss, whole, gradient


def _gradient_of_sum(terms: Sequence[objectives.Term], params, batch: dict, keys):
    """Return ((loss, auxiliaries), gradient) of the sum of `terms`."""
    loss, auxiliaries, gradient = jnp.zeros(()), {}, jax.tree.map(jnp.zeros_like, params)
    for term in terms:
        # Each term waits for the gradient of the one before: else the activations of all would be alive at once.
        batch, gradient = jax.lax.optimization_barrier((batch, gradient))
        (value, found), slope = jax.value_and_grad(term, has_aux=True)(params, batch, keys)
        loss, auxiliaries, gradient = loss + value, auxiliaries | found, jax.tree.map(jnp.add, gradient, slope)
    return (loss, auxiliaries), gradient


def _keep_good(good, updated: TrainState, old: TrainState, network: int) -> TrainState:
    """Return `updated` where the update of a network was good, else `old` with the skipped update counted."""
    state = jax.tree.map(partial(jnp.where, good), updated, old)
    in_row = jnp.where(good, 0, old.skipped_in_row[network] + 1)
    return replace(state, skipped=old.skipped + ~good, skipped_in_row=old.skipped_in_row.at[network].set(in_row))

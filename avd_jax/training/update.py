"""One update as a pure function: `(state, frozen, batch, key) -> (state, metrics)`, for whatever a method declares.

It reads top to bottom: the gradient of the loss, its norm, the optimizer's step, the running mean, the extras, and all
of it undone if the loss or the gradient is not finite.

Randomness is per example: example `b` of the global batch has a key of its own, so neither the number of devices nor
the cut into accumulation parts changes what it sees. What `Update.draws` names is one for the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from avd_jax.models.placement import fetched
from avd_jax.training.method import Made, Method, Term, Update, Value, active
from avd_jax.training.state import TrainState

Step = Callable[[TrainState, Mapping, Mapping, jax.Array], tuple[TrainState, dict]]

_EXAMPLES = 1  # stream of an update's key


def example_keys(key, examples):
    """Return one key for each example number of the global batch."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, _EXAMPLES)))(examples)


def make_step(method: Method, update: Update) -> Step:
    """Return an update of a method.

    The batch is a dict of the fields that `fields_of` names. With accumulation a loss that is one number for the batch,
    such as the temporal one, is that of one part at a time; everything else is as for the whole batch.
    """
    trained, passes = method.networks[update.network], passes_of(update)
    completes_the_step = update.network == method.updates[-1].network

    def step(state: TrainState, frozen: Mapping, batch: Mapping, key: jax.Array) -> tuple[TrainState, dict]:
        # The name tells the count of FLOPs what the number is.
        draws = {
            draw.name: checkpoint_name(draw.function(key, state.extras), f"draw/{draw.name}") for draw in update.draws
        }
        network = state.networks[update.network]
        constants = _parameters(method, state, frozen) | frozen | state.extras | draws

        def loss_of(one: Pass, params, batch, keys):
            whole = trained.parameters(params, frozen)
            return one.loss(constants | batch | {update.network: whole, "keys": keys})

        losses = [partial(loss_of, one) for one in passes]
        size = jax.tree.leaves(batch)[0].shape[0]
        keys = example_keys(key, jnp.arange(size))
        loss, values, gradient = _accumulated(losses, network.params, batch, keys, method.accumulation_steps)
        norm = optax.tree.norm(gradient)
        if trained.optimizer_memory != "device":  # the moments come once the activations are gone
            gradient, waiting = jax.lax.optimization_barrier((gradient, network.optimizer))
            network = replace(network, optimizer=fetched(waiting))
        changes, optimizer = trained.optimizer.update(gradient, network.optimizer, network.params)
        params = optax.apply_updates(network.params, changes)
        ema = network.ema
        if trained.ema_decay:
            ema = optax.incremental_update(params, ema, 1 - trained.ema_decay(state.step))
        made = Made(values, draws, size)
        extras = dict(update.extras(state.extras, made))
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated = replace(network, params=params, optimizer=optimizer, ema=ema)
        network, extras = jax.tree.map(partial(jnp.where, good), (updated, extras), (network, state.extras))
        network = replace(
            network,
            skipped=network.skipped + ~good,
            skipped_in_row=jnp.where(good, 0, network.skipped_in_row + 1),
        )
        networks = state.networks | {update.network: network}
        state = TrainState(state.step + completes_the_step, networks, extras)
        metrics = {f"loss/{update.name}": loss, f"grad_norm/{update.name}": norm}
        if len(update.terms) > 1:
            metrics |= {f"loss/{term.name}": jnp.mean(values.get(term.name, 0.0)) for term in update.terms}
        metrics |= update.metrics(made, extras)
        return state, metrics | {
            "skipped/total": sum(network.skipped for network in networks.values()),
            "skipped/in_row": jnp.max(jnp.stack([network.skipped_in_row for network in networks.values()])),
        }

    return step


def make_shared(method: Method, update: Update) -> Callable[[TrainState, Mapping, Mapping, jax.Array], dict]:
    """Return the function that makes what all times of an update share in a cycle: `Update.shared`, by name.

    It takes what the first of them does: the state, what is frozen, the batch and the key. With accumulation it works
    on the same parts of the batch, one after another.
    """
    parts = method.accumulation_steps or 1

    def shared(state: TrainState, frozen: Mapping, batch: Mapping, key: jax.Array) -> dict:
        constants = _parameters(method, state, frozen) | frozen | state.extras

        def make(given):
            part, keys = given
            inputs = constants | part | {"keys": keys}
            return {
                value.name: tuple(value.function(**{name: inputs[name] for name in value.inputs}))
                for value in update.shared
            }

        whole = batch, example_keys(key, jnp.arange(jax.tree.leaves(batch)[0].shape[0]))
        if parts == 1:
            return make(whole)
        join = partial(jax.tree.map, lambda x: rearrange(x, "part b ... -> (b part) ..."))
        return join(jax.lax.map(make, _cut(whole, parts)))

    return shared


def fields_of(method: Method, update: Update) -> tuple[str, ...]:
    """Return the fields of the batch that an update reads, from what its terms are made of."""
    asked = {name for one in passes_of(update) for name in one.inputs()}
    return tuple(name for name in method.fields if name in asked)


def fields_of_shared(method: Method, update: Update) -> tuple[str, ...]:
    """Return the fields of the batch that `make_shared` reads."""
    asked = {name for value in update.shared for name in value.inputs}
    return tuple(name for name in method.fields if name in asked)


@dataclass(frozen=True)
class Pass:
    """Terms that share what they are made of, and so one forward and one backward pass.

    Attributes:
      terms: of weight other than 0.
      values: those of the update, by name.
      watch: what is looked at on the way.
      reports: names of values to hand out.
    """

    terms: tuple[Term, ...]
    values: Mapping[str, Value]
    watch: tuple[Value, ...]
    reports: tuple[str, ...]

    def inputs(self) -> set[str]:
        """Return the names of all that is not made by the update itself."""
        wanted = [name for term in self.terms for name in _inputs_of(term)]
        wanted += [name for value in self.watch for name in value.inputs]
        return _closure(wanted, self.values) - set(self.values)

    def loss(self, given: Mapping) -> tuple[jax.Array, dict]:
        """Return the weighted sum of the terms and what is handed out, from all that is given by name."""
        made = dict(given)

        def get(name: str):
            if name not in made:
                value = self.values[name]
                made[name] = value.function(**{name: get(name) for name in value.inputs})
            return made[name]

        loss, found = jnp.zeros(()), {}
        for value in self.watch:
            inputs = {name: get(name) for name in value.inputs}
            found[value.name] = value.function(**jax.lax.stop_gradient(inputs))
        for term in self.terms:
            losses = term.function(**{name: get(name) for name in term.inputs})
            weighted = losses if term.weighted_by is None else get(term.weighted_by) * losses
            loss += term.weight * jnp.mean(weighted)
            found[term.name] = losses
        return loss, found | {name: get(name) for name in self.reports}


def passes_of(update: Update) -> tuple[Pass, ...]:
    """Cut an update into passes: terms that share a value belong to one, others are apart.

    They are apart so that the activations of one can be gone before the next one starts.
    """
    values = {value.name: value for value in update.values}
    groups: list[tuple[set[str], list[Term]]] = []
    for term in active(update.terms):
        shared = _closure(_inputs_of(term), values) & set(values)
        joined = [group for group in groups if group[0] & shared]
        terms = [one for group in joined for one in group[1]] + [term]
        groups = [group for group in groups if group not in joined]
        groups.append((shared.union(*(group[0] for group in joined)), terms))
    return tuple(
        Pass(
            terms=tuple(terms),
            values=values,
            watch=tuple(watched for watched in update.watch if set(watched.inputs) & shared),
            reports=tuple(name for name in update.reports if name in shared),
        )
        for shared, terms in groups
    )


def _inputs_of(term: Term) -> list[str]:
    return [*term.inputs, *([term.weighted_by] if term.weighted_by else [])]


def _closure(names: Sequence[str], values: Mapping[str, Value]) -> set[str]:
    """Return the names, and those of all that they are made of."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += values[name].inputs if name in values else ()
    return found


def _parameters(method: Method, state: TrainState, frozen: Mapping) -> dict:
    return {name: network.parameters(state.networks[name].params, frozen) for name, network in method.networks.items()}


def _accumulated(losses: Sequence[Callable], params, batch: Mapping, keys, parts: int | None):
    """Return (loss, values, gradient) of the sum of `losses`, worked on in `parts` parts, one after another.

    Without parts one loss is differentiated as it is, with nothing to add up.
    """
    if parts is None and len(losses) == 1:
        (loss, values), gradient = jax.value_and_grad(losses[0], has_aux=True)(params, batch, keys)
        return loss, values, gradient
    if parts in (None, 1):
        return _gradient_of_sum(losses, params, batch, keys)

    def add(total, part):
        loss, values, gradient = _gradient_of_sum(losses, params, *part)
        return jax.tree.map(lambda t, new: t + new / parts, total, (loss, gradient)), values

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    (loss, gradient), values = jax.lax.scan(add, zeros, _cut((batch, keys), parts))
    whole = jax.tree.map(lambda value: rearrange(value, "part b -> (b part)") if value.ndim == 2 else value, values)
    return loss, whole, gradient


def _cut(tree, parts: int):
    """Return a batch in parts, [parts B/parts ...].

    Example b belongs to part b mod parts: each device cuts its own examples, and none moves.
    """
    return jax.tree.map(lambda x: rearrange(x, "(b part) ... -> part b ...", part=parts), tree)


def _gradient_of_sum(losses: Sequence[Callable], params, batch: Mapping, keys):
    """Return (loss, values, gradient) of the sum of `losses`, functions `(params, batch, keys) -> (loss, values)`."""
    total, values, gradient = jnp.zeros(()), {}, jax.tree.map(jnp.zeros_like, params)
    for loss in losses:
        # Each pass waits for the gradient of the one before: else the activations of all would be alive at once.
        batch, gradient = jax.lax.optimization_barrier((batch, gradient))
        (value, found), new = jax.value_and_grad(loss, has_aux=True)(params, batch, keys)
        total, values, gradient = total + value, values | found, jax.tree.map(jnp.add, gradient, new)
    return total, values, gradient

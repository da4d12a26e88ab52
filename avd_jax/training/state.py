"""The state of a run: everything that an update changes, as one pytree of arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from avd_jax.models.functional import Params
from avd_jax.parallel.memory import waiting
from avd_jax.parallel.rules import tree_shardings
from avd_jax.training.method import Method


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NetworkState:
    """What the updates of one network change.

    Attributes:
      params: float32 masters of what is trained of it.
      optimizer: its optimizer's state.
      ema: running mean of the parameters, or None.
      skipped: updates skipped for a loss or gradient that was not finite, in the whole run, int32.
      skipped_in_row: such updates since the last good one, int32: each network has its own count, since good updates of
        one must not hide that another makes none.
    """

    params: Params
    optimizer: optax.OptState
    ema: Params | None
    skipped: jax.Array
    skipped_in_row: jax.Array

    @property
    def latest(self) -> Params:
        """The running mean if one is kept, else the parameters: what is sampled, shipped and evaluated."""
        return self.params if self.ema is None else self.ema


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update reads and replaces.

    Attributes:
      step: cycles of updates made, int32.
      networks: by name.
      extras: what else the method keeps, by name, such as the loss history.
    """

    step: jax.Array
    networks: dict[str, NetworkState]
    extras: dict[str, Any]

    def to_items(self) -> dict:
        """Return what a checkpoint stores, by item: each network's parameters and EMA are items of their own."""
        items = {name: network.params for name, network in self.networks.items()}
        items |= {ema_item(name): network.ema for name, network in self.networks.items() if network.ema is not None}
        items["optimizers"] = {name: network.optimizer for name, network in self.networks.items()}
        counts = {name: [network.skipped, network.skipped_in_row] for name, network in self.networks.items()}
        return items | {"progress": {"step": self.step, "skipped": counts, "extras": _leaves(self.extras)}}

    def from_items(self, items: Mapping) -> "TrainState":
        """Return the state that a checkpoint of a state like this one holds."""
        progress = items["progress"]

        def network(name: str, like: NetworkState) -> NetworkState:
            ema = None if like.ema is None else items[ema_item(name)]
            return NetworkState(items[name], items["optimizers"][name], ema, *progress["skipped"][name])

        return TrainState(
            step=progress["step"],
            networks={name: network(name, like) for name, like in self.networks.items()},
            extras=_filled(self.extras, progress.get("extras", {})),
        )


def ema_item(network: str) -> str:
    """Return the item of a checkpoint that holds a network's running mean."""
    return f"{network}_ema"


def init_state(method: Method, params: Mapping[str, Params]) -> TrainState:
    """Start a run from each network's parameters; a pure function of arrays, to be called under `jax.jit`."""

    def network(name: str) -> NetworkState:
        trained, start = method.networks[name], params[name]
        copy = jax.tree.map(jnp.copy, start)  # each has buffers of its own, which the updates may reuse
        return NetworkState(
            params=copy,
            optimizer=trained.optimizer.init(start),
            ema=jax.tree.map(jnp.copy, start) if trained.ema_decay else None,
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
        )

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        networks={name: network(name) for name in method.networks},
        extras={name: make() for name, make in method.extras.items()},
    )


def abstract_state(method: Method) -> TrainState:
    """Return the state's shapes, dtypes and shardings, to initialise, restore or compile with."""
    params = {name: network.abstract for name, network in method.networks.items()}
    shapes = jax.eval_shape(lambda params: init_state(method, params), params)
    shardings = tree_shardings(shapes, method.mesh)

    def placed(name: str, network: NetworkState) -> NetworkState:
        memory = method.networks[name].optimizer_memory
        return replace(network, optimizer=waiting(shapes.networks[name].optimizer, network.optimizer, memory))

    shardings = replace(shardings, networks={name: placed(name, one) for name, one in shardings.networks.items()})
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _leaves(tree) -> dict:
    """Return a pytree of any kind as path -> leaf, the form in which checkpoints keep it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _filled(like, leaves: Mapping):
    """Return a pytree like `like` with the leaves of `_leaves`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], like)

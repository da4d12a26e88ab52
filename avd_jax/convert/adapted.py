"""A transformer's weights with adapters merged in while they are read: float32 sums, cast once, a layer at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avd_jax.convert.adapters import Adapter, Change, named_adapters, open_adapter
from avd_jax.convert.layouts import student_settings
from avd_jax.convert.weights import Sharding, Weights, cast_leaves


def with_adapters(weights: Weights, named: str) -> Weights:
    """Return weights with the adapters merged that a text names (`named_adapters`); themselves if it names none.

    Raises:
      UserError: one line that names the adapter's file and key.
    """
    adapters = [open_adapter(path, strength, weights.config) for path, strength in named_adapters(named)]
    return AdaptedWeights(weights, adapters) if adapters else weights


def student_with(path: str | Path, named: str) -> dict | None:
    """Return a student's settings (`student_settings`): of the weights, else of an adapter that makes them a student.

    Args:
      path: weights.
      named: adapters, as in `named_adapters`.
    """
    places = [path, *(adapter for adapter, _ in named_adapters(named) if adapter.exists())]
    return next(filter(None, map(student_settings, places)), None)


class AdaptedWeights:
    """Weights (see `Weights`) plus the changes of adapters.

    Attributes:
      adapters: in the order in which they are added.
    """

    def __init__(self, weights: Weights, adapters: Sequence[Adapter]):
        self.architecture, self.config, self.leaves = weights.architecture, weights.config, weights.leaves
        self.files: tuple[Path, ...] = (*weights.files, *(file for adapter in adapters for file in adapter.files))
        self.base, self.adapters = weights, tuple(adapters)
        self._changes: dict[str, dict[int | None, list[tuple[float, Change]]]] = {}
        for adapter in adapters:
            for change in adapter.changes.values():
                of_leaf = self._changes.setdefault(change.target.path, {})
                of_leaf.setdefault(change.target.layer, []).append((adapter.strength, change))

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """Yield a leaf's layers in order, or the leaf itself; float32 where an adapter changes it."""
        changes = self._changes.get(path, {})
        for i, layer in enumerate(self.base.layers(path)):
            for strength, change in (*changes.get(i, ()), *changes.get(None, ())):
                layer = layer.astype(np.float32) + np.float32(strength) * change.target.rule.to_flax(change.read())
            yield layer

    def array(self, path: str, dtype=None) -> np.ndarray:
        """Return one leaf in `dtype`."""
        if path not in self._changes:
            return self.base.array(path, dtype)
        leaf = cast_leaves({path: self.leaves[path]}, dtype)[path]
        whole = np.empty(leaf.shape, leaf.dtype)
        places: Any = [...] if None in self._changes[path] else range(leaf.shape[0])
        for at, layer in zip(places, self.layers(path), strict=True):
            whole[at] = layer
        return whole

    def arrays(self, dtype=None, paths: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) in `dtype`, in the order of `leaves` or of `paths`, if given."""
        for path in self.leaves if paths is None else paths:
            yield path, self.array(path, dtype)

    def sharded(self, dtype, sharding: Sharding, paths: Sequence[str] | None = None) -> dict[str, jax.Array]:
        """Return path -> array in `dtype`, laid out as `sharding(path, shape)` says."""
        wanted = list(self.leaves) if paths is None else list(paths)
        arrays = self.base.sharded(dtype, sharding, [path for path in wanted if path not in self._changes])
        for path in wanted:
            if path in self._changes:
                whole = self.array(path, dtype[path] if isinstance(dtype, Mapping) else dtype)
                layout = sharding(path, whole.shape)
                arrays[path] = jax.make_array_from_callback(whole.shape, layout, whole.__getitem__)
        return arrays

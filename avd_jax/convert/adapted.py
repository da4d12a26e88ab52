"""A network that a run trained as adapters over another's weights: its checkpoint has the adapters alone.

It reads like any other weights: what the adapters come to is added to the base, leaf by leaf, in float32.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avd_jax.convert import orbax_io
from avd_jax.convert.architectures import Architecture
from avd_jax.convert.layouts import OrbaxTree
from avd_jax.errors import UserError
from avd_jax.models.adapters import NAME, product
from avd_jax.models.placement import fetched

LINK = "base"  # of a run: a folder or link that says where the base's weights lie now


class AdaptedWeights:
    """Weights of a base with the adapters of a training checkpoint; see `convert/weights.py` for what they can do."""

    def __init__(self, tree: OrbaxTree, architecture: Architecture, base):
        """Check that the adapters fit.

        Args:
          tree: of the adapters.
          architecture: of the network.
          base: its opened weights.

        Raises:
          UserError: they are of a network of other sizes, or damaged.
        """
        self.architecture, self.config = (
            architecture,
            architecture.config_from_record(tree.record, name=str(tree.source)),
        )
        self._folder, self._base = tree.folder, base
        factors = orbax_io.read_structure(tree.folder)
        ends = f".{NAME}.a", f".{NAME}.b"
        layers = [path.removesuffix(ends[0]) for path in factors if path.endswith(ends[0])]
        self._factors = {
            f"{layer}.kernel": {layer + end: factors.pop(layer + end, None) for end in ends} for layer in layers
        }
        self._scale = tree.adapters["alpha"] / tree.adapters["rank"]
        if factors or any(None in found.values() for found in self._factors.values()):
            raise UserError(f"{tree.folder}: holds other things than pairs of adapters; use another step")
        self.leaves = dict(base.leaves)
        for path, pair in self._factors.items():
            leaf, (a, b) = base.leaves.get(path), pair.values()
            if leaf is None or a.size // a.shape[-1] * b.shape[-1] != leaf.size:
                raise UserError(f"{tree.folder}: its adapters do not fit {path} of the base")
            self.leaves[path] = jax.ShapeDtypeStruct(leaf.shape, np.dtype(np.float32))
        self.files: tuple[Path, ...] = (*base.files, *(path for path in tree.folder.rglob("*") if path.is_file()))

    def array(self, path: str, dtype=None) -> np.ndarray:
        """Return one leaf in `dtype`."""
        if path not in self._factors:
            return self._base.array(path, dtype)
        return self._changed(path, self._base.array(path, np.float32), dtype)

    def arrays(self, dtype=None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) in the order of `leaves`, in `dtype`; few are held at a time."""
        for path, array in self._base.arrays(self._dtypes_of_base(dtype)):
            yield path, self._changed(path, array, dtype) if path in self._factors else array

    def sharded(self, dtype, sharding, paths: Iterable[str] | None = None) -> dict[str, jax.Array]:
        """Return path -> array in `dtype`, laid out as `sharding(path, shape)` says."""
        arrays, dtypes = {}, self._dtypes_of_base(dtype)
        for path in self.leaves if paths is None else paths:
            (array,) = self._base.sharded(dtypes, sharding, [path]).values()
            if path in self._factors:
                array = _added(array, *self._pair(path), self._scale, self._dtype(path, dtype))
            arrays[path] = array
        return arrays

    def _changed(self, path: str, base: np.ndarray, dtype) -> np.ndarray:
        change = product(*self._pair(path), scale=self._scale, shape=base.shape)
        return (base + change).astype(self._dtype(path, dtype))

    def _pair(self, path: str) -> list[np.ndarray]:
        return [array for _, array in orbax_io.read_arrays(self._folder, self._factors[path])]

    def _dtype(self, path: str, dtype) -> np.dtype:
        asked = dtype[path] if isinstance(dtype, Mapping) else dtype
        return np.dtype(self.leaves[path].dtype if asked is None else asked)

    def _dtypes_of_base(self, dtype) -> dict[str, Any]:
        return {path: np.float32 if path in self._factors else self._dtype(path, dtype) for path in self.leaves}


def _added(base: jax.Array, a: np.ndarray, b: np.ndarray, scale: float, dtype: np.dtype) -> jax.Array:
    """Return base + change in `dtype`, laid out as the base is, which may wait in the host's memory."""

    def added(base, a, b):
        return (fetched(base) + product(a, b, scale=scale, shape=base.shape)).astype(dtype)

    return jax.jit(added, out_shardings=base.sharding)(base, a, b)

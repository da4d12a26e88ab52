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
from avd_jax.convert.engine import layers_of
from avd_jax.convert.layouts import OrbaxTree
from avd_jax.convert.networks import DEFAULT
from avd_jax.errors import UserError
from avd_jax.models.adapters import NAME, product
from avd_jax.models.placement import fetched
from avd_jax.paths import any_path, hub_name, is_bucket

LINK = "base"  # of a run: a folder or link that says where the base's weights lie now


def base_path(run: Path, named: str) -> str:
    """Return where the weights lie that a run's adapters stand on: `RUN/base`, else what the run recorded."""
    moved = run / LINK
    return str(moved) if moved.exists() else named


class OnBase:
    """The weights of a base with the adapters of a training checkpoint (see `Weights` for what they can do)."""

    def __init__(self, tree: OrbaxTree, architecture: Architecture):
        """Open the base, and check that the adapters fit.

        Args:
          tree: of the adapters.
          architecture: of the network.

        Raises:
          UserError: the base is not there, or is another, or the adapters are damaged.
        """
        self.architecture = architecture
        self.config = architecture.config_from_record(tree.record, name=str(tree.source))
        self._folder, self._base = tree.folder, _open_base(tree, architecture)
        self._scale = tree.adapters["alpha"] / tree.adapters["rank"]
        self.leaves, found = dict(self._base.leaves), orbax_io.read_structure(tree.folder)
        self._pairs = {}
        for path in [path for path in found if path.endswith(f".{NAME}.a")]:
            pair = {name: found.pop(name, None) for name in (path, f"{path[:-1]}b")}
            kernel = f"{path.removesuffix(f'.{NAME}.a')}.kernel"
            leaf, (a, b) = self.leaves.get(kernel), pair.values()
            if leaf is None or b is None or a.size // a.shape[-1] * b.shape[-1] != leaf.size:
                raise UserError(f"{tree.folder}: its adapter of {kernel} does not fit the base; use another step")
            self._pairs[kernel] = pair
            self.leaves[kernel] = jax.ShapeDtypeStruct(leaf.shape, np.dtype(np.float32))
        if found:
            raise UserError(f"{tree.folder}: holds {next(iter(found))}, which is of no adapter; use another step")
        adapters = (path for path in tree.folder.rglob("*") if is_bucket(path) or path.is_file())
        self.files: tuple[Path, ...] = (*self._base.files, *sorted(adapters))

    def array(self, path: str, dtype=None) -> np.ndarray:
        """Return one leaf in `dtype`."""
        return self._changed(path, self._base.array(path, self._dtypes_of_base(dtype)), dtype)

    def arrays(self, dtype=None, paths: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) in `dtype`, in the order of `leaves` or of `paths`, if given; few are held at a time."""
        for path, array in self._base.arrays(self._dtypes_of_base(dtype), paths):
            yield path, self._changed(path, array, dtype)

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """Yield a leaf's layers in order, or the leaf itself if its layers are not stacked."""
        if path not in self._pairs:
            yield from self._base.layers(path)
            return
        yield from layers_of(self.architecture.native_rules(self.config), path, self.array(path))

    def sharded(self, dtype, sharding, paths: Iterable[str] | None = None) -> dict[str, jax.Array]:
        """Return path -> array in `dtype`, laid out as `sharding(path, shape)` says; of `paths` alone, if given."""
        arrays, dtypes = {}, self._dtypes_of_base(dtype)
        for path in self.leaves if paths is None else paths:  # one at a time, since those of the base are float32
            (array,) = self._base.sharded(dtypes, sharding, [path]).values()
            if path in self._pairs:
                array = _added(array, *self._pair(path), self._scale, self._dtype(path, dtype))
            arrays[path] = array
        return arrays

    def _changed(self, path: str, base: np.ndarray, dtype) -> np.ndarray:
        if path not in self._pairs:
            return base
        change = product(*self._pair(path), scale=self._scale, shape=base.shape)
        return (base + change).astype(self._dtype(path, dtype))

    def _pair(self, path: str) -> list[np.ndarray]:
        return [array for _, array in orbax_io.read_arrays(self._folder, self._pairs[path])]

    def _dtype(self, path: str, dtype) -> np.dtype:
        asked = dtype[path] if isinstance(dtype, Mapping) else dtype
        return np.dtype(self.leaves[path].dtype if asked is None else asked)

    def _dtypes_of_base(self, dtype) -> dict[str, Any]:
        asked = self.leaves if not isinstance(dtype, Mapping) else [path for path in self.leaves if path in dtype]
        return {path: np.dtype(np.float32) if path in self._pairs else self._dtype(path, dtype) for path in asked}


def _open_base(tree: OrbaxTree, architecture: Architecture):
    """Open the weights that adapters were trained over, style adapters merged (UserError if they are others)."""
    from avd_jax.convert.adapted import with_adapters
    from avd_jax.convert.fingerprint import fingerprint  # these read weights, of which adapters are one kind
    from avd_jax.convert.weights import open_weights

    run = tree.folder.parents[2]
    named = tree.adapters["path"]
    path = base_path(run, named)
    if hub_name(path) is None and not any_path(path).exists():
        raise UserError(
            f"{run}: has adapters over the weights {named}, which are not there; put them back, or link "
            f"{run / LINK} to where they lie now"
        )
    base = open_weights(path, architecture, tree.adapters["which"] or DEFAULT)
    if fingerprint(base) != tree.adapters["fingerprint"]:
        raise UserError(
            f"{run}: has adapters over other weights than those in {path}; link {run / LINK} to those that its "
            f"training began with ({named})"
        )
    styled = with_adapters(base, tree.adapters.get("lora", ""))
    if styled is base:
        return base
    if " ".join(adapter.fingerprint for adapter in styled.adapters) != tree.adapters["lora_fingerprint"]:
        raise UserError(f"{run}: was trained over other contents of {tree.adapters['lora']}; put those back")
    return styled


def _added(base: jax.Array, a: np.ndarray, b: np.ndarray, scale: float, dtype: np.dtype) -> jax.Array:
    """Return base + change in `dtype`, laid out as the base is, which may wait in the host's memory."""

    def added(base, a, b):
        return (fetched(base) + product(a, b, scale=scale, shape=base.shape)).astype(dtype)

    return jax.jit(added, out_shardings=base.sharding)(base, a, b)

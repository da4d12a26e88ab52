"""Weights of one network, opened: its sizes, its leaves, and their arrays, whatever the layout they are stored in."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.convert import orbax_io
from avd_jax.convert.architectures import WAN_DIT, Architecture, in_native_names, matching_keys
from avd_jax.convert.engine import layers_of, leaf_from_torch, read_shards, resolve, source_shapes
from avd_jax.convert.files import TensorFile, is_matrix, open_files, tensors_of
from avd_jax.convert.hub import fetched
from avd_jax.convert.layouts import OrbaxTree, TorchFiles, find_weights, read_json
from avd_jax.convert.networks import DEFAULT, is_causal, network_in, note_causal
from avd_jax.convert.on_base import OnBase
from avd_jax.convert.state import flat_state, from_flat
from avd_jax.errors import UserError, closest
from avd_jax.paths import is_bucket

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class Weights(Protocol):
    """Opened weights. `dtype` is one for all leaves or path -> dtype; None is as stored.

    Attributes:
      architecture: the network.
      config: its sizes.
      leaves: dotted path -> shape and dtype as stored.
      files: that hold the arrays.
    """

    architecture: Architecture
    config: Any
    leaves: dict[str, jax.ShapeDtypeStruct]
    files: tuple[Path, ...]

    def array(self, path: str, dtype=None) -> np.ndarray:
        """Return one leaf in `dtype`."""

    def arrays(self, dtype=None, paths: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) in `dtype`, in the order of `leaves` or of `paths`, if given; few are held at a time."""

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """Yield a leaf's layers in order, or the leaf itself if its layers are not stacked."""

    def sharded(self, dtype, sharding: Sharding, paths: Iterable[str] | None = None) -> dict[str, jax.Array]:
        """Return path -> array in `dtype`, laid out as `sharding(path, shape)` says; of `paths` alone, if given."""


def open_weights(path: str | Path, architecture: Architecture, key: str = DEFAULT, *, strict: bool = True) -> Weights:
    """Open the weights of one network at `path` (any layout), checking every key and shape but reading no array.

    Args:
      path: as in `load_dit`.
      architecture: the network that is wanted.
      key: which, if there are several: its name in the file, or "generator", "ema" or "critic" of a training run. By
        default the generator, which is also the only one there, whatever its name; likewise for "".
      strict: whether another `key` must be there if there is only one network.

    Raises:
      UserError: one line that names the file, key or field.
    """
    found = find_weights(fetched(path, architecture.component), architecture, key if strict else DEFAULT)
    if isinstance(found, OrbaxTree):
        if key not in (DEFAULT, "") and strict and not found.several_networks:
            raise UserError(f"{path}: holds no {key!r}, but one network only; leave --which out")
        if found.adapters is not None:
            return OnBase(found, architecture)
        return OrbaxWeights(found, architecture)
    return TorchWeights(found, architecture, key, asked=str(path), strict=strict)


def load_module(
    weights: Weights, dtype, sharding: Sharding | None = None, *, param_dtype=None, **options
) -> nnx.Module:
    """Return the module with its weights.

    Args:
      weights: from `open_weights`.
      dtype: of the computation.
      sharding: see `Sharding`; by default whole on the default device.
      param_dtype: of the stored parameters; by default those of a module of `dtype`, of which not all are `dtype`.
      options: of the module's constructor.
    """
    graphdef, state = nnx.split(weights.architecture.abstract(weights.config, dtype, **options))
    if param_dtype is None:
        param_dtype = {path: leaf.dtype for path, leaf in flat_state(state).items()}
    if sharding is None:
        # Not jnp.asarray, which copies on a CPU.
        arrays = {path: jax.device_put(array) for path, array in weights.arrays(param_dtype)}
    else:
        arrays = weights.sharded(param_dtype, sharding)
    return nnx.merge(graphdef, from_flat(state, arrays))


def lossless_dtype(weights: Weights, dtype) -> jnp.dtype:
    """Return the narrowest dtype for the parameters of a network that computes in `dtype`, without changing a result.

    It is the one that they are stored in, if `dtype` holds its values exactly; else `dtype`.
    """
    stored = jnp.result_type(*(leaf.dtype for leaf in weights.leaves.values()))
    return stored if jnp.promote_types(stored, dtype) == dtype else jnp.dtype(dtype)


class OrbaxWeights:
    """Weights in an Orbax checkpoint: our own layout, or an item of a training checkpoint."""

    def __init__(self, tree: OrbaxTree, architecture: Architecture):
        self.architecture = architecture
        self.config = architecture.config_from_record(tree.record, name=str(tree.source))
        self._folder = tree.folder
        self.files = tuple(sorted(path for path in tree.folder.rglob("*") if is_bucket(path) or path.is_file()))
        self.leaves = orbax_io.read_structure(tree.folder)
        expected = architecture.leaves(self.config)
        for path in expected:
            if path not in self.leaves:
                raise UserError(
                    f"{tree.folder}: the leaf {path} is missing{closest(path, self.leaves)}; write it again"
                )
        for path, leaf in self.leaves.items():
            if path not in expected:
                raise UserError(f"{tree.folder}: the leaf {path} is not known{closest(path, expected)}; write it again")
            if leaf.shape != expected[path].shape:
                raise UserError(
                    f"{tree.folder}: {path} has shape {leaf.shape}, but {tree.source} says {expected[path].shape}"
                )

    def array(self, path: str, dtype=None) -> np.ndarray:
        """Return one leaf in `dtype`."""
        leaves = cast_leaves({path: self.leaves[path]}, dtype)
        return next(orbax_io.read_arrays(self._folder, leaves))[1]

    def arrays(self, dtype=None, paths: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) in `dtype`, in the order of `leaves` or of `paths`, if given; few are held at a time."""
        yield from orbax_io.read_arrays(self._folder, cast_leaves(_only(paths, self.leaves), dtype))

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """Yield a leaf's layers in order, or the leaf itself if its layers are not stacked."""
        yield from layers_of(self.architecture.native_rules(self.config), path, self.array(path))

    def sharded(self, dtype, sharding: Sharding, paths: Iterable[str] | None = None) -> dict[str, jax.Array]:
        """Return path -> array in `dtype`, laid out as `sharding(path, shape)` says; of `paths` alone, if given."""
        return orbax_io.read_sharded(self._folder, cast_leaves(_only(paths, self.leaves), dtype), sharding)


class TorchWeights:
    """Weights under PyTorch's keys: Wan's own or diffusers', in .safetensors or .pth files."""

    def __init__(self, found: TorchFiles, architecture: Architecture, key: str, *, asked: str, strict: bool):
        name = str(found.files[0] if found.single or len(found.files) == 1 else found.files[0].parent)
        self.architecture, self.files = architecture, tuple(found.files)
        files = open_files(found.files)
        self._tensors = network_in(tensors_of(files), architecture, key, name=name, asked=asked, strict=strict)
        shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        tables = (architecture.native_rules, architecture.diffusers_rules)
        scores = [matching_keys(table(architecture.config_class()), shapes) for table in tables]
        native = scores[0] >= scores[1]
        self.config = _config(found, architecture, shapes, native, name)
        rules = tables[0 if native else 1](self.config)
        targets = architecture.leaves(self.config)
        self._pieces = resolve(rules, shapes, targets, name=name)
        self.leaves = {}
        for path, pieces in self._pieces.items():
            dtype = jnp.result_type(*(self._tensors[piece.key].leaf.dtype for piece in pieces))
            self.leaves[path] = jax.ShapeDtypeStruct(targets[path].shape, dtype)
        self._may_be_zero = {
            piece.key
            for path, pieces in self._pieces.items()
            for piece in pieces
            if path.endswith(architecture.zero_at_first)
        }
        for file in files:
            self._check_end(file)
        if architecture is WAN_DIT and _is_causal(found, files):
            note_causal(name)

    def array(self, path: str, dtype=None) -> np.ndarray:
        """Return one leaf in `dtype`."""
        return leaf_from_torch(self._pieces[path], cast_leaves({path: self.leaves[path]}, dtype)[path], self._read)

    def arrays(self, dtype=None, paths: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, array) in `dtype`, in the order of `leaves` or of `paths`, if given; few are held at a time."""
        for path in _only(paths, self.leaves):
            yield path, self.array(path, dtype)

    def layers(self, path: str) -> Iterator[np.ndarray]:
        """Yield a leaf's layers in order, or the leaf itself if its layers are not stacked."""
        for piece in self._pieces[path]:
            yield piece.rule.to_flax(self._read(piece.key, None))

    def sharded(self, dtype, sharding: Sharding, paths: Iterable[str] | None = None) -> dict[str, jax.Array]:
        """Return path -> array in `dtype`, laid out as `sharding(path, shape)` says; of `paths` alone, if given."""
        return {
            path: _sharded_leaf(self._pieces[path], leaf, self._read, sharding(path, leaf.shape))
            for path, leaf in cast_leaves(_only(paths, self.leaves), dtype).items()
        }

    def _read(self, key: str, rows: tuple[int, int] | None) -> np.ndarray:
        return self._tensors[key].read(rows, may_be_zero=key in self._may_be_zero)

    def _check_end(self, file: TensorFile) -> None:
        """Raise a UserError if the last matrix of a file ends in zeros, as that of a download that broke off.

        Elsewhere in the file they are seen when the matrices are read; the end is looked at before anything is done.
        """
        own = {
            tensor.key: tensor
            for key, tensor in self._tensors.items()
            if tensor.file is file and key not in self._may_be_zero and is_matrix(tensor.shape)
        }
        last = next((own[key] for key in file.last if key in own), None)
        if last is not None and last.ends_in_zeros():
            raise last.hole()


def _sharded_leaf(pieces, leaf: jax.ShapeDtypeStruct, read, sharding: jax.sharding.Sharding) -> jax.Array:
    def bounds(index):  # slices cannot be the keys of a dict
        return tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))

    local = {bounds(index): index for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
    shards = dict(zip(local, read_shards(pieces, leaf, read, list(local.values())), strict=True))
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: shards[bounds(index)])


def _only(paths: Iterable[str] | None, leaves: dict) -> dict:
    return leaves if paths is None else {path: leaves[path] for path in paths}


def cast_leaves(leaves: dict[str, jax.ShapeDtypeStruct], dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the leaves in `dtype`: one for all, path -> dtype, or None for their own."""
    if dtype is None:
        return leaves
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(leaves, dtype)
    return {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtypes[path])) for path, leaf in leaves.items()}


def _is_causal(found: TorchFiles, files: list[TensorFile]) -> bool:
    entries = {}
    if found.config is not None:
        with contextlib.suppress(UserError):
            entries = read_json(found.config)
    metadata = {name: value for file in files for name, value in getattr(file, "metadata", {}).items()}
    return is_causal(entries, metadata, found.files[0])


def _config(found: TorchFiles, architecture: Architecture, shapes: dict, native: bool, name: str):
    if found.config is not None:
        entries = read_json(found.config)
        with _reading(str(found.config)) if not found.single else contextlib.suppress(UserError):
            with _reading(str(found.config)):
                config = architecture.config_from_json(entries, str(found.config))
            if not found.single or _fits(architecture, config, shapes, native):
                return config
    with _reading(name):
        return architecture.config_from_shapes(shapes if native else in_native_names(architecture, shapes), name)


def _fits(architecture: Architecture, config, shapes: dict, native: bool) -> bool:
    rules = (architecture.native_rules if native else architecture.diffusers_rules)(config)
    expected = dict(source_shapes(rules, architecture.leaves(config)))
    return (
        all(expected.get(key, shape) == tuple(shape) for key, shape in shapes.items())
        and expected.keys() == shapes.keys()
    )


@contextlib.contextmanager
def _reading(name: str):
    """Name the file in the error of a parser that does not know it, and catch values that are not numbers."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(name) else UserError(f"{name}: {error}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, AttributeError) as error:
        raise UserError(f"{name}: not the sizes of a model ({type(error).__name__}: {error})") from None

"""Orbax checkpoints of one network: a PyTree of leaves by path, written and read with few leaves in memory."""

import asyncio
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from avd_jax.convert.state import flat_state, nested
from avd_jax.errors import UserError
from avd_jax.parallel.rules import cut_axis
from avd_jax.paths import bucket_trouble

# A process reads the chunks of which its devices hold a part. So leaves that a mesh cuts are stored in chunks as narrow
# along that axis as this allows: they fit any number of processes, and each is still worth a request.
_LEAST_CHUNK = 4 * 2**20
_CHUNK_BYTES = 128 * 2**20  # at most, of other leaves
# Leaves are read and written together up to this size: one by one takes long for a VAE's hundreds of small ones.
_GROUP_BYTES = 512 * 2**20


class _LazyLeaf:
    """A leaf that exists only while it is written."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, load: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.load = leaf.shape, np.dtype(leaf.dtype), load
        self.size = math.prod(leaf.shape)
        self.nbytes = self.size * self.dtype.itemsize


class _LazyLeafHandler(ocp.type_handlers.NumpyHandler):
    """Stores lazy leaves, a few at a time, as the NumPy arrays that they stand for."""

    async def _open_and_write(self, value, tspec, ts_context):
        """Say how the leaf is cut; Orbax's own options cut at most one axis, and that one into single rows."""
        chunk = chunk_shape(tspec["kvstore"]["path"], value)
        if chunk is not None:
            tspec["metadata"]["chunks"] = chunk
        await super()._open_and_write(value, tspec, ts_context)

    async def serialize(self, values, infos, args=None):
        serialize = super().serialize
        for group in _groups(values):
            writes = (serialize([values[i].load()], [infos[i]], args and [args[i]]) for i in group)
            # All are waited for, also when one fails: those left behind would end in tracebacks on a closed loop.
            results = await asyncio.gather(*writes, return_exceptions=True)
            errors = [result for result in results if isinstance(result, BaseException)]
            futures = [future for result in results if not isinstance(result, BaseException) for future in result]
            for future in futures:
                try:
                    future.result()
                except Exception as error:  # raised below
                    errors.append(error)
            if errors:
                raise errors[0]
            del writes, results, futures  # before the next ones are loaded
        return []


class _OneByOne:
    """Opens and reads leaf after leaf: when a read fails beside others, theirs end in tracebacks on closed loops."""

    async def metadata(self, infos):
        found = []
        for info in infos:
            found += await super().metadata([info])
        return found

    async def deserialize(self, infos, args=None):
        arrays = []
        for i, info in enumerate(infos):
            arrays += await super().deserialize([info], args and [args[i]])
        return arrays


class _NumpyReader(_OneByOne, ocp.type_handlers.NumpyHandler):
    """Reads NumPy arrays."""


class _ArrayReader(_OneByOne, ocp.type_handlers.ArrayHandler):
    """Reads sharded arrays."""


def _reader() -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _NumpyReader()), (jax.Array, _ArrayReader()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def chunk_shape(path: str, leaf: jax.ShapeDtypeStruct | np.ndarray) -> list[int] | None:
    """Return the shape of the chunks of a leaf that a mesh cuts; None for other leaves."""
    shape, axis = list(leaf.shape), cut_axis(path, leaf.shape)
    if axis is None or not leaf.size:
        return None
    row = leaf.size // shape[axis] * np.dtype(leaf.dtype).itemsize
    widths = (width for width in range(1, shape[axis]) if shape[axis] % width == 0 and width * row >= _LEAST_CHUNK)
    shape[axis] = next(widths, shape[axis])
    return shape


def write_leaves(folder: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], load: Callable[[str], np.ndarray]) -> None:
    """Write a PyTree checkpoint to `folder`, loading one leaf at a time.

    Args:
      folder: does not exist yet.
      leaves: dotted path -> shape and dtype.
      load: dotted path -> the array, of that shape and dtype.
    """
    registry = ocp.type_handlers.create_type_handler_registry((_LazyLeaf, _LazyLeafHandler(deepcopy_host_arrays=False)))
    tree = nested({path: _LazyLeaf(leaf, lambda path=path: load(path)) for path, leaf in leaves.items()})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    # Trained weights compress by a few percent only.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(_as_epath(folder), args=ocp.args.PyTreeSave(tree, save_args=save_args))


def read_structure(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return dotted path -> shape and dtype of a PyTree checkpoint, reading no array.

    Raises:
      UserError: no complete checkpoint.
    """
    if not (folder / "_METADATA").is_file():
        raise UserError(f"{folder}: not a complete Orbax checkpoint (no _METADATA); write it again")
    try:
        tree = _reader().metadata(_as_epath(folder)).tree
        return {path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in flat_state(tree).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = UserError(f"{folder}: the Orbax checkpoint is damaged ({_line(error)}); write it again")
        raise bucket_trouble(folder, error) or damaged from None


def read_arrays(folder: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, NumPy array) for the leaves asked for, in the dtype that `leaves` gives."""
    for group in _path_groups(leaves):
        restore_args = {path: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaves[path].dtype) for path in group}
        restored = _restore(folder, {path: leaves[path] for path in group}, restore_args)
        for path in group:
            yield path, restored.pop(path)


def read_sharded(
    folder: Path,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """Return path -> sharded array; each process reads what its own devices hold."""
    arrays = {}
    for group in _path_groups(leaves):
        restore_args = {
            path: ocp.ArrayRestoreArgs(
                restore_type=jax.Array,
                dtype=leaves[path].dtype,
                sharding=sharding(path, leaves[path].shape),
                global_shape=leaves[path].shape,
            )
            for path in group
        }
        arrays |= _restore(folder, {path: leaves[path] for path in group}, restore_args)
    return arrays


def _restore(folder: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], restore_args: Mapping) -> dict:
    try:
        # Not a Checkpointer, which in a bucket wants a mark that a folder copied there from a disk does not have.
        args = ocp.args.PyTreeRestore(item=nested(leaves), restore_args=nested(restore_args), partial_restore=True)
        return flat_state(_reader().restore(_as_epath(folder), args=args))
    except Exception as error:
        # Orbax raises an Exception of no kind from what TensorStore says of an array.
        cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
        if not isinstance(cause, OSError | ValueError | KeyError):
            raise
        damaged = UserError(f"{folder}: cannot read the Orbax checkpoint ({_line(cause)}); write or copy it again")
        raise bucket_trouble(folder, cause) or damaged from None


def _path_groups(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    paths = list(leaves)
    for group in _groups(list(leaves.values())):
        yield [paths[i] for i in group]


def _groups(leaves: Sequence) -> Iterator[list[int]]:
    """Yield the indices of consecutive leaves that are small together, or of a single large one."""
    group: list[int] = []
    used = 0
    for i, leaf in enumerate(leaves):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and used + size > _GROUP_BYTES:
            yield group
            group, used = [], 0
        group.append(i)
        used += size
    if group:
        yield group


def _as_epath(folder: Path) -> epath.Path:
    return epath.Path(os.fspath(folder.absolute()))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

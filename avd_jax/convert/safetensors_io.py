"""Reading and writing .safetensors one tensor at a time, with ordinary file reads.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
{key: {dtype, shape, data_offsets}}, then the bytes. The library maps files into memory, so that a pass over one ends
with all of it resident, and writes a file from all its tensors at once; here no more than one tensor is held.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from avd_jax.errors import UserError, closest
from avd_jax.paths import read_values

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The library refuses longer headers; so a file that is no safetensors is not read as one with a huge header.
_MAX_HEADER_BYTES = 100_000_000


class SafetensorsFile:
    """One .safetensors file: `leaves` maps each key to its shape and dtype, `read(key)` returns the tensor.

    Attributes:
      metadata: what the file says of itself, text by name.

    Raises:
      UserError: the file is missing, truncated, or no safetensors file, or holds a dtype that is not known here.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                    raise ValueError("its header length is not plausible")
                header = json.loads(file.read(header_bytes))
                size = file.seek(0, os.SEEK_END)
            self.metadata = dict(header.pop("__metadata__", None) or {})
            entries = {key: _entry(entry) for key, entry in header.items()}
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: truncated, or no safetensors file (its header is damaged); download or write it again"
            ) from None
        self._start = 8 + header_bytes
        needed = self._start + max((entry[3] for entry in entries.values()), default=0)
        if size < needed:
            raise UserError(f"{path}: truncated: {size} bytes of {needed}; download or write it again")
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {}
        self._offsets: dict[str, int] = {}
        for key, (dtype, shape, begin, end) in entries.items():
            if dtype not in _DTYPES:
                raise UserError(f"{path}: {key} has the dtype {dtype}; known are {', '.join(_DTYPES)}")
            if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
                raise UserError(f"{path}: damaged: {key} has {end - begin} bytes, which is not {dtype} {shape}")
            self.leaves[key] = jax.ShapeDtypeStruct(shape, _DTYPES[dtype])
            self._offsets[key] = self._start + begin

    def read(self, key: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Return one tensor, in its own dtype; if `rows` (first, last + 1) are given, zeros elsewhere."""
        leaf = self.leaves[key]
        try:
            if rows is None:
                flat = read_values(self.path, leaf.dtype, math.prod(leaf.shape), self._offsets[key])
                return flat.reshape(leaf.shape)
            array, row = np.zeros(leaf.shape, leaf.dtype), math.prod(leaf.shape[1:])
            start = self._offsets[key] + rows[0] * row * leaf.dtype.itemsize
            flat = read_values(self.path, leaf.dtype, (rows[1] - rows[0]) * row, start)
            array[slice(*rows)] = flat.reshape(-1, *leaf.shape[1:])
            return array
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot read {key}: {error}") from None

    @property
    def last(self) -> list[str]:
        """The keys, from that whose bytes are last in the file."""
        return sorted(self._offsets, key=lambda key: -self._offsets[key])

    def tail(self, key: str, most: int) -> np.ndarray:
        """Return the last bytes of a tensor, `most` at most."""
        size = _nbytes(self.leaves[key])
        try:
            return read_values(self.path, np.dtype(np.uint8), min(size, most), self._offsets[key] + max(0, size - most))
        except OSError as error:
            raise UserError(f"{self.path}: cannot read {key}: {error}") from None


def _entry(entry: Mapping) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, first byte and last + 1 of a header's entry; a ValueError or the like if it is none."""
    (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError("no dtype, or no sizes")
    return dtype, shape, begin, end


def read_index(path: Path) -> dict[str, list[str]]:
    """Read an index of shards, such as `*.safetensors.index.json`; returns shard file name -> its keys."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for key, shard in weight_map.items():
            shards.setdefault(shard, []).append(key)
        return shards
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no index of shards (JSON with 'weight_map'); download it again") from None


def open_shards(index: Path, open_file: Callable[[Path], Any] = SafetensorsFile) -> list:
    """Open all shards that an index names, each by `open_file`, and check that each holds what the index says."""
    files = []
    for shard, keys in sorted(read_index(index).items()):
        path = index.parent / shard
        if not path.is_file():
            raise UserError(f"{path}: this shard is named by {index.name} but missing; download it again")
        file = open_file(path)
        lost = [key for key in keys if key not in file.leaves]
        if lost:
            raise UserError(
                f"{path}: {lost[0]} is missing, which {index.name} says is here{closest(lost[0], file.leaves)}"
            )
        files.append(file)
    return files


def write_safetensors(
    folder: Path,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    stem: str,
    max_shard_bytes: int,
) -> list[str]:
    """Write tensors as `<stem>.safetensors`, or as shards with an index if they exceed `max_shard_bytes`.

    Args:
      folder: existing folder.
      leaves: key -> shape and dtype of every tensor.
      tensors: the same keys with their arrays, in any order within a shard of `leaves`' order; one is held at a time.
      stem: file name without its ending; shards are `<stem>-00001-of-00003.safetensors`.
      max_shard_bytes: no shard is larger, unless one tensor is.

    Returns:
      The names of the files written.
    """
    shards = _split(leaves, max_shard_bytes)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, {key: leaves[key] for key in shard}, stream)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(leaf) for leaf in leaves.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        names.append(f"{stem}.safetensors.index.json")
        (folder / names[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return names


def _split(leaves: Mapping[str, jax.ShapeDtypeStruct], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for key, leaf in leaves.items():
        if shards[-1] and used + _nbytes(leaf) > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += _nbytes(leaf)
    return shards


def _write_file(path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], stream) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}  # diffusers refuses a file that does not say so
    position = 0
    for key, leaf in leaves.items():
        end = position + _nbytes(leaf)
        header[key] = {
            "dtype": _NAMES[np.dtype(leaf.dtype)],
            "shape": list(leaf.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data start aligned, as the library has them
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = file.tell()
        for _ in leaves:
            key, array = next(stream)
            leaf = leaves[key]
            if array.shape != tuple(leaf.shape) or array.dtype != leaf.dtype:
                raise AssertionError(f"{key} is {array.dtype} {array.shape}, announced as {leaf}")
            file.seek(start + header[key]["data_offsets"][0])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())  # a full disk is reported here at the latest


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize

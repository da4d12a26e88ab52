"""Reading .pth and .pt files without PyTorch, and without running what they hold.

Such a file is an uncompressed zip archive: `data.pkl` is a pickle that describes the tensors, `data/<key>` their bytes
(torch/serialization.py). A pickle can call anything that its reader is willing to look up. The reader here knows the
handful of names that a state dict needs and answers them with functions of its own. Every other name becomes a stand-in
that takes what it is given and does nothing: so trainers' files, which keep NumPy scalars, argparse's Namespace or an
optimiser beside the weights, are read past those.

A TorchScript archive, as OpenAI ships CLIP, is such a file too, with a module in the place of the state dict and its
program in a folder beside. The module is a tree of objects; what they are made of are the tensors by name.
"""

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from avd_jax.errors import UserError
from avd_jax.paths import read_values

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Dtypes that are younger than the storages with a dtype of their own: PyTorch saves their bytes untyped.
_NAMED_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: ends in the lengths of its name and of its extra field
_MOST_NESTED = 8  # mappings within mappings; a pickle may also hold one within itself


class PthFile:
    """One .pth file: a state dict, or several by name (AVD's `generator` and `critic`), or a trainer's whole state.

    Attributes:
      groups: names of the state dicts, or none for a file that is one itself.

    Raises:
      UserError: missing, truncated, no such file, or without any tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        content, strays = _load(path)
        self._tensors = dict(_flat(content))
        self._metadata = dict(_settings(content))
        inner = {home[0]: None for home, _ in self._tensors if home}
        self.groups = [] if any(not home for home, _ in self._tensors) else list(inner)
        if not self._tensors and strays:
            raise UserError(
                f"{path}: holds more than tensors, and its code is not run ({strays[0]}); save its state dict, or use "
                "a .safetensors file"
            )
        if not self._tensors:
            raise UserError(f"{path}: holds no state dict (tensors by key); it has {_some(content)}")

    def state_dict(self, group: str | None = None) -> "StateDict":
        """Return the state dict of that name; for None all tensors of the file, those of groups under `group.key`."""
        if group is None:
            return StateDict(self.path, self._tensors, self._metadata)
        inside = {(home[1:], key): value for (home, key), value in self._tensors.items() if home[:1] == (group,)}
        return StateDict(self.path, inside)


class StateDict:
    """Tensors of a .pth file: `leaves` maps each key to its shape and dtype, `read(key)` returns the tensor.

    Attributes:
      homes: key -> names of the mappings, outermost first, within which the file has the tensor.
      metadata: settings that lie beside the tensors.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[tuple[tuple[str, ...], str], "_Tensor"],
        metadata: Mapping[str, str | float] | None = None,
    ):
        self.path = path
        self.metadata = dict(metadata or {})
        self._tensors = {".".join((*home, key)): tensor for (home, key), tensor in tensors.items()}
        self.homes = {".".join((*home, key)): home for home, key in tensors}
        self.leaves = {
            key: jax.ShapeDtypeStruct(tensor.size, tensor.storage.dtype) for key, tensor in self._tensors.items()
        }

    @property
    def last(self) -> list[str]:
        """The keys, from that whose bytes are last in the file."""
        return sorted(self._tensors, key=lambda key: -self._tensors[key].storage.position)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Return one tensor, in its own dtype; nothing else of the file is read.

        If `rows` (first, last + 1) are given and lie together in the file, the others are zero.
        """
        tensor = self._tensors[key]
        storage = tensor.storage
        size = storage.dtype.itemsize
        within = sum((n - 1) * stride for n, stride in zip(tensor.size[1:], tensor.stride[1:], strict=True))
        if rows is not None and rows[0] < rows[1] and within < tensor.stride[0]:
            values = np.zeros(storage.count, f"u{size}")
            start = tensor.offset + rows[0] * tensor.stride[0]
            stop = tensor.offset + (rows[1] - 1) * tensor.stride[0] + within + 1
            values[start:stop] = self._bytes(storage.position + start * size, (stop - start) * size).view(f"u{size}")
        else:
            values = self._bytes(storage.position, storage.count * size).view(f"u{size}")  # no dtype NumPy has not
        strides = [stride * size for stride in tensor.stride]
        return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides).view(storage.dtype)

    def tail(self, key: str, most: int) -> np.ndarray:
        """Return the last bytes of a tensor's storage, `most` at most."""
        storage = self._tensors[key].storage
        size = storage.count * storage.dtype.itemsize
        return self._bytes(storage.position + max(0, size - most), min(size, most))

    def _bytes(self, position: int, count: int) -> np.ndarray:
        try:
            values = read_values(self.path, np.dtype(np.uint8), count, position)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if len(values) < count:
            raise _damaged(self.path)
        return values


@dataclass(frozen=True)
class _Storage:
    """A run of values in the file: `count` of `dtype` from byte `position` on."""

    dtype: np.dtype
    position: int
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A strided view into a storage, all in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Stray:
    """What stands for an object that is no tensor: it takes all that a pickle does to an object, and does nothing."""

    def __new__(cls, *args, **kwargs):
        """Make one, whatever the arguments."""
        del args, kwargs
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *args, **kwargs):
        del args, kwargs

    def _nothing(self, *args, **kwargs) -> None:
        del args, kwargs

    __setitem__ = append = extend = add = _nothing

    def __setstate__(self, state) -> None:
        """Keep what it is made of, such as the settings in argparse's Namespace."""
        self.state = state if isinstance(state, Mapping) else {}

    def __call__(self, *args, **kwargs) -> "_Stray":
        """Return another, as when what a stray call returned is called."""
        return _Stray(*args, **kwargs)


class _ScriptModule(_Stray):
    """A module of a TorchScript archive; its state holds its tensors and its submodules by name."""


class _Unpickler(pickle.Unpickler):
    """Reads `data.pkl`; knows no name but those below, and notes the others in `strays`."""

    def __init__(self, data, archive: zipfile.ZipFile, folder: str, file):
        super().__init__(data, encoding="utf-8")
        self._archive, self._folder, self._file = archive, folder, file
        self.strays: list[str] = []

    def find_class(self, module: str, name: str):
        """Return our stand-in for a name; never import anything."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        if module == "torch" and name in _NAMED_DTYPES:
            return np.dtype(_NAMED_DTYPES[name])
        if module.split(".")[0] == "__torch__":
            return type("ScriptModule", (_ScriptModule,), {})
        self.strays.append(f"{module}.{name}")
        return type("Stray", (_Stray,), {})  # a class, since a pickle may make an instance without calling it

    def persistent_load(self, pid):
        """Return the storage that a tensor refers to."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            self.strays.append(str(kind))
            return _Stray()
        member = self._archive.getinfo(f"{self._folder}/data/{key}")
        self._file.seek(member.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < count * dtype.itemsize:
            raise ValueError("a storage is compressed or too short")
        return _Storage(dtype, member.header_offset + _LOCAL_HEADER.size + name_length + extra_length, count)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, backward_hooks=None, metadata=None):
    del requires_grad, backward_hooks, metadata
    if not isinstance(storage, _Storage):
        return _Stray()
    tensor = _Tensor(storage, offset, tuple(size), tuple(stride))
    last = offset + sum((length - 1) * step for length, step in zip(tensor.size, tensor.stride, strict=True))
    in_range = min((offset, *tensor.size, *tensor.stride)) >= 0 and (last < storage.count or not math.prod(tensor.size))
    if not in_range:
        raise ValueError("a tensor reaches beyond its storage")
    return tensor


def _rebuild_untyped(storage, offset, size, stride, requires_grad, backward_hooks, dtype, metadata=None):
    """Make a tensor of a storage whose dtype is given apart from it."""
    del requires_grad, backward_hooks, metadata
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        return _Stray()
    typed = _Storage(dtype, storage.position, storage.count * storage.dtype.itemsize // dtype.itemsize)
    return _rebuild_tensor(typed, offset, size, stride)


def _rebuild_parameter(tensor, *_):
    return tensor


def _rebuild_from_type(function, kind, arguments, state):
    """Make a tensor that has attributes of its own, by one of the functions here."""
    del kind, state
    return function(*arguments) if function in _REBUILD.values() else _Stray()


def _plain_dict(*_) -> dict:
    return {}


_REBUILD = {
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_untyped,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}
# All that a pickle can name and get; none of it does more than put tensors and mappings together.
_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _plain_dict,
    ("torch", "Size"): tuple,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch.storage", "UntypedStorage"): np.dtype(np.uint8),
    **{("torch._utils", name): function for name, function in _REBUILD.items()},
}


def _flat(content, home: tuple[str, ...] = ()) -> Iterator[tuple[tuple[tuple[str, ...], str], _Tensor]]:
    """Yield ((names of the mappings around it, key), tensor) of every tensor in nested mappings, lists and modules."""
    items = enumerate(content) if isinstance(content, list | tuple) else content.items()
    for key, value in items:
        if isinstance(value, _Tensor):
            yield (home, str(key)), value
        elif isinstance(value, Mapping | list | tuple) and len(home) < _MOST_NESTED:
            yield from _flat(value, (*home, str(key)))
        elif isinstance(value, _ScriptModule):
            yield from (((home, f"{key}.{name}"), tensor) for name, tensor in _of_module(value))


def _of_module(module: _ScriptModule, depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
    """Yield (key as in the module's state dict, tensor)."""
    for name, value in module.state.items():
        if isinstance(value, _Tensor):
            yield str(name), value
        elif isinstance(value, _ScriptModule) and depth < _MOST_NESTED:
            yield from ((f"{name}.{key}", tensor) for key, tensor in _of_module(value, depth + 1))


def _settings(content, depth: int = 0) -> Iterator[tuple[str, str | float]]:
    """Yield (name, value) of the texts, numbers and switches in nested mappings and in objects."""
    for key, value in (content.state if isinstance(content, _Stray) else content).items():
        if isinstance(value, str | int | float):
            yield str(key), value
        elif isinstance(value, Mapping | _Stray) and depth < _MOST_NESTED:
            yield from _settings(value, depth + 1)


def _load(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return the content, and the names in it that are not known."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                if file.read(1) == b"\x80":  # a bare pickle
                    raise UserError(
                        f"{path}: is in the format of PyTorch before 1.6; torch.save it again with a newer one, "
                        "or use a .safetensors file"
                    )
                raise _damaged(path)
            with zipfile.ZipFile(file) as archive:
                content, strays = _read_archive(path, archive, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UserError:
        raise
    except Exception as error:  # bytes that are no such archive can make zipfile and pickle raise anything
        raise _damaged(path) from error
    if isinstance(content, _ScriptModule):
        content = dict(_of_module(content))
    if not isinstance(content, Mapping):
        what = f"an object of {strays[0]}" if isinstance(content, _Stray) and strays else f"a {type(content).__name__}"
        raise UserError(f"{path}: holds {what}, expected a state dict (tensors by key)")
    return content, strays


def _read_archive(path: Path, archive: zipfile.ZipFile, file) -> tuple[Any, list[str]]:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _damaged(path)
    folder = pickles[0].removesuffix("/data.pkl")
    if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
        raise UserError(f"{path}: was written on a big-endian machine; use a .safetensors file")
    with archive.open(pickles[0]) as data:
        unpickler = _Unpickler(data, archive, folder, file)
        return unpickler.load(), unpickler.strays


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: truncated, or no PyTorch file; download or write it again")


def _some(content: Mapping) -> str:
    names = [repr(name) for name in content]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"

"""Reading .pth and .pt files without PyTorch, and without running what they hold.

Such a file is an uncompressed zip archive: `data.pkl` is a pickle that describes the tensors, `data/<key>` their bytes
(torch/serialization.py). A pickle can call anything that its reader is willing to look up; the reader here knows the
handful of names that a state dict needs, answers them with functions of its own, and refuses every other.
"""

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from avd_jax.errors import UserError

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
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: ends in the lengths of its name and of its extra field


class PthFile:
    """One .pth file that holds a state dict, or several by name (AVD's `generator` and `critic`).

    Attributes:
      groups: names of the state dicts, or none for a file that is one itself.
    """

    def __init__(self, path: Path):
        self.path = path
        content = _load(path)
        self.groups = [
            str(name) for name, value in content.items() if isinstance(value, Mapping) and _is_state_dict(value)
        ]
        self._content = content
        if not self.groups and not _is_state_dict(content):
            raise UserError(f"{path}: holds no state dict (tensors by key); it has {_some(content)}")

    def state_dict(self, group: str | None) -> "StateDict":
        """Return the state dict of that name, or the file's only one for None."""
        return StateDict(self.path, self._content if group is None else self._content[group])


class StateDict:
    """Tensors of a .pth file: `leaves` maps each key to its shape and dtype, `read(key)` returns the tensor."""

    def __init__(self, path: Path, tensors: Mapping[str, "_Tensor"]):
        self.path = path
        self._tensors = tensors
        self.leaves = {key: jax.ShapeDtypeStruct(tensor.size, tensor.storage.dtype) for key, tensor in tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """Return one tensor, in its own dtype; nothing else of the file is read."""
        tensor = self._tensors[key]
        storage = tensor.storage
        try:
            with self.path.open("rb") as file:
                file.seek(storage.position)
                values = np.fromfile(file, storage.dtype, storage.count)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if len(values) < storage.count:
            raise _damaged(self.path)
        strides = [stride * values.itemsize for stride in tensor.stride]
        return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides)


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


class _Unpickler(pickle.Unpickler):
    """Reads `data.pkl`; knows no name but those below."""

    def __init__(self, data, archive: zipfile.ZipFile, folder: str, file):
        super().__init__(data, encoding="utf-8")
        self._archive, self._folder, self._file = archive, folder, file

    def find_class(self, module: str, name: str):
        """Return our stand-in for a name of PyTorch's; never import anything."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid):
        """Return the storage that a tensor refers to."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise _RefusedError(str(kind))
        member = self._archive.getinfo(f"{self._folder}/data/{key}")
        self._file.seek(member.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < count * dtype.itemsize:
            raise ValueError("a storage is compressed or too short")
        return _Storage(dtype, member.header_offset + _LOCAL_HEADER.size + name_length + extra_length, count)


class _RefusedError(Exception):
    """The pickle asks for a name that no tensor needs."""


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, backward_hooks=None, metadata=None) -> _Tensor:
    del requires_grad, backward_hooks, metadata
    tensor = _Tensor(storage, offset, tuple(size), tuple(stride))
    last = offset + sum((length - 1) * step for length, step in zip(tensor.size, tensor.stride, strict=True))
    in_range = min((offset, *tensor.size, *tensor.stride)) >= 0 and (last < storage.count or not math.prod(tensor.size))
    if not in_range:
        raise ValueError("a tensor reaches beyond its storage")
    return tensor


def _rebuild_parameter(tensor, requires_grad, backward_hooks) -> _Tensor:
    del requires_grad, backward_hooks
    return tensor


def _load(path: Path) -> Mapping[str, Any]:
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
                content = _read_archive(path, archive, file)
    except _RefusedError as error:
        raise UserError(
            f"{path}: holds more than tensors, and its code is not run ({error}); save its state dict, or use a "
            ".safetensors file"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UserError:
        raise
    except Exception as error:  # bytes that are no such archive can make zipfile and pickle raise anything
        raise _damaged(path) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict (tensors by key)")
    return content


def _read_archive(path: Path, archive: zipfile.ZipFile, file) -> Any:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _damaged(path)
    folder = pickles[0].removesuffix("/data.pkl")
    if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
        raise UserError(f"{path}: was written on a big-endian machine; use a .safetensors file")
    with archive.open(pickles[0]) as data:
        return _Unpickler(data, archive, folder, file).load()


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: truncated, or no PyTorch file; download or write it again")


def _is_state_dict(content: Mapping) -> bool:
    return bool(content) and all(isinstance(value, _Tensor) for value in content.values())


def _some(content: Mapping) -> str:
    names = [repr(name) for name in content]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"

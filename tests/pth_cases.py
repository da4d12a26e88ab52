"""Writing .pth files as torch.save does, without PyTorch: arrays in nested mappings become tensors."""

import collections
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "uint8": "ByteStorage"}


def _named(module: str, name: str, kind=types.FunctionType):
    """Return a class or a function that pickles as `module.name`."""
    made = type(name, (), {}) if kind is type else types.FunctionType((lambda: None).__code__, {}, name)
    made.__module__, made.__qualname__, made.__name__ = module, name, name
    return made


_REBUILD = _named("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = _named("torch._utils", "_rebuild_tensor_v3")
_CLASSES = {name: _named("torch", name, type) for name in _STORAGES.values()}
_UNTYPED = _named("torch.storage", "UntypedStorage", type)
_FLOAT8 = {name: _named("torch", name) for name in ("float8_e4m3fn", "float8_e5m2")}


def _modules() -> dict[str, types.ModuleType]:
    """Return modules in which pickle finds the names above."""
    found = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "torch.storage")}
    for made in (_REBUILD, _REBUILD_UNTYPED, _UNTYPED, *_CLASSES.values(), *_FLOAT8.values()):
        setattr(found[made.__module__], made.__name__, made)
    return found


class _Storage:
    def __init__(self, kind, key: str, count: int):
        self.pid = ("storage", kind, key, "cpu", count)


class _Pickler(pickle.Pickler):
    def __init__(self, buffer):
        super().__init__(buffer, protocol=2)
        self.data: list[bytes] = []

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Storage) else None

    def reducer_override(self, obj):
        if not isinstance(obj, np.ndarray) or obj.dtype.name not in (*_STORAGES, *_FLOAT8):
            return NotImplemented
        key, name = str(len(self.data)), obj.dtype.name
        self.data.append(np.ascontiguousarray(obj).tobytes())
        stride = tuple(step // obj.itemsize for step in np.ascontiguousarray(obj).strides) if obj.ndim else ()
        view = (0, obj.shape, stride, False, collections.OrderedDict())
        if name in _FLOAT8:  # younger dtypes have untyped storages
            storage = _Storage(_UNTYPED, key, obj.nbytes)
            return _REBUILD_UNTYPED, (storage, *view, _FLOAT8[name])
        return _REBUILD, (_Storage(_CLASSES[_STORAGES[name]], key, obj.size), *view)


def write_pth(path: Path, content) -> Path:
    """Write `content`, whose arrays become tensors; the rest is pickled as it is."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    with mock.patch.dict(sys.modules, _modules()):
        pickler.dump(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for key, data in enumerate(pickler.data):
            archive.writestr(f"archive/data/{key}", data)
    return path

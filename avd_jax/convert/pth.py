"""Reading .pth and .pt files, for which PyTorch is needed; nothing else in the project needs it."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from avd_jax.errors import UserError


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
        if group is None:
            return StateDict(self.path, self._content)
        return StateDict(self.path, self._content[group])


class StateDict:
    """Tensors of a .pth file: `leaves` maps each key to its shape and dtype, `read(key)` returns the tensor."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]):
        self.path = path
        self._tensors = tensors
        self.leaves = {
            key: jax.ShapeDtypeStruct(tuple(tensor.shape), _numpy_dtype(tensor)) for key, tensor in tensors.items()
        }

    def read(self, key: str) -> np.ndarray:
        """Return one tensor, in its own dtype."""
        tensor = self._tensors[key].detach().contiguous()
        if self.leaves[key].dtype == ml_dtypes.bfloat16:
            import torch

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)  # NumPy has no bfloat16 of its own
        return tensor.numpy()


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: needs PyTorch: pip install torch, or use a .safetensors file") from None
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"{path}: holds more than tensors, and its code is not run; save its state dict, or use .safetensors"
            ) from None
        raise UserError(f"{path}: truncated, or no PyTorch file; download or write it again") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise UserError(f"{path}: truncated, or no PyTorch file; download or write it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict (tensors by key)")
    return content


def _is_state_dict(content: Mapping) -> bool:
    return bool(content) and all(hasattr(value, "untyped_storage") for value in content.values())


def _numpy_dtype(tensor) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _some(content: Mapping) -> str:
    names = [repr(name) for name in content]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"

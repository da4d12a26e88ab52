"""Files of weights, opened by what they are: their tensors under one flat set of keys, and why a file is not taken."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from avd_jax.convert.pth import PthFile, StateDict
from avd_jax.convert.safetensors_io import SafetensorsFile, open_shards
from avd_jax.errors import UserError
from avd_jax.paths import is_bucket

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pth", ".pt", ".bin", ".ckpt")
# What downloaders append to the name of a file, or of the notes beside it, until it is whole.
UNFINISHED = (".aria2", ".incomplete", ".part", ".partial", ".crdownload", ".download", ".!qB", ".!ut")
# What messages say of a file of a kind.
LORA = "give its base model here, and the LoRA as --lora, or as init_lora of a config"
GGUF = "is a GGUF file, whose weights are quantised; get the bf16 or fp16 .safetensors of the model"
# So many zero bytes in a row, from a multiple of that many on, are a hole that a downloader left; so are fewer if they
# are all of a matrix. Unused rows of an embedding, the longest zeros that trained weights might have, are fewer.
_HOLE_BYTES = 1 << 20
_END_SHARE, _LEAST_END = 8, 512  # what of the last matrix of a file is looked at before anything else is done

TensorFile = SafetensorsFile | StateDict
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


class NotHereError(UserError):
    """There is no such component at the path; it may hold others."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
      file: where it is.
      key: its key in the file.
      home: names of the mappings around it, in a file that nests them.
      scale: of a float8 matrix: what its values are to be multiplied with.
    """

    file: TensorFile
    key: str
    home: tuple[str, ...] = ()
    scale: "Stored | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as stored."""
        return tuple(self.file.leaves[self.key].shape)

    @property
    def stored_dtype(self) -> np.dtype:
        """Its dtype in the file."""
        return np.dtype(self.file.leaves[self.key].dtype)

    @property
    def leaf(self) -> jax.ShapeDtypeStruct:
        """Its shape and the dtype that `read` gives; bfloat16 holds every float8 exactly, float32 its scaled values."""
        dtype = self.stored_dtype
        if self.scale is not None:
            dtype = np.dtype(np.float32)
        elif dtype in _FLOAT8:
            dtype = np.dtype(jnp.bfloat16)
        return jax.ShapeDtypeStruct(self.shape, dtype)

    def read(self, rows: tuple[int, int] | None = None, *, may_be_zero: bool = False) -> np.ndarray:
        """Return the tensor, float8 as the values that it stands for.

        Args:
          rows: first and last + 1 along the first axis of those that are needed, the others are zero; None for all.
          may_be_zero: whether it is one that may be all zero, in a model that has not been trained.

        Raises:
          UserError: it cannot be read, or is a matrix with a hole where a download broke off.
        """
        array = self.file.read(self.key, rows)
        if not may_be_zero and is_matrix(self.shape) and _has_hole(array, rows):
            raise self.hole()
        if self.scale is not None:
            scale = self.scale.file.read(self.scale.key).astype(np.float32)
            scale = scale.reshape(scale.shape[:1] + (1,) * (array.ndim - 1) if scale.size > 1 else ())
            return array.astype(np.float32) * scale
        return array.astype(self.leaf.dtype, copy=False)

    def ends_in_zeros(self) -> bool:
        """Whether it ends in a hole; reads no more than its last eighth, or mebibyte."""
        size = math.prod(self.shape) * self.stored_dtype.itemsize
        tail = self.file.tail(self.key, min(_HOLE_BYTES, max(size // _END_SHARE, _LEAST_END)))
        return tail.size > 0 and not tail.any()

    def hole(self) -> UserError:
        """Return the error for a matrix that is a hole."""
        return UserError(
            f"{self.file.path}: the download is incomplete: {self.key} is zero where a trained model's is not; "
            "download the file again"
        )


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether more than one axis is longer than 1; vectors of a trained model, such as a bias, may be zero."""
    return sum(size > 1 for size in shape) > 1


def _has_hole(array: np.ndarray, rows: tuple[int, int] | None) -> bool:
    """Whether a matrix is all zero, or over a whole `_HOLE_BYTES` of the rows that were read."""
    values = array[slice(*rows or (None,))].ravel(order="K").view(np.uint8)
    least = _HOLE_BYTES if rows else min(_HOLE_BYTES, values.size)
    for start in range(0, values.size, _HOLE_BYTES):
        block = values[start : start + _HOLE_BYTES]
        if block.size < least:
            return False
        if not block[::4093].any() and not block.any():  # a few decide for nearly every block
            return True
    return False


def check_complete(path: Path) -> None:
    """Raise a UserError if a file, or what a downloader keeps beside it, says that it is not all there."""
    if path.suffix in UNFINISHED:
        raise UserError(f"{path}: is a download that has not finished; complete it, and name the file itself")
    if is_bucket(path):
        return  # what is there is whole
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: the download is incomplete: it links to a file that is not there; download it again")
    for mark in UNFINISHED:
        note = path.with_name(path.name + mark)
        if note.exists():
            raise UserError(
                f"{path}: the download is incomplete: {note.name} lies beside it; complete the download (if the file "
                f"is known to be whole, remove {note.name})"
            )


def open_file(path: Path) -> TensorFile:
    """Open one file of weights.

    Raises:
      UserError: an incomplete download, GGUF, another kind of file, or damaged.
    """
    check_complete(path)
    if path.suffix.lower() == ".gguf" or _begins_with(path, b"GGUF"):
        raise UserError(f"{path}: {GGUF}")
    if path.suffix.lower() in SAFETENSORS:
        return SafetensorsFile(path)
    if path.suffix.lower() in PICKLED:
        return PthFile(path).state_dict()
    raise UserError(f"{path}: not a file of weights; known are {', '.join(SAFETENSORS + PICKLED)}, and folders of them")


def open_files(paths: tuple[Path, ...]) -> list[TensorFile]:
    """Open the files of one network, or the shards that an index names."""
    if len(paths) == 1 and paths[0].suffix == ".json" and ".index." in paths[0].name:
        return open_shards(paths[0], open_file)
    return [open_file(path) for path in paths]


def tensors_of(files: list[TensorFile]) -> dict[str, Stored]:
    """Return key -> tensor of all files together; raises UserError for a key that two files have."""
    tensors: dict[str, Stored] = {}
    for file in files:
        homes: Mapping[str, tuple[str, ...]] = getattr(file, "homes", {})
        for key in file.leaves:
            if key in tensors:
                raise UserError(f"{file.path}: {key} is also in {tensors[key].file.path.name}; keep one")
            tensors[key] = Stored(file, key, homes.get(key, ()))
    return tensors


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False  # the reader of the file says what is wrong

"""Writing weights to our own Orbax layout, and folders that are whole or not there.

Every folder is written beside its final name and renamed once it is complete.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from avd_jax.convert import orbax_io
from avd_jax.convert.layouts import OUR_KEY, STUDENT_FILE, read_json
from avd_jax.convert.weights import Weights
from avd_jax.errors import UserError
from avd_jax.paths import any_path, is_bucket

# diffusers' own limit, so that a 1.3B model is one file and a 14B model a few.
MAX_SHARD_BYTES = 10 * 10**9


def save_orbax(
    weights: Weights, folder: Path, *, dtype=None, student: dict | None = None, overwrite: bool = False
) -> None:
    """Write one network to `folder` in our own layout: an Orbax checkpoint with its config.json.

    Args:
      weights: from `open_weights`; one leaf is in memory at a time.
      folder: final folder, such as `runs/wan/transformer`.
      dtype: None keeps each leaf's.
      student: settings that `student_settings` shall find there again.
      overwrite: replace a folder that an earlier call has written.

    Raises:
      UserError: `folder` exists, or cannot be written (a full disk); nothing is left behind then.
    """
    with complete_folder(folder, overwrite=overwrite, ours=_is_our_component) as temporary:
        leaves = {path: with_dtype(leaf, dtype) for path, leaf in weights.leaves.items()}
        orbax_io.write_leaves(temporary, leaves, lambda path: weights.array(path, dtype))
        write_json(temporary / "config.json", {OUR_KEY: weights.architecture.record(weights.config)})
        if student is not None:
            write_json(temporary / STUDENT_FILE, student)


def save_tokenizer(tokenizer, folder: Path, *, overwrite: bool = False) -> None:
    """Write a tokenizer to `folder`; errors as in `save_orbax`."""
    with complete_folder(
        folder, overwrite=overwrite, ours=lambda path: [child.name for child in path.iterdir()] == ["tokenizer.json"]
    ) as temporary:
        tokenizer.save(temporary)


def check_writable(folder: Path, *, overwrite: bool, ours: Callable[[Path], bool] | None = None) -> None:
    """Raise a UserError if `complete_folder` would refuse `folder`, before any work is done."""
    folder = any_path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder}: already exists; pass --overwrite to replace it, or choose another folder")
    if ours is not None and not (folder.is_dir() and ours(folder)):
        raise UserError(f"{folder}: not replaced, since it holds other things; remove it, or choose another folder")


@contextlib.contextmanager
def complete_folder(folder: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield the path of a new folder that becomes `folder` on success and is removed on failure."""
    folder = any_path(folder)
    check_writable(folder, overwrite=overwrite, ours=ours)
    if is_bucket(folder):
        with tempfile.TemporaryDirectory() as staging:
            yield Path(staging) / folder.name
            _upload(Path(staging) / folder.name, folder)
        return
    temporary, replaced = (folder.with_name(f".{folder.name}.{part}") for part in ("partial", "replaced"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of a killed process
        yield temporary
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, ValueError) as error:
        if "No space left" in str(error):  # Orbax reports it as a ValueError
            raise UserError(f"{folder}: cannot be written: the disk is full; free some space") from None
        if isinstance(error, ValueError):
            raise
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; choose another folder") from None
    finally:
        _remove(temporary)


@contextlib.contextmanager
def opened_folder(folder: Path) -> Iterator[Path]:
    """Yield where to write the files of a folder: itself, which is made, or a local one that becomes it in a bucket."""
    if is_bucket(folder):
        with tempfile.TemporaryDirectory() as staging:
            yield Path(staging)
            _upload(Path(staging), folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _upload(source: Path, folder: Path) -> None:
    """Copy a folder into a bucket; what says what the folder is comes last, and goes first if it is replaced."""
    files = sorted(
        (path.relative_to(source) for path in source.rglob("*") if path.is_file()),
        key=lambda file: (file.name == "config.json", -len(file.parts), file),
    )
    for file in reversed(files):
        if file.name == "config.json":
            (folder / file).unlink(missing_ok=True)
    folder.rmtree(missing_ok=True)
    for file in files:
        (folder / file).upload(source / file)


def _remove(temporary: Path) -> None:
    for path in temporary.parent.glob(f"{temporary.name}*"):  # Orbax has a temporary folder of its own beside it
        shutil.rmtree(path, ignore_errors=True)


def _is_our_component(folder: Path) -> bool:
    return (folder / "config.json").is_file() and OUR_KEY in read_json(folder / "config.json")


def with_dtype(leaf: jax.ShapeDtypeStruct, dtype) -> jax.ShapeDtypeStruct:
    """Return a leaf in `dtype`, or as it is if that is None."""
    return leaf if dtype is None else jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype))


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object as the files beside weights are written: indented, keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

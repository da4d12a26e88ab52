"""Writing weights: to our own Orbax layout, and back to Wan's and diffusers' layouts.

Every folder is written beside its final name and renamed once it is complete.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from avd_jax.convert import dit_rules, interpolator_rules, orbax_io
from avd_jax.convert.architectures import INTERPOLATOR, WAN_DIT
from avd_jax.convert.engine import Rule, source_shapes, tensors_to_torch
from avd_jax.convert.layouts import OUR_KEY, STUDENT_FILE, read_json, student_settings, training_settings
from avd_jax.convert.loading import open_interpolator_of
from avd_jax.convert.model_card import model_card, scheduler_config
from avd_jax.convert.safetensors_io import write_safetensors
from avd_jax.convert.weights import Weights, open_weights
from avd_jax.errors import UserError
from avd_jax.paths import any_path, is_bucket

LAYOUTS = ("native", "diffusers")
# diffusers' own limit, so that a 1.3B model is one file and a 14B model a few.
MAX_SHARD_BYTES = 10 * 10**9

_STEM = "diffusion_pytorch_model"


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
    with _complete_folder(folder, overwrite=overwrite, ours=_is_our_component) as temporary:
        leaves = {path: _with_dtype(leaf, dtype) for path, leaf in weights.leaves.items()}
        orbax_io.write_leaves(temporary, leaves, lambda path: weights.array(path, dtype))
        _write_json(temporary / "config.json", {OUR_KEY: weights.architecture.record(weights.config)})
        if student is not None:
            _write_json(temporary / STUDENT_FILE, student)


def save_tokenizer(tokenizer, folder: Path, *, overwrite: bool = False) -> None:
    """Write a tokenizer to `folder`; errors as in `save_orbax`."""
    with _complete_folder(
        folder, overwrite=overwrite, ours=lambda path: [child.name for child in path.iterdir()] == ["tokenizer.json"]
    ) as temporary:
        tokenizer.save(temporary)


def export_dit(
    path: str | Path,
    folder: Path,
    *,
    layout: str,
    dtype=None,
    key: str = "generator",
    overwrite: bool = False,
    interpolator_inside: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict | None:
    """Write a transformer as safetensors with its config.json and a model card.

    An interpolator that lies with the transformer comes along, as a folder `interpolator/` of its own: other programs
    know Wan's model by its keys, and take a file with further ones for another.

    Args:
      path: a training run, one of its checkpoints, or weights in any other layout, as for `load_dit`.
      folder: final folder.
      layout: "native" (`WanModel.from_pretrained(folder)`) or "diffusers"
        (`WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")`).
      dtype: None keeps each tensor's.
      key: which network, if there are several, as in `load_dit`.
      overwrite: replace a folder that holds an earlier export and nothing else.
      interpolator_inside: in the native layout, write the interpolator into the same file, under the keys that it has
        in an AVD checkpoint.
      max_shard_bytes: larger weights are split into shards with an index.

    Returns:
      The student's settings, which lie beside the weights too; None for weights of no student.

    Raises:
      UserError: as in `save_orbax`.
    """
    check_writable(folder, overwrite=overwrite, ours=_is_export)
    weights, student = open_weights(path, WAN_DIT, key), student_settings(path)
    native = layout == "native"
    rules = (dit_rules.native_rules if native else dit_rules.diffusers_rules)(weights.config)
    config = (dit_rules.config_to_native if native else dit_rules.config_to_diffusers)(weights.config)
    tensors, stream = _as_torch(weights, rules, dtype)
    interpolator = open_interpolator_of(path, key=key)
    inside = native and interpolator_inside
    if interpolator is not None and inside:
        prefix = interpolator_rules.PREFIX
        more, more_stream = _as_torch(interpolator, interpolator_rules.rules(interpolator.config), dtype)
        tensors |= {prefix + name: leaf for name, leaf in more.items()}
        stream = itertools.chain(stream, ((prefix + name, array) for name, array in more_stream))
    with _complete_folder(folder, overwrite=overwrite, ours=_is_export) as temporary:
        model = temporary if native else temporary / "transformer"
        model.mkdir(parents=True)
        write_safetensors(model, tensors, stream, stem=_STEM, max_shard_bytes=max_shard_bytes)
        _write_json(model / "config.json", config)
        if interpolator is not None and not inside:
            write_interpolator(interpolator, temporary / INTERPOLATOR.component, dtype)
        if student is not None:
            _write_json(temporary / STUDENT_FILE, student)
            if not native:
                (temporary / "scheduler").mkdir()
                _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler_config())
        card = model_card(weights.config, layout=layout, student=student, settings=training_settings(path))
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return student


def write_interpolator(weights: Weights, folder: Path, dtype=None) -> None:
    """Write an interpolator to `folder`, which is made: safetensors under the authors' keys, and config.json."""
    folder.mkdir(parents=True)
    tensors, stream = _as_torch(weights, interpolator_rules.rules(weights.config), dtype)
    write_safetensors(folder, tensors, stream, stem=_STEM, max_shard_bytes=MAX_SHARD_BYTES)
    _write_json(folder / "config.json", interpolator_rules.config_to_json(weights.config))


def _as_torch(weights: Weights, rules: Sequence[Rule], dtype) -> tuple[dict[str, jax.ShapeDtypeStruct], Iterator]:
    """Return PyTorch key -> shape and dtype, and the tensors themselves, one at a time."""
    tensors = {}
    for path, leaf in weights.leaves.items():
        for name, shape in source_shapes(rules, {path: leaf}):
            tensors[name] = _with_dtype(jax.ShapeDtypeStruct(shape, leaf.dtype), dtype)
    return tensors, tensors_to_torch(rules, weights.arrays(dtype))


def check_writable(folder: Path, *, overwrite: bool, ours: Callable[[Path], bool] | None = None) -> None:
    """Raise a UserError if `_complete_folder` would refuse `folder`, before any work is done."""
    folder = any_path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder}: already exists; pass --overwrite to replace it, or choose another folder")
    if ours is not None and not (folder.is_dir() and ours(folder)):
        raise UserError(f"{folder}: not replaced, since it holds other things; remove it, or choose another folder")


@contextlib.contextmanager
def _complete_folder(folder: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
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


def _is_export(folder: Path) -> bool:
    """Whether a folder holds what `export_dit` writes and nothing else, so that replacing it loses nothing."""
    names = {"README.md", "config.json", "transformer", "scheduler", INTERPOLATOR.component, STUDENT_FILE}
    return all(child.name in names or child.name.startswith(f"{_STEM}") for child in folder.iterdir())


def _with_dtype(leaf: jax.ShapeDtypeStruct, dtype) -> jax.ShapeDtypeStruct:
    return leaf if dtype is None else jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

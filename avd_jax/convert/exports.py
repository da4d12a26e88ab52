"""Exports: a transformer in the layouts of Wan's own code, of diffusers and of ComfyUI, or as a LoRA on its teacher."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.convert import comfyui, dit_rules, interpolator_rules
from avd_jax.convert.adapted import student_with, with_adapters
from avd_jax.convert.adapters import named_adapters, spelled
from avd_jax.convert.architectures import INTERPOLATOR, WAN_DIT
from avd_jax.convert.engine import Rule, source_shapes, tensors_to_torch
from avd_jax.convert.extraction import FULL, Extraction, parameters
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.folders import snapshot_of
from avd_jax.convert.hub import fetched
from avd_jax.convert.layouts import STUDENT_FILE, training_settings, training_step
from avd_jax.convert.loading import open_interpolator_of
from avd_jax.convert.model_card import model_card, scheduler_config
from avd_jax.convert.networks import DEFAULT
from avd_jax.convert.on_base import base_path
from avd_jax.convert.safetensors_io import write_safetensors
from avd_jax.convert.saving import MAX_SHARD_BYTES, check_writable, complete_folder, with_dtype, write_json
from avd_jax.convert.weights import Weights, open_weights
from avd_jax.errors import UserError
from avd_jax.models.wan_dit import WAN_1_3B, WAN_14B, WanDiTConfig

LAYOUTS = ("native", "diffusers", "comfyui", "lora")

_STEM = "diffusion_pytorch_model"
_OWN_STEM = "wan2.1_t2v"  # of files that a program's user picks by name
_SIZES = {WAN_1_3B: "_1.3B", WAN_14B: "_14B"}
_COMFYUI = "diffusion_models"
_CARD = "README.md"
_SCHEDULER = "scheduler"
_FOLDERS = (WAN_DIT.component, _SCHEDULER, _COMFYUI, INTERPOLATOR.component)
_FILES = (_CARD, "config.json", "scheduler_config.json", STUDENT_FILE)  # beside those of weights
_WHOLE = 2**63  # bytes: what is one file, whatever its size


def export_dit(
    path: str | Path,
    folder: Path,
    *,
    layout: str,
    dtype=None,
    key: str = "generator",
    lora: str = "",
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
        (`WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")`), or "comfyui", one file.
      dtype: None keeps each tensor's; with "comfyui" it is one of `comfyui.DTYPES`, None the first of them.
      key: which network, if there are several, as in `load_dit`.
      lora: adapters that are merged in, as in `load_dit`.
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
    weights, student = with_adapters(open_weights(path, WAN_DIT, key), lora), student_with(path, lora)
    native, file = layout == "native", ""
    rules = (dit_rules.native_rules if native else dit_rules.diffusers_rules)(weights.config)
    config = (dit_rules.config_to_native if native else dit_rules.config_to_diffusers)(weights.config)
    if layout == "comfyui":
        dtype = dtype or comfyui.DTYPES[0]
        tensors, stream = comfyui.comfyui_tensors(weights, dtype)
        config, max_shard_bytes = dit_rules.config_to_native(weights.config), _WHOLE
        stem = f"{_name(weights.config, student)}_{dtype}"
        file = f"{stem}.safetensors"
    else:
        stem = _STEM
        tensors, stream = _as_torch(weights, rules, dtype)
    interpolator = open_interpolator_of(path, key=key)
    inside = native and interpolator_inside
    if interpolator is not None and inside:
        prefix = interpolator_rules.PREFIX
        more, more_stream = _as_torch(interpolator, interpolator_rules.rules(interpolator.config), dtype)
        tensors |= {prefix + name: leaf for name, leaf in more.items()}
        stream = itertools.chain(stream, ((prefix + name, array) for name, array in more_stream))
    with complete_folder(folder, overwrite=overwrite, ours=_is_export) as temporary:
        model = temporary / {"native": "", "diffusers": WAN_DIT.component, "comfyui": _COMFYUI}[layout]
        model.mkdir(parents=True)
        write_safetensors(model, tensors, stream, stem=stem, max_shard_bytes=max_shard_bytes)
        write_json(model / "config.json", config)
        if interpolator is not None and not inside:
            of_it = None if layout == "comfyui" else dtype  # no program but this one reads it
            write_interpolator(interpolator, temporary / INTERPOLATOR.component, of_it)
        _write_student(student, temporary, of_diffusers=layout == "diffusers")
        about = {"student": student, "settings": training_settings(path), "adapters": _spelled(lora)}
        card = model_card(weights.config, layout=layout, file=file, **about)
        (temporary / _CARD).write_text(card, encoding="utf-8")
    return student


def export_lora(
    path: str | Path,
    folder: Path,
    *,
    rank: int,
    style: str,
    dtype=jnp.bfloat16,
    teacher: str | Path = "",
    key: str = "generator",
    lora: str = "",
    overwrite: bool = False,
) -> tuple[dict | None, dict[str, tuple[float, int]]]:
    """Write a student as a LoRA on its teacher, with a model card (`extraction`).

    Args:
      path, folder, key, lora, overwrite: as in `export_dit`.
      rank: of each pair, or FULL.
      style: one of `adapter_keys.STYLES`.
      dtype: of the tensors.
      teacher: the weights that the student started from, in any layout; "" for those that its training run names.

    Returns:
      The student's settings as `export_dit` returns them, and rank -> what a LoRA of the rank leaves out of the
      difference, as a share of its Frobenius norm, and the bytes that it takes.

    Raises:
      UserError: as in `export_dit`, or `teacher` is another model, or the rank none of its matrices'.
    """
    check_writable(folder, overwrite=overwrite, ours=_is_export)
    weights, student = with_adapters(open_weights(path, WAN_DIT, key), lora), student_with(path, lora)
    settings = training_settings(path)
    extraction = Extraction(weights, _open_teacher(path, teacher, settings), rank=rank, style=style, dtype=dtype)
    named = f"{_name(weights.config, student)}_lora_{'full' if rank == FULL else f'rank{rank}'}"
    rest_name = f"{named}_rest" if extraction.rest else ""
    with complete_folder(folder, overwrite=overwrite, ours=_is_export) as temporary:
        temporary.mkdir(parents=True)
        rest: dict[str, np.ndarray] = {}
        write = {"folder": temporary, "max_shard_bytes": _WHOLE}
        write_safetensors(leaves=extraction.leaves, tensors=extraction.stream(rest), stem=named, **write)
        if rest:
            write_safetensors(leaves=extraction.rest, tensors=rest.items(), stem=rest_name, **write)
        _write_student(student, temporary, of_diffusers=style == "diffusers")
        errors, size = extraction.errors.relative(), np.dtype(dtype).itemsize
        told = {
            "full" if r == FULL else str(r): (error, size * parameters(weights.config, r))
            for r, error in errors.items()
        }
        card = model_card(
            weights.config,
            layout=f"lora, {style}",
            student=student,
            settings=settings,
            adapters=_spelled(lora),
            file=f"{named}.safetensors",
            rest=f"{rest_name}.safetensors",
            errors={name: error for name, (error, _) in told.items()},
        )
        (temporary / _CARD).write_text(card, encoding="utf-8")
    return student, told


def _write_student(student: dict | None, folder: Path, *, of_diffusers: bool) -> None:
    """Write a student's settings, and the scheduler that the model card reads where diffusers samples it."""
    if student is None:
        return
    write_json(folder / STUDENT_FILE, student)
    if of_diffusers:
        (folder / _SCHEDULER).mkdir()
        write_json(folder / _SCHEDULER / "scheduler_config.json", scheduler_config())


def _spelled(lora: str) -> list[str]:
    return spelled((path.name, strength) for path, strength in named_adapters(lora))


def _open_teacher(student: str | Path, named: str | Path, settings: dict | None) -> Weights:
    """Open the weights that a student started from: those that are named, else those that its run names."""
    recorded = (settings or {}).get("config", {})
    if named:
        return open_weights(named, WAN_DIT)
    if not recorded.get("init_from"):
        raise UserError(f"--teacher is missing: {student} does not say which weights the student started from")
    path, base = recorded["init_from"], settings.get("base")
    if base:  # of adapters, which are read over these
        path = base_path(training_step(snapshot_of(fetched(student))).parents[1], base["path"])
    try:
        weights = open_weights(path, WAN_DIT, recorded.get("which") or DEFAULT)
    except UserError as error:
        raise UserError(f"--teacher is missing, and what the run started from is not there: {error}") from None
    began_with = settings.get("inputs", {}).get("init_from")
    if began_with is not None and fingerprint(weights) != began_with:
        raise UserError(f"--teacher is missing, and {path} holds other weights than those that the run started from")
    return weights


def _name(config: WanDiTConfig, student: dict | None) -> str:
    """Return what a file is called without its end, as users pick it from a list."""
    steps = f"_{len(student['timesteps'])}step" if student else ""
    return f"{_OWN_STEM}{_SIZES.get(config, '')}{steps}"


def write_interpolator(weights: Weights, folder: Path, dtype=None) -> None:
    """Write an interpolator to `folder`, which is made: safetensors under the authors' keys, and config.json."""
    folder.mkdir(parents=True)
    tensors, stream = _as_torch(weights, interpolator_rules.rules(weights.config), dtype)
    write_safetensors(folder, tensors, stream, stem=_STEM, max_shard_bytes=MAX_SHARD_BYTES)
    write_json(folder / "config.json", interpolator_rules.config_to_json(weights.config))


def _as_torch(weights: Weights, rules: Sequence[Rule], dtype) -> tuple[dict[str, jax.ShapeDtypeStruct], Iterator]:
    """Return PyTorch key -> shape and dtype, and the tensors themselves, one at a time."""
    tensors = {}
    for path, leaf in weights.leaves.items():
        for name, shape in source_shapes(rules, {path: leaf}):
            tensors[name] = with_dtype(jax.ShapeDtypeStruct(shape, leaf.dtype), dtype)
    return tensors, tensors_to_torch(rules, weights.arrays(dtype))


def _is_export(folder: Path) -> bool:
    """Whether a folder holds what an export writes and nothing else, so that replacing it loses nothing."""
    if not (folder / _CARD).is_file():
        return False
    found = [child for child in folder.iterdir() if child.name not in _FOLDERS]
    for inner in (folder / name for name in _FOLDERS):
        found += inner.iterdir() if inner.is_dir() else ()
    return all(file.name in _FILES or file.name.startswith((_STEM, _OWN_STEM)) for file in found)

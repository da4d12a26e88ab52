"""Names of files and folders, as the programs write them that save, download and keep weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from avd_jax.convert.architectures import UMT5, WAN_DIT, WAN_VAE, Architecture
from avd_jax.convert.files import GGUF, LORA, PICKLED, SAFETENSORS, check_complete, open_file
from avd_jax.convert.networks import holds
from avd_jax.errors import UserError

# diffusers' stem, and the two of transformers.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
# `STEM.fp16.safetensors`, of a variant; those that come first are preferred.
_VARIANTS = ("", "fp32", "bf16", "fp16")
_SUFFIXES = ("safetensors", "bin")
_WHOLE = re.compile(r"(?P<stem>\w+?)(\.(?P<variant>\w+))?\.(?P<suffix>safetensors|bin)")
_INDEX = re.compile(r"(?P<stem>\w+?)\.(?P<suffix>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
_SHARD = re.compile(
    r"(?P<stem>\w+?)(\.(?P<variant>\w+))?-(?P<number>\d+)-of-(?P<count>\d+)(\.(?P<variant2>\w+))?"
    r"\.(?P<suffix>safetensors|bin)"
)

# ComfyUI's folders, in which files have any name.
_COMFY = {WAN_DIT: ("diffusion_models", "unet"), UMT5: ("text_encoders", "clip"), WAN_VAE: ("vae",)}

# Wan2.2 A14B: the folders and files of its two experts, and what is not a model by itself.
_EXPERTS = ("high_noise_model", "low_noise_model")
_EXPERT_FILE = re.compile(r"(high|low)[-_. ]?noise", re.IGNORECASE)
_ADAPTERS = ("adapter_config.json", "adapter_model*", "pytorch_lora_weights*", "*.lora.safetensors")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of weights that lie in a folder under one of the usual names: one, an index, or all shards.

    Safetensors go before .bin, whole files before shards, the plain name before variants such as `.fp16.`.

    Raises:
      UserError: a shard is missing, or a file is an incomplete download.
    """
    found: dict[tuple, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        for kind, pattern in enumerate((_WHOLE, _INDEX, _SHARD)):
            match = pattern.fullmatch(path.name)
            if match is None or match["stem"] not in _STEMS:
                continue
            variant = match["variant"] or match.groupdict().get("variant2") or ""
            preferred = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
            order = (_STEMS.index(match["stem"]), _SUFFIXES.index(match["suffix"]), preferred, variant, kind)
            found.setdefault(order, []).append(path)
            break
    if not found:
        return ()
    order = min(found)
    for path in found[order]:
        check_complete(path)
    if order[-1] == 2:
        _check_shards(found[order])
    return tuple(found[order])


def comfy_files(path: Path, architecture: Architecture) -> tuple[Path, ...]:
    """Return the file of a network in ComfyUI's folders `diffusion_models/`, `text_encoders/` and `vae/` at `path`.

    Raises:
      UserError: several files hold such a network.
    """
    for name in _COMFY.get(architecture, ()):
        folder = path / name
        if not folder.is_dir():
            continue
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SAFETENSORS + PICKLED]
        if len(files) > 1:
            files = [file for file in files if holds(open_file(file), architecture)]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{folder}: several files hold a {architecture.label}: {names}; name one of them itself")
        if files:
            check_one_expert(files[0])
            return tuple(files)
    return ()


def snapshot_of(path: Path) -> Path:
    """Return the snapshot that a model's folder of the hub's cache holds, `models--ORG--NAME`; another path as it is.

    Raises:
      UserError: `refs/main` names a snapshot that is not there, or there are several and no `refs/main`.
    """
    model = path.parent if path.name == "snapshots" else path
    snapshots = model / "snapshots"
    if not snapshots.is_dir() or not ((model / "refs").is_dir() or (model / "blobs").is_dir()):
        return path
    main = model / "refs" / "main"
    if main.is_file():
        snapshot = snapshots / main.read_text(encoding="utf-8").strip()
        if not snapshot.is_dir():
            raise UserError(f"{model}: the download is incomplete: {snapshot} is not there; download it again")
        return snapshot
    there = sorted(child for child in snapshots.iterdir() if child.is_dir())
    if len(there) != 1:
        names = ", ".join(child.name for child in there) or "none"
        raise UserError(f"{model}: refs/main names no snapshot, and there are {names}; name the folder of one")
    return there[0]


def check_one_expert(path: Path) -> None:
    """Raise a UserError if `path` is Wan2.2 A14B or a part of it: one transformer for high noise and one for low."""
    folder = path.parent if path.is_file() else path
    parts = {WAN_DIT.component, f"{WAN_DIT.component}_2", *_EXPERTS}
    places = [folder, folder.parent] if folder.name in parts else [folder]
    named = folder.name in _EXPERTS or (path.is_file() and _EXPERT_FILE.search(path.name))
    if named or any(_has_experts(place) for place in places):
        raise UserError(
            f"{path}: is of Wan2.2 A14B, which has two experts, for high and for low noise; Wan2.1 is what is "
            "supported: give its text-to-video weights, 1.3B or 14B"
        )


def check_nothing_else(folder: Path, architecture: Architecture) -> None:
    """Raise a UserError if what lies in a folder, instead of a network's weights, says why they are not there.

    Args:
      folder: in which no weights were found.
      architecture: the network that is wanted; a file is taken for umT5's if its name says so.
    """
    if architecture not in (WAN_DIT, UMT5):
        return
    part = "t5" if architecture is UMT5 else ""
    for file in sorted(file for pattern in _ADAPTERS for file in folder.glob(pattern) if part in file.name.lower()):
        raise UserError(f"{file}: is a LoRA, which changes a model and is none; {LORA}")
    for file in sorted(file for file in folder.iterdir() if part in file.name.lower() and not file.is_dir()):
        if file.suffix.lower() == ".gguf":
            raise UserError(f"{file}: {GGUF}")
        check_complete(file)
    unfinished = [*folder.glob(".cache/huggingface/download/**/*.incomplete")]
    if folder.parent.name == "snapshots":
        unfinished += folder.parent.parent.glob("blobs/*.incomplete")
    if unfinished and not part:
        raise UserError(f"{folder}: the download is incomplete: there is {min(unfinished)}; complete the download")


def _has_experts(folder: Path) -> bool:
    index = folder / "model_index.json"
    if index.is_file():
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        if isinstance(entries, Mapping):
            second = entries.get(f"{WAN_DIT.component}_2")
            if any(second) if isinstance(second, list) else second:
                return True
            if entries.get("boundary_ratio") is not None:
                return True
            if second is not None:
                return False  # [null, null]: a newer diffusers says that there is none
    second_folder = folder / f"{WAN_DIT.component}_2"
    experts = any((folder / name).is_dir() for name in _EXPERTS)
    return experts or (second_folder.is_dir() and any(second_folder.iterdir()))


def _check_shards(shards: list[Path]) -> None:
    match = _SHARD.fullmatch(shards[0].name)
    count, width = int(match["count"]), len(match["number"])
    for i in range(1, count + 1):
        start, end = match.span("number")
        name = f"{shards[0].name[:start]}{i:0{width}d}{shards[0].name[end:]}"
        if not (shards[0].parent / name).is_file():
            raise UserError(
                f"{shards[0].parent / name}: this shard is missing beside {shards[0].name}; download it again"
            )

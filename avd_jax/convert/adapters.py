"""Files of adapters: low-rank changes of a transformer's matrices, and whole changes of its other parameters.

A change is `alpha / rank * up @ down` (LoRA, arXiv 2106.09685), or a difference as it is: `.diff` of a weight,
`.diff_b` of a bias. Everything is checked when a file is opened, by key and shape; tensors are read when merged.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from avd_jax.convert.adapter_keys import Spelling, Target, module_of, recognise, targets, unknown
from avd_jax.convert.files import SAFETENSORS, Stored, check_complete, open_file, tensors_of
from avd_jax.convert.safetensors_io import SafetensorsFile
from avd_jax.errors import UserError, closest
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.paths import any_path

# What of a change a key holds -> how programs end the key; PEFT puts the adapter's own name in between.
_ENDS = {
    "down": r"(\.lora_down|\.lora_A(\.\w+)?|[._]lora(_linear_layer)?\.down)\.weight",
    "up": r"(\.lora_up|\.lora_B(\.\w+)?|[._]lora(_linear_layer)?\.up)\.weight",
    "up_bias": r"\.(lora_up|lora_B(\.\w+)?)\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",  # lightx2v's, of the modulation
}
_END = re.compile("|".join(f"(?P<{kind}>{end})$" for kind, end in _ENDS.items()))
_NO_LORA = re.compile(r"(hada|lokr|oft)_|dora_scale|magnitude_vector|lora_mid|\.(a1|a2|b1|b2)\.weight$|boft|vera_")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)  # not 1_0, nor nan
_MOST = 1e30  # a strength is less, so that it is a float32
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclasses.dataclass(frozen=True)
class Change:
    """What a file changes of one parameter.

    Attributes:
      target: the parameter.
      whole: its difference; None for a low-rank one.
      down, up: the factors of a low-rank one, [rank, in...] and [out, rank...].
      scale: what their product is multiplied with.
    """

    target: Target
    whole: Stored | None = None
    down: Stored | None = None
    up: Stored | None = None
    scale: float = 1.0

    def read(self) -> np.ndarray:
        """Return the difference, float32 in PyTorch's layout; raises a UserError if it is not finite."""
        if self.whole is not None:
            change, stored = _read(self.whole).reshape(self.target.shape), self.whole
        else:
            up, down = _read(self.up), _read(self.down)
            change = (up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)).reshape(self.target.shape)
            change, stored = np.float32(self.scale) * change, self.up
        if not np.isfinite(change).all():
            raise UserError(f"{stored.file.path}: {stored.key} is not finite; the adapter is damaged")
        return change


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One opened adapter.

    Attributes:
      path: as the user named it.
      strength: what all its changes are multiplied with.
      changes: Wan's own key -> change.
      files: that hold the tensors.
    """

    path: Path
    strength: float
    changes: Mapping[str, Change]
    files: tuple[Path, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short text that identifies what it changes: its files' bytes and its strength."""
        digest = hashlib.sha256(repr(float(self.strength)).encode())
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()[:16]


def named_adapters(text: str) -> list[tuple[Path, float]]:
    """Return path and strength of each adapter that a flag or a field names: `FILE[:STRENGTH]`, separated by commas.

    Raises:
      UserError: a strength that is no finite number, or a path that can be none.
    """
    found = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        path, colon, strength = part.rpartition(":")
        if not colon or not path or "/" in strength or strength.endswith(SAFETENSORS):
            path, strength = part, "1"
        number = float(strength) if _NUMBER.fullmatch(strength) else math.nan
        if not abs(number) < _MOST:
            raise UserError(f"{part}: the strength {strength!r} is no number; write FILE:0.8, or FILE alone for 1")
        found.append((any_path(path), number))
    return found


def spelled(adapters: Iterable[tuple[str | Path, float]]) -> list[str]:
    """Return adapters in the words of `named_adapters`, each `FILE:STRENGTH`, of which it reads the same strength."""
    return [f"{path}:{repr(float(strength)).removesuffix('.0')}" for path, strength in adapters]


def open_adapter(path: Path, strength: float, config: WanDiTConfig) -> Adapter:
    """Open an adapter for a transformer of these sizes, checking every key and shape but reading no tensor.

    Args:
      path: one .safetensors file, or a folder whose .safetensors files belong together, as an export writes them.
      strength: what all changes are multiplied with.
      config: sizes of the transformer.

    Raises:
      UserError: one line that names the file and the key.
    """
    files = _files(path)
    opened = [open_file(file) for file in files]
    tensors = tensors_of(opened)
    if not tensors:
        raise UserError(f"{path}: holds no tensor; give a LoRA")
    parts, spellings = _parts(tensors, config, str(path))
    if len(spellings) > 1:
        (one, first), (other, second) = list(spellings.items())[:2]
        raise UserError(
            f"{path}: mixes key styles, {one}: {first}, and {other}: {second}; give a file with keys of one style"
        )
    scale = _scale_of_all(opened)
    changes = {}
    for module, found in parts.items():
        changes |= _changes_of(module, found, config, str(path), scale)
    return Adapter(path, strength, changes, files)


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        if path.suffix.lower() not in SAFETENSORS:
            raise UserError(f"{path}: is no .safetensors file, the only form in which adapters are read")
        return (path,)
    if path.is_dir():
        files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in SAFETENSORS))
        if not files:
            raise UserError(f"{path}: holds no .safetensors file; name the LoRA itself")
        for file in files:
            check_complete(file)
        return files
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(
        f"{path}: no such LoRA{closest(path.name, siblings)}; write FILE:STRENGTH or FILE, several separated by commas"
    )


def _parts(
    tensors: Mapping[str, Stored], config: WanDiTConfig, name: str
) -> tuple[dict[str, dict[str, Stored]], dict[Spelling, str]]:
    """Return Wan's module (or parameter) -> what of a change -> tensor, and each spelling with a key that has it."""
    parts: dict[str, dict[str, Stored]] = {}
    spellings: dict[Spelling, str] = {}
    for key, tensor in tensors.items():
        end = _END.search(key)
        if end is None:
            if _NO_LORA.search(key):
                raise UserError(
                    f"{name}: {key} is of another kind of adapter; known are LoRA (up and down, A and B), .diff and "
                    ".diff_b"
                )
            raise UserError(f"{name}: {key} is no part of a LoRA; give a LoRA, or the whole model as --checkpoint")
        base, kind = key[: end.start()], end.lastgroup
        if kind == "diff_m":
            base, kind = f"{base}{'_' if base.startswith('lora_') else '.'}modulation", "diff"
        found = recognise(base, config)
        if found is None:
            raise unknown(name, key, base, config)
        spelling, module, whole = found
        if spelling is not None:
            spellings.setdefault(spelling, key)
        if tensor.stored_dtype.kind in "iub" and kind != "alpha":
            raise UserError(f"{name}: {key} is {tensor.stored_dtype}; get the LoRA as bf16, fp16 or fp32")
        own = parts.setdefault(whole if kind == "diff" and whole else module, {})
        if kind in own:
            raise UserError(f"{name}: {key} and {own[kind].key} say the same; keep one")
        own[kind] = tensor
    return parts, spellings


def _changes_of(
    module: str, found: Mapping[str, Stored], config: WanDiTConfig, name: str, scale_of_all
) -> dict[str, Change]:
    known = targets(config)
    changes = {}

    def target_of(key: str, part: Stored) -> Target:
        if key not in known:
            raise UserError(f"{name}: {part.key} changes {key}, which this model does not have; is it another model's?")
        return known[key]

    down, up = found.get("down"), found.get("up")
    if (down is None) != (up is None):
        there, missing = (down, "up") if up is None else (up, "down")
        raise UserError(f"{name}: {there.key} has no {missing} matrix beside it; the file is incomplete")
    if down is None and "alpha" in found:
        raise UserError(f"{name}: {found['alpha'].key} has no matrices beside it; the file is incomplete")
    if down is not None:
        target = target_of(f"{module}.weight", down)
        _check_pair(target, down, up, name)
        rank = down.shape[0]
        scale = scale_of_all(module, rank)
        if "alpha" in found:
            if math.prod(found["alpha"].shape) != 1:
                raise UserError(f"{name}: {found['alpha'].key} has shape {found['alpha'].shape}; it must be one number")
            scale = _read(found["alpha"]).item() / rank
        changes[target.key] = Change(target, down=down, up=up, scale=scale)
    for kind, end in (("diff", ".weight"), ("diff_b", ".bias"), ("up_bias", ".bias")):
        part = found.get(kind)
        if part is None:
            continue
        whole = module if kind == "diff" and module in known else module_of(module) + end
        target = target_of(whole, part)
        if target.key in changes:
            raise UserError(f"{name}: {part.key} is a second change of {target.key}; keep one")
        if math.prod(part.shape) != math.prod(target.shape) or len(part.shape) > len(target.shape):
            raise UserError(_misshapen(name, part, target, target.shape))
        changes[target.key] = Change(target, whole=part)
    return changes


def _check_pair(target: Target, down: Stored, up: Stored, name: str) -> None:
    if len(target.shape) < 2:
        raise UserError(f"{name}: {down.key} is a low-rank change of {target.key}, which is no matrix")
    rank = down.shape[0] if down.shape else 1
    if not rank:
        raise UserError(f"{name}: {down.key} has shape {down.shape}, a rank of 0; get the LoRA again")
    if math.prod(down.shape[1:]) != math.prod(target.shape[1:]) or len(down.shape) < 2:
        raise UserError(_misshapen(name, down, target, (rank, *target.shape[1:])))
    if not up.shape or up.shape[0] != target.shape[0]:
        raise UserError(_misshapen(name, up, target, (target.shape[0], rank)))
    if math.prod(up.shape[1:]) != rank:
        raise UserError(f"{name}: {up.key} has shape {up.shape}, which is not of the rank {rank} of {down.key}")


def _misshapen(name: str, part: Stored, target: Target, expected: tuple[int, ...]) -> str:
    return (
        f"{name}: is a LoRA of another model: {part.key} has shape {part.shape}, this model's {target.key} wants "
        f"{expected}"
    )


def _read(tensor: Stored) -> np.ndarray:
    return tensor.read(may_be_zero=True).astype(np.float32)


def _scale_of_all(opened: list[SafetensorsFile]):
    """Return (module, rank) -> the scale of pairs that have no alpha of their own: by PEFT's settings, else 1."""
    settings = {}
    for file in opened:
        beside = file.path.with_name(_PEFT_CONFIG)
        text, name = file.metadata.get(_DIFFUSERS_METADATA), f"{file.path}: {_DIFFUSERS_METADATA}"
        if text is None and beside.is_file() and file.path.name.startswith("adapter_model"):
            text, name = beside.read_bytes(), str(beside)
        if text is None:
            continue
        try:
            entries = json.loads(text)
            settings |= {key.removeprefix("transformer."): value for key, value in entries.items()}
            alpha, rooted = float(settings.get("lora_alpha", 0)), bool(settings.get("use_rslora"))
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{name}: no settings of a LoRA; restore the file") from None
        if settings.get("use_dora"):
            raise UserError(f"{name}: use_dora is set; known are plain LoRAs")
        if settings.get("alpha_pattern"):
            raise UserError(f"{name}: alpha_pattern is set; save the LoRA with an alpha beside each pair instead")
        if alpha:
            return lambda module, rank: alpha / (math.sqrt(rank) if rooted else rank)
    return lambda module, rank: 1.0

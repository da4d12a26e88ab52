"""Where in a folder the weights of a component lie, in every layout that users have."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from avd_jax.convert.architectures import INTERPOLATOR, UMT5, WAN_DIT, Architecture
from avd_jax.convert.files import NotHereError, check_complete
from avd_jax.convert.folders import check_nothing_else, check_one_expert, comfy_files, snapshot_of, weight_files
from avd_jax.convert.hub import fetched
from avd_jax.convert.interpolator_rules import CLASS_NAME as INTERPOLATOR_CLASS
from avd_jax.errors import UserError, closest

# The component's record in the config.json of our own layout is under this key.
OUR_KEY = "avd_jax"
STUDENT_FILE = "avd_student.json"

# What a step's folder holds whatever was trained, in checkpoints of this format or of the one before it.
_STEP_ITEMS = ("progress", "generator")

_NATIVE_NAMES = {
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
}
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_EXPECTED = {
    "transformer": "config.json with diffusion_pytorch_model*.safetensors (Wan's folder), transformer/ (diffusers' or "
    "ours), model.pt (AVD), or checkpoints/ (a training run)",
    "vae": "Wan2.1_VAE.pth (Wan's folder) or vae/ (diffusers' or ours)",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth (Wan's folder) or text_encoder/ (diffusers' or ours)",
    "interpolator": "interpolator/ (diffusers' or ours), model.pt (AVD), an export of a student that has one, or "
    "checkpoints/ (a training run of one)",
    "tokenizer": "google/umt5-xxl/ (Wan's folder) or tokenizer/ (diffusers' or ours)",
}


@dataclasses.dataclass(frozen=True)
class TorchFiles:
    """Weights with PyTorch's keys.

    Attributes:
      files: .safetensors, .bin or .pth files, or one index of shards.
      config: the config.json beside them, if any.
      single: the user named the file itself, so that the config.json beside it may be another model's.
    """

    files: tuple[Path, ...]
    config: Path | None
    single: bool


@dataclasses.dataclass(frozen=True)
class OrbaxTree:
    """Weights in an Orbax checkpoint of ours.

    Attributes:
      folder: the PyTree.
      record: name and sizes of the network, as `Architecture.record` gives them.
      source: the file that the record was read from, for messages.
      several_networks: whether the folder is an item of a training checkpoint.
      adapters: what the run recorded of its adapters (`convert/on_base.py`), if the folder has these alone.
    """

    folder: Path
    record: Any
    source: Path
    several_networks: bool
    adapters: dict | None = None


def find_weights(path: Path, architecture: Architecture, key: str) -> TorchFiles | OrbaxTree:
    """Find the weights of one network at `path`.

    Args:
      path: file or folder in any of the layouts.
      architecture: the network that is wanted.
      key: for training checkpoints: "generator", "ema" or "critic".

    Raises:
      UserError: nothing there; says what is expected and what is closest. Or it is Wan2.2, of which one part alone
        makes no video.
    """
    path = snapshot_of(path)
    check_one_expert(path)
    if path.is_file():
        config = path.parent / "config.json"
        return TorchFiles((path,), config if config.is_file() else None, single=True)
    _check_folder(path)
    found = _in_folder(path, architecture, key)
    if found is None:

        def within(folder):
            return _in_folder(snapshot_of(folder), architecture, key)

        for folder in (path / architecture.component, path):
            if folder.is_dir():
                check_nothing_else(folder, architecture)
        raise NotHereError(_not_found(path, architecture.component, within))
    return found


def find_tokenizer(path: Path) -> Path:
    """Return the folder of the tokenizer at `path`; raises UserError if there is none."""
    path = snapshot_of(path)
    check_one_expert(path)
    if path.is_file():
        if path.name not in _TOKENIZER_FILES:
            raise NotHereError(f"{path}: no tokenizer; give a folder of weights, or {_TOKENIZER_FILES[0]}")
        return path.parent
    _check_folder(path)
    found = _tokenizer_in(path)
    if found is None:
        raise NotHereError(_not_found(path, "tokenizer", _tokenizer_in))
    for name in _TOKENIZER_FILES:
        check_complete(found / name)
    return found


def student_settings(path: str | Path) -> dict | None:
    """Return how a student was trained to be sampled: timesteps, shift, guidance_scale, num_steps.

    With `fewer_steps` the first few of the timesteps serve too.

    Args:
      path: a training run or checkpoint, an exported student, or converted weights that keep its settings.

    Returns:
      The settings, or None for weights that are no student's.
    """
    path = snapshot_of(fetched(path))
    folder = path.parent if path.is_file() else path
    folders = [folder, folder / WAN_DIT.component]
    if folder.name == WAN_DIT.component:
        folders.append(folder.parent)
    for candidate in folders:
        if (candidate / STUDENT_FILE).is_file():
            return read_json(candidate / STUDENT_FILE)
    if path.is_dir() and (step := training_step(path)) is not None:
        return read_json(step / "meta" / "metadata").get("student")
    return None


def training_settings(path: str | Path) -> dict | None:
    """Return what a training checkpoint records of its run, beside architecture and student; None for other weights."""
    path = snapshot_of(fetched(path))
    if not path.is_dir() or (step := training_step(path)) is None:
        return None
    meta = read_json(step / "meta" / "metadata")
    settings = {name: value for name, value in meta.items() if name not in ("architecture", "student")}
    run = step.parent.parent / "config.json"
    return settings | ({"config": read_json(run)} if run.is_file() else {})


def training_step(path: Path) -> Path | None:
    """Return the step folder of a training run, of its checkpoints/ or of one step; None if `path` is none.

    Of several steps it is the latest, but for what a killed process left half-written.

    Raises:
      UserError: it looks like one, but no step is complete, or the latest is damaged.
    """
    if (path / "meta").is_dir() or (path.name.isdigit() and any((path / item).is_dir() for item in _STEP_ITEMS)):
        if not (path / "meta" / "metadata").is_file():
            raise UserError(f"{path}: this checkpoint is incomplete (no meta/metadata); use another step")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = [child.name for child in folder.iterdir() if re.match(r"\d+(\.orbax-checkpoint-tmp.*)?$", child.name)]
    if not names:
        if folder != path:
            raise UserError(f"{folder}: no checkpoint has been saved here yet")
        return None
    steps = sorted(int(step) for step in ocp.utils.checkpoint_steps(folder.absolute()))
    if not steps:
        raise UserError(f"{folder}: no complete checkpoint; found {', '.join(sorted(names))}")
    latest = folder / str(steps[-1])
    if not (latest / "meta" / "metadata").is_file():
        raise UserError(f"{latest}: this checkpoint is incomplete (no meta/metadata); remove it, or name another step")
    return latest


def read_json(path: Path) -> dict:
    """Read a JSON object; raises UserError for a file that is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({' '.join(str(error).split())}); correct it or download it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _in_folder(path: Path, architecture: Architecture, key: str) -> TorchFiles | OrbaxTree | None:
    for folder in (path / architecture.component, path):
        if (folder / "config.json").is_file() and OUR_KEY in (entries := read_json(folder / "config.json")):
            return OrbaxTree(folder, entries[OUR_KEY], folder / "config.json", several_networks=False)
        if (folder / "_METADATA").is_file() and not (folder.parent / "meta").is_dir():
            raise UserError(f"{folder}: an Orbax checkpoint without its config.json; convert the weights again")
    for folder in (path / architecture.component, path):
        if folder.is_dir() and (folder != path or _is_own_folder(path, architecture)):
            files = weight_files(folder)
            if files:
                config = folder / "config.json"
                return TorchFiles(files, config if config.is_file() else None, single=False)
    if files := comfy_files(path, architecture):
        config = files[0].with_name("config.json")
        return TorchFiles(files, config if config.is_file() else None, single=True)
    if architecture.component in _NATIVE_NAMES:
        for suffix in (".safetensors", ".pth"):
            file = path / (_NATIVE_NAMES[architecture.component] + suffix)
            if file.is_file():
                return TorchFiles((file,), None, single=False)
    if architecture in (WAN_DIT, INTERPOLATOR) and (step := training_step(path)) is not None:
        return _in_training_run(step, architecture, key)
    if architecture is WAN_DIT and (path / "model.pt").is_file():
        config = path / "config.json"
        return TorchFiles((path / "model.pt",), config if config.is_file() else None, single=False)
    if architecture is INTERPOLATOR and (files := _student_files(path)):
        return TorchFiles(files, None, single=False)
    return None


def _in_training_run(step: Path, architecture: Architecture, key: str) -> TorchFiles | OrbaxTree | None:
    """Find what a checkpoint holds; an interpolator is trained in a run of its own, or lies in its student's run."""
    if architecture is WAN_DIT or _record(step).get("name") == INTERPOLATOR.name:
        return _checkpoint_item(step, key)
    folder = step.parent.parent / INTERPOLATOR.component
    return _in_folder(folder, INTERPOLATOR, key) if folder.is_dir() else None


def _student_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a student in AVD's or Wan's own layout, in which an interpolator may lie too."""
    if (path / "model.pt").is_file():
        return (path / "model.pt",)
    config = path / "config.json"
    native = config.is_file() and read_json(config).get("_class_name") == "WanModel"
    return weight_files(path) if native else ()


def _is_own_folder(path: Path, architecture: Architecture) -> bool:
    """Whether weights lying in `path` itself are this component's, and not another's: its config.json says so."""
    config = path / "config.json"
    if not config.is_file():
        return architecture is WAN_DIT  # Wan's folder holds the transformer; other files have names of their own
    entries = read_json(config)
    if entries.get("_class_name") == "AutoencoderKLWan":
        return architecture.component == "vae"
    if entries.get("_class_name") == INTERPOLATOR_CLASS:
        return architecture is INTERPOLATOR
    if "d_model" in entries or str(entries.get("model_type", "")).endswith("t5"):
        return architecture is UMT5
    return architecture is WAN_DIT


def _checkpoint_item(step: Path, key: str) -> OrbaxTree:
    items = sorted(child.name for child in step.iterdir() if (child / "_METADATA").is_file())
    meta = read_json(step / "meta" / "metadata")
    item = _checkpoint_items(meta.get("main")).get(key, key)
    if item not in items:
        raise UserError(f"{step}: holds no {key!r}, but {', '.join(items) or 'nothing'}{closest(key, items)}")
    try:
        adapters = (meta.get("architecture") or {}).get("adapters")
        if adapters is not None:
            inputs, own = meta["inputs"], item.removesuffix("_ema") in adapters["networks"]
            prints = {"fingerprint": inputs["init_from"], "lora_fingerprint": inputs.get("init_lora")}
            adapters = adapters | meta["base"] | prints if own else None
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{step / 'meta' / 'metadata'}: does not say over which weights its adapters are; use another step"
        ) from None
    return OrbaxTree(step / item, _record(step), step / "meta" / "metadata", several_networks=True, adapters=adapters)


def _checkpoint_items(main: str | None) -> dict[str, str]:
    """Return what a user asks for by key -> the item that stores it.

    Args:
      main: the network that the run was for; None in checkpoints from before there were others than the generator.
    """
    items = {"generator": "generator", "ema": "ema"} if main is None else {"generator": main, "ema": f"{main}_ema"}
    return items | {"critic": "fake_score", "fake_score": "fake_score"}


def _record(step: Path) -> Any:
    return read_json(step / "meta" / "metadata").get("architecture")


def _tokenizer_in(path: Path) -> Path | None:
    for folder in (path, path / "tokenizer", path / "google" / "umt5-xxl"):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return folder
    return None


def _check_folder(path: Path) -> None:
    if path.is_dir():
        return
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{path}: no such file or folder{closest(path.name, siblings)}")


def _not_found(path: Path, component: str, find) -> str:
    names = sorted(child.name for child in path.iterdir())
    for child in sorted(path.iterdir()):
        try:
            if child.is_dir() and find(child) is not None:
                return f"{path}: no {component} here (did you mean {str(child)!r}?)"
        except UserError:
            continue  # a damaged neighbour is not what was asked about
    expected = ["config.json", component, "checkpoints", "model.pt", *_NATIVE_NAMES.values()]
    hint = next((close for name in names if (close := closest(name, expected)) and name not in expected), "")
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    return f"{path}: no {component} here; expected {_EXPECTED[component]}; found {listed}{hint}"

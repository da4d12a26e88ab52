"""The models that score videos, found in a user's folder by their keys and shapes, whatever their files are called.

So a folder may be VBench's `~/.cache/vbench` as it is, with files of its other models in it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from avd_jax.convert.aesthetic_head import AestheticHead, load_aesthetic_head
from avd_jax.convert.files import PICKLED, SAFETENSORS, NotHereError
from avd_jax.convert.folders import snapshot_of, weight_files
from avd_jax.convert.loading import open_raft, open_vit
from avd_jax.convert.weights import Weights
from avd_jax.errors import UserError
from avd_jax.models.vit import VIT_MODELS, ViTConfig
from avd_jax.paths import any_path

DEPTH = 2  # of the folders that are looked into, as VBench's ~/.cache/vbench has them
# What the files of these models are called, and those of VBench's other models are not.
_LIKE_OURS = re.compile(r"vit[-_.]?[bl]|dino|clip|aesthetic|linear", re.IGNORECASE)
# RAFT's authors trained the same network on several sets of videos; only the name tells which.
_RAFT_THINGS = re.compile(r"raft.*things", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
      vits: name of a known model -> its weights, of the first file that holds it.
      heads: aesthetic heads.
      others: "FILE is a MODEL", of vision transformers that are none of the known ones.
      damaged: errors of files that look like one of these models by their names.
    """

    vits: dict[str, Weights]
    heads: list[AestheticHead]
    others: list[str]
    damaged: list[UserError]


def find(folder: Path, known: Mapping[str, ViTConfig] | None = None) -> Found:
    """Return the vision transformers and aesthetic heads in a folder and the folders within; no array is read.

    Args:
      folder: where to look.
      known: name -> sizes of the models that are looked for; by default all of VIT_MODELS.
    """
    known = VIT_MODELS if known is None else known
    found = Found({}, [], [], [])
    for path in _candidates(folder):
        try:
            try:
                found.heads.append(load_aesthetic_head(path))
            except NotHereError:
                weights = open_vit(path)
                name = _name(weights.config, known)
                if name in known:
                    found.vits.setdefault(name, weights)
                else:
                    found.others.append(f"{path.relative_to(folder)} is a {name}")
        except NotHereError:
            continue
        except UserError as error:
            if path.is_dir() or _LIKE_OURS.search(path.name):
                found.damaged.append(error)
    return found


def find_raft(folder: Path) -> Weights | None:
    """Return RAFT's weights of the name `raft-things` in a folder and the folders within, or None.

    Raises:
      UserError: there is a file of this name, and it is damaged or holds something else.
    """
    path = next((path for path in _candidates(folder) if _RAFT_THINGS.search(path.name)), None)
    return None if path is None else open_raft(path)


def checked_folder(folder: str | Path) -> Path:
    """Return the path of a folder of models (UserError if there is none)."""
    folder = any_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it is where the weights of CLIP, DINO and the aesthetic head lie")
    return folder


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield what may hold a model: folders with files of transformers' names, and files with other names."""
    for place in _places(folder, DEPTH):
        named = weight_files(place)
        if named:
            yield place
        for path in sorted(place.iterdir()):
            same = path.name.startswith(("model.", "model-", "pytorch_model"))  # the same weights in another format
            if path.suffix.lower() in SAFETENSORS + PICKLED and path.is_file() and not (named and same):
                yield path


def _places(folder: Path, depth: int) -> Iterator[Path]:
    """Yield a folder and those in it; of a model in the hub's cache only its snapshot."""
    snapshot = snapshot_of(folder)
    yield snapshot
    if depth and snapshot == folder:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _places(child, depth - 1)


def _name(config: ViTConfig, known: Mapping[str, ViTConfig]) -> str:
    for name, one in known.items():
        if dataclasses.replace(config, eps=one.eps) == one:
            return name
    kind = "CLIP" if config.clip else "DINO"
    return (
        f"{kind} of width {config.dim} with {config.num_layers} layers, patches of {config.patch_size} pixels, "
        f"{config.activation}, for {config.image_size} pixels"
    )

"""The public loaders: a path in any layout -> a module with its weights."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from avd_jax.convert.adapted import with_adapters
from avd_jax.convert.architectures import (
    ARCHITECTURES,
    INTERPOLATOR,
    RAFT,
    SCORING,
    UMT5,
    VISION,
    WAN_DIT,
    WAN_VAE,
)
from avd_jax.convert.files import NotHereError, Stored, open_files, tensors_of
from avd_jax.convert.folders import snapshot_of, weight_files
from avd_jax.convert.hub import fetched
from avd_jax.convert.layouts import TorchFiles, find_tokenizer, find_weights
from avd_jax.convert.networks import DEFAULT, most_like
from avd_jax.convert.spiece import tokenizer_json
from avd_jax.convert.vit_rules import what_else
from avd_jax.convert.weights import Sharding, TorchWeights, Weights, load_module, lossless_dtype, open_weights

# The one import from data/: a tokenizer comes with the weights, and its file imports nothing else of ours.
from avd_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from avd_jax.errors import UserError, closest
from avd_jax.models.interpolator import Interpolator
from avd_jax.models.raft import RAFT as RAFTModule
from avd_jax.models.umt5 import UMT5Encoder
from avd_jax.models.vit import VisionTransformer
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.models.wan_vae import WanVAE
from avd_jax.paths import any_path


def load_dit(
    path: str | Path,
    dtype=jnp.float32,
    key: str = DEFAULT,
    *,
    lora: str = "",
    remat: str = "none",
    sharding: Sharding | None = None,
) -> WanDiT:
    """Load a diffusion transformer.

    Args:
      path: Wan's folder, a diffusers folder, one .safetensors or .pth file, an AVD checkpoint (`model.pt`), our own
        Orbax folder, or a training run (its latest checkpoint) or one of its checkpoints.
      dtype: of the stored parameters and of the computation.
      key: which network, if there are several: its name in the file, or "generator", "ema" or "critic" of a training
        run. By default the generator, or the only one there, whatever its name.
      lora: adapters that are merged in, `FILE[:STRENGTH]` separated by commas (docs/adapters.md).
      remat: what the backward pass keeps, see `WanDiT`.
      sharding: `(dotted path, shape) -> jax.sharding.Sharding`; each process then reads leaf by leaf what its own
        devices hold. Default: whole on the default device.

    Raises:
      UserError: one line that names the file, key or field, and what to do.
    """
    return load_module(with_adapters(open_weights(path, WAN_DIT, key), lora), dtype, sharding, remat=remat)


def dit_config(path: str | Path, key: str = DEFAULT) -> WanDiTConfig:
    """Return the sizes of the transformer at `path` (as in `load_dit`) without reading its weights."""
    return open_weights(path, WAN_DIT, key).config


def load_vae(
    path: str | Path, dtype=jnp.float32, key: str | None = None, *, sharding: Sharding | None = None
) -> WanVAE:
    """Load the video autoencoder; arguments and errors as in `load_dit`, `key` if its file holds several only."""
    return load_module(open_weights(path, WAN_VAE, key or "", strict=False), dtype, sharding)


def load_umt5(
    path: str | Path,
    dtype=jnp.float32,
    key: str | None = None,
    *,
    param_dtype=None,
    sharding: Sharding | None = None,
) -> UMT5Encoder:
    """Load the text encoder; arguments and errors as in `load_dit` but for these.

    Args:
      path, sharding: as in `load_dit`.
      dtype: of the computation.
      key: as in `load_dit`, if the file holds several only.
      param_dtype: of the stored parameters. By default that of the file if `dtype` holds its values exactly, else
        `dtype`: Wan's own file is bfloat16, so float32's results need no more memory.
    """
    weights = open_weights(path, UMT5, key or "", strict=False)
    param_dtype = lossless_dtype(weights, dtype) if param_dtype is None else param_dtype
    return load_module(weights, dtype, sharding, param_dtype=param_dtype)


def load_interpolator(
    path: str | Path, dtype=jnp.float32, key: str = DEFAULT, *, sharding: Sharding | None = None
) -> Interpolator:
    """Load a frame interpolator.

    Args:
      path: a student that has one (an AVD checkpoint `model.pt`, a training run, an export), the training run of an
        interpolator, or its own file or folder in any layout.
      dtype, sharding: as in `load_dit`.
      key: which weights of a training run, "generator" or "ema", or of a file with several students.

    Raises:
      UserError: as in `load_dit`.
    """
    return load_module(open_weights(path, INTERPOLATOR, key), dtype, sharding)


def open_interpolator_of(*paths: str | Path | None, key: str = DEFAULT) -> Weights | None:
    """Open the interpolator that lies with the student at the first of `paths` (as in `load_dit`) that has one.

    Args:
      paths: places to look at; None is passed over.
      key: which student of a file that holds several has it.

    Returns:
      None if there is none.
    """
    for path in (fetched(path, INTERPOLATOR.component) for path in paths if path):
        folder = path.parent if path.is_file() else path
        if folder.name == WAN_DIT.component:  # of diffusers' layout or ours: the interpolator's folder is beside it
            places = [folder.parent]
        else:
            places = [path, folder] if path.is_file() else [path]
        for place in places:
            with contextlib.suppress(NotHereError):
                return open_weights(place, INTERPOLATOR, key, strict=False)
    return None


def load_vit(path: str | Path, dtype=jnp.float32) -> VisionTransformer:
    """Load a vision transformer, CLIP's image tower or DINO: which one is told by the keys, its sizes by the shapes.

    Args:
      path: a folder of transformers (`openai/clip-vit-large-patch14`, `openai/clip-vit-base-patch32`,
        `facebook/dino-vitb16`), OpenAI's `ViT-L-14.pt` or `ViT-B-32.pt`, Meta's `dino_vitbase16_pretrain.pth`, or
        another file with their keys; a CLIP's text tower is passed over.
      dtype: of the stored parameters and of the matrix products; norms are float32.

    Raises:
      UserError: one line that says what the file is, and what to give instead.
    """
    return load_module(open_vit(path), dtype)


def open_vit(path: str | Path) -> Weights:
    """Open a vision transformer, reading no array; arguments and errors as in `load_vit`."""
    path = snapshot_of(any_path(path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files, single = ((path,), True) if path.is_file() else (weight_files(path), False)
    if not files:
        raise NotHereError(f"{path}: no model.safetensors or pytorch_model.bin here; name the file itself")
    config = files[0].with_name("config.json")
    name = str(path)
    keys = tensors_of(open_files(files))
    architecture = most_like(keys, (*SCORING, *ARCHITECTURES))
    other = what_else(keys) if architecture in VISION or architecture is None else f"a {architecture.label}"
    if architecture is None or other:
        raise NotHereError(f"{name}: holds {other or 'other weights'}, not CLIP's or DINO's vision transformer")
    if files[0].name.startswith("open_clip") and not config.is_file():
        raise UserError(f"{name}: does not say which activation it was trained with; give a folder with a config.json")
    found = TorchFiles(files, config if config.is_file() else None, single)
    # Meta's whole checkpoint holds a student beside the teacher, which is what it publishes alone.
    return TorchWeights(found, architecture, "teacher", asked=name, strict=False)


def load_raft(path: str | Path) -> RAFTModule:
    """Load RAFT, the large model, in float32.

    Args:
      path: `raft-things.pth` of RAFT's authors, or another file with its keys.

    Raises:
      UserError: one line that says what the file is, and what to give instead.
    """
    return load_module(open_raft(path), jnp.float32)


def open_raft(path: str | Path) -> Weights:
    """Open RAFT, reading no array; arguments and errors as in `load_raft`."""
    path = any_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give raft-things.pth itself")
    return TorchWeights(TorchFiles((path,), None, True), RAFT, "", asked=str(path), strict=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load umT5's tokenizer from weights in any layout, or from its own folder; errors as in `load_dit`.

    It is `tokenizer.json`, or is made from `spiece.model`, or from what ComfyUI's file of umT5 has of it.
    """
    path = fetched(path, "tokenizer")
    try:
        folder = find_tokenizer(path)
    except NotHereError:
        inside = _tokenizer_inside(path)
        if inside is None:
            raise
        model, name = inside.read().tobytes(), f"{inside.file.path}: {inside.key}"
        return Tokenizer(tokenizer_json(model, name=name), name=name)
    model = folder / "spiece.model"
    if model.is_file() and not (folder / TOKENIZER_FILE).is_file():
        return Tokenizer(tokenizer_json(model.read_bytes(), name=str(model)), name=str(model))
    return Tokenizer.from_path(folder)


def _tokenizer_inside(path: Path) -> Stored | None:
    """Return the tensor in which a text encoder's file holds the tokenizer's bytes, or None."""
    try:
        found = find_weights(path, UMT5, "")
    except NotHereError:
        return None
    if not isinstance(found, TorchFiles):
        return None
    tensors = tensors_of(open_files(found.files))
    inside = (tensor for key, tensor in tensors.items() if key.split(".")[-1] == "spiece_model")
    return next((tensor for tensor in inside if tensor.stored_dtype in (np.uint8, np.int8)), None)


def find_components(
    path: str | Path, wanted: Sequence[str] | None = None, key: str = DEFAULT
) -> tuple[dict[str, Weights | Tokenizer], list[str]]:
    """Open everything that can be converted at `path`.

    Args:
      path: as in `load_dit`.
      wanted: components to look for, each of which must be there; None for all, of which one must be.
      key: as in `load_dit`, of the transformer; of others if their file holds several.

    Returns:
      component -> opened weights (the tokenizer: itself), and the names of those that are not there.

    Raises:
      UserError: nothing there, or what is there is damaged.
    """
    openers = {
        architecture.component: functools.partial(open_weights, path, architecture, key, strict=architecture is WAN_DIT)
        for architecture in ARCHITECTURES
    } | {"tokenizer": functools.partial(load_tokenizer, path)}
    for name in wanted or ():
        if name not in openers:
            raise UserError(f"{name!r} is no component{closest(name, openers)}; known are {', '.join(openers)}")
    found, missing = {}, []
    for name in wanted or openers:
        try:
            found[name] = openers[name]()
        except NotHereError as error:
            if wanted:
                raise
            if name != INTERPOLATOR.component:  # Wan has none, so nobody misses it
                missing.append(name)
            reason = error
    if not found:
        raise UserError(f"{path}: nothing to convert here; {reason}")
    return found, missing

"""The public loaders: a path in any layout -> a module with its weights."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from avd_jax.convert.architectures import ARCHITECTURES, INTERPOLATOR, UMT5, WAN_DIT, WAN_VAE
from avd_jax.convert.layouts import NotHereError, find_tokenizer
from avd_jax.convert.weights import Sharding, Weights, load_module, open_weights

# The one import from data/: a tokenizer comes with the weights, and its file imports nothing else of ours.
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.errors import UserError, closest
from avd_jax.models.interpolator import Interpolator
from avd_jax.models.umt5 import UMT5Encoder
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.models.wan_vae import WanVAE
from avd_jax.paths import local_path


def load_dit(
    path: str | Path,
    dtype=jnp.float32,
    key: str = "generator",
    *,
    remat: str = "none",
    sharding: Sharding | None = None,
) -> WanDiT:
    """Load a diffusion transformer.

    Args:
      path: Wan's folder, a diffusers folder, one .safetensors or .pth file, an AVD checkpoint (`model.pt`), our own
        Orbax folder, or a training run (its latest checkpoint) or one of its checkpoints.
      dtype: of the stored parameters and of the computation.
      key: which network of a training checkpoint: "generator", "ema" (ours only) or "critic".
      remat: what the backward pass keeps, see `WanDiT`.
      sharding: `(dotted path, shape) -> jax.sharding.Sharding`; each process then reads leaf by leaf what its own
        devices hold. Default: whole on the default device.

    Raises:
      UserError: one line that names the file, key or field, and what to do.
    """
    return load_module(open_weights(path, WAN_DIT, key), dtype, sharding, remat=remat)


def dit_config(path: str | Path, key: str = "generator") -> WanDiTConfig:
    """Return the sizes of the transformer at `path` (as in `load_dit`) without reading its weights."""
    return open_weights(path, WAN_DIT, key).config


def load_vae(path: str | Path, dtype=jnp.float32, *, sharding: Sharding | None = None) -> WanVAE:
    """Load the video autoencoder; arguments and errors as in `load_dit`."""
    return load_module(open_weights(path, WAN_VAE, key=""), dtype, sharding)


def load_umt5(path: str | Path, dtype=jnp.float32, *, sharding: Sharding | None = None) -> UMT5Encoder:
    """Load the text encoder; arguments and errors as in `load_dit`."""
    return load_module(open_weights(path, UMT5, key=""), dtype, sharding)


def load_interpolator(
    path: str | Path, dtype=jnp.float32, key: str = "generator", *, sharding: Sharding | None = None
) -> Interpolator:
    """Load a frame interpolator.

    Args:
      path: a student that has one (an AVD checkpoint `model.pt`, a training run, an export), the training run of an
        interpolator, or its own file or folder in any layout.
      dtype, sharding: as in `load_dit`.
      key: which weights of a training run: "generator" or "ema".

    Raises:
      UserError: as in `load_dit`.
    """
    return load_module(open_weights(path, INTERPOLATOR, key), dtype, sharding)


def open_interpolator_of(*paths: str | Path | None) -> Weights | None:
    """Open the interpolator that lies with the student at the first of `paths` (as in `load_dit`) that has one.

    Args:
      paths: places to look at; None is passed over.

    Returns:
      None if there is none.
    """
    for path in map(local_path, filter(None, paths)):
        folder = path.parent if path.is_file() else path
        if folder.name == WAN_DIT.component:  # of diffusers' layout or ours: the interpolator's folder is beside it
            places = [folder.parent]
        else:
            places = [path, folder] if path.is_file() else [path]
        for place in places:
            with contextlib.suppress(NotHereError):
                return open_weights(place, INTERPOLATOR, "generator")
    return None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load umT5's tokenizer from a folder of weights in any layout, or from its own folder; errors as in `load_dit`."""
    return Tokenizer.from_path(find_tokenizer(local_path(path)))


def find_components(
    path: str | Path, wanted: Sequence[str] | None = None
) -> tuple[dict[str, Weights | Tokenizer], list[str]]:
    """Open everything that can be converted at `path`.

    Args:
      path: as in `load_dit`.
      wanted: components to look for, each of which must be there; None for all, of which one must be.

    Returns:
      component -> opened weights (the tokenizer: itself), and the names of those that are not there.

    Raises:
      UserError: nothing there, or what is there is damaged.
    """
    openers = {
        architecture.component: functools.partial(
            open_weights, path, architecture, "generator" if architecture in (WAN_DIT, INTERPOLATOR) else ""
        )
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

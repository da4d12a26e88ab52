"""The public loaders: a path in any layout -> a module with its weights."""

from pathlib import Path

import jax.numpy as jnp

from avd_jax.convert.architectures import UMT5, WAN_DIT
from avd_jax.convert.weights import Sharding, load_module, open_weights
from avd_jax.models.umt5 import UMT5Encoder
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig


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


def load_umt5(path: str | Path, dtype=jnp.float32, *, sharding: Sharding | None = None) -> UMT5Encoder:
    """Load the text encoder; arguments and errors as in `load_dit`."""
    return load_module(open_weights(path, UMT5, key=""), dtype, sharding)

"""Writing what was trained here as a folder in diffusers' layout: safetensors and config.json, a folder a component."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.convert import dit_rules, interpolator_rules, umt5_rules, vae_rules
from avd_jax.convert.architectures import INTERPOLATOR, UMT5, WAN_DIT, WAN_VAE, Architecture
from avd_jax.convert.engine import source_shapes, tensors_to_torch
from avd_jax.convert.safetensors_io import write_safetensors
from avd_jax.convert.saving import MAX_SHARD_BYTES, opened_folder, write_json
from avd_jax.convert.state import flat_state
from avd_jax.models.interpolator import Interpolator
from avd_jax.models.umt5 import UMT5Encoder
from avd_jax.models.wan_dit import WanDiT
from avd_jax.models.wan_vae import WanVAE
from avd_jax.paths import any_path


def write_vae(vae: WanVAE, folder: Path, dtype=jnp.float32) -> None:
    """Write a VAE to `folder/vae`, with the statistics of its latents."""
    _write(WAN_VAE, vae, vae_rules.config_to_diffusers(vae.config), folder, "diffusion_pytorch_model", dtype)


def write_dit(dit: WanDiT, folder: Path, dtype=jnp.float32) -> None:
    """Write a transformer to `folder/transformer`."""
    _write(WAN_DIT, dit, dit_rules.config_to_diffusers(dit.config), folder, "diffusion_pytorch_model", dtype)


def write_interpolator(unet: Interpolator, folder: Path, dtype=jnp.float32) -> None:
    """Write a frame interpolator to `folder/interpolator`."""
    config = interpolator_rules.config_to_json(unet.config)
    _write(INTERPOLATOR, unet, config, folder, "diffusion_pytorch_model", dtype)


def write_text_encoder(umt5: UMT5Encoder, folder: Path, dtype=jnp.float32) -> None:
    """Write a text encoder to `folder/text_encoder`."""
    _write(UMT5, umt5, umt5_rules.config_to_diffusers(umt5.config), folder, "model", dtype)


def _write(architecture: Architecture, module: nnx.Module, config: dict, folder: Path, stem: str, dtype) -> None:
    rules = architecture.diffusers_rules(module.config)
    arrays = {path: np.asarray(leaf[...], dtype) for path, leaf in flat_state(nnx.state(module)).items()}
    tensors = {}
    for path, array in arrays.items():
        leaf = jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, shape in source_shapes(rules, {path: leaf}):
            tensors[name] = jax.ShapeDtypeStruct(shape, array.dtype)
    stream = tensors_to_torch(rules, iter(arrays.items()))
    with opened_folder(any_path(folder) / architecture.component) as component:
        write_safetensors(component, tensors, stream, stem=stem, max_shard_bytes=MAX_SHARD_BYTES)
        write_json(component / "config.json", config)

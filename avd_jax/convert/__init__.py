"""Conversion between PyTorch's checkpoints and ours, in both directions."""

from avd_jax.convert.exports import LAYOUTS, export_dit, export_lora
from avd_jax.convert.layouts import student_settings, training_settings
from avd_jax.convert.loading import (
    dit_config,
    find_components,
    load_dit,
    load_interpolator,
    load_raft,
    load_tokenizer,
    load_umt5,
    load_vae,
    load_vit,
    open_interpolator_of,
    open_raft,
    open_vit,
)
from avd_jax.convert.saving import check_writable, save_orbax, save_tokenizer
from avd_jax.convert.state import flat_state, from_flat

__all__ = [
    "LAYOUTS",
    "check_writable",
    "dit_config",
    "export_dit",
    "export_lora",
    "find_components",
    "flat_state",
    "from_flat",
    "load_dit",
    "load_interpolator",
    "load_raft",
    "load_tokenizer",
    "load_umt5",
    "load_vae",
    "load_vit",
    "open_interpolator_of",
    "open_raft",
    "open_vit",
    "save_orbax",
    "save_tokenizer",
    "student_settings",
    "training_settings",
]

"""Conversion between PyTorch's checkpoints and ours, in both directions."""

from avd_jax.convert.layouts import student_settings
from avd_jax.convert.loading import dit_config, load_dit, load_umt5
from avd_jax.convert.state import flat_state, from_flat

__all__ = [
    "dit_config",
    "flat_state",
    "from_flat",
    "load_dit",
    "load_umt5",
    "student_settings",
]

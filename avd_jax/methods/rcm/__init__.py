"""rCM (docs/rcm.md): continuous consistency along the guided teacher's flow, regularised by distribution matching."""

from avd_jax.methods.rcm.config import FIELDS, validate, validate_values
from avd_jax.methods.rcm.method import build
from avd_jax.training.method import Recipe

RECIPE = Recipe("rcm", FIELDS, validate_values, validate, build)

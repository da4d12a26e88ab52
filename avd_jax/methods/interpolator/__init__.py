"""Frame interpolation (docs/interpolation.md): a U-Net that makes the frames between, trained on encoded videos."""

from avd_jax.methods.interpolator.config import FIELDS, validate, validate_values
from avd_jax.methods.interpolator.method import build
from avd_jax.training.method import Recipe

RECIPE = Recipe("interpolator", FIELDS, validate_values, validate, build)

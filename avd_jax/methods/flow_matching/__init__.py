"""Flow matching: a transformer trained from scratch, or fine-tuned, on encoded videos."""

from avd_jax.methods.flow_matching.config import FIELDS, validate, validate_values
from avd_jax.methods.flow_matching.method import build
from avd_jax.training.method import Recipe

RECIPE = Recipe("flow_matching", FIELDS, validate_values, validate, build)

"""A tiny umT5, trained from scratch on the captions of the built-in world of shapes."""

from avd_jax.methods.text_encoder.config import FIELDS, validate, validate_values
from avd_jax.methods.text_encoder.method import build
from avd_jax.training.method import Recipe

RECIPE = Recipe("text_encoder", FIELDS, validate_values, validate, build)

"""A small WanVAE, trained from scratch on the built-in world of shapes."""

from avd_jax.methods.vae.config import FIELDS, validate, validate_values
from avd_jax.methods.vae.method import build
from avd_jax.training.method import Recipe

RECIPE = Recipe("vae", FIELDS, validate_values, validate, build)

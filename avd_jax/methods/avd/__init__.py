"""Adaptive Video Distillation (docs/method.md): a generator, a fake_score that follows it, and a frozen teacher."""

from avd_jax.methods.avd.config import FIELDS, validate, validate_values
from avd_jax.methods.avd.method import build
from avd_jax.training.method import Recipe

RECIPE = Recipe("avd", FIELDS, validate_values, validate, build)

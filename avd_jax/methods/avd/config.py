"""Every field of a distillation's config: its default (the paper's value if it has one), help line and check.

A file in `configs/` starts from `default_config()` and changes what it must. A field that is not listed here does not
exist: setting it is an error that names the closest one.
"""

import ml_collections

from avd_jax.diffusion.student import DEFAULT_HALF_RATE_POSITIONS, HALF_RATE_POSITIONS, StudentSchedule
from avd_jax.errors import UserError
from avd_jax.fields import (
    Field,
    Fields,
    below_one,
    check_values,
    config_from,
    not_nan,
    not_negative,
    one_of,
    require,
    weights,
    with_defaults,
)
from avd_jax.methods import distillation
from avd_jax.methods.avd import terms
from avd_jax.methods.distillation_fields import DISTILLATION_FIELDS
from avd_jax.training.config import RUN_FIELDS
from avd_jax.training.method import active

FAKE_SCORE_SAMPLES = "an_update", "a_cycle"

FIELDS: Fields = {
    **with_defaults(RUN_FIELDS, method="avd"),
    **DISTILLATION_FIELDS,
    "student.timesteps": Field((1000.0, 900.0, 757.0, 522.0), "timesteps (1000 sigma) of the student's steps"),
    "half_rate.steps": Field(0, "first steps of the student that see every second frame, in training too; 0: none"),
    "half_rate.positions": Field(
        DEFAULT_HALF_RATE_POSITIONS,
        "of these frames in the rotary embedding: " + ", ".join(HALF_RATE_POSITIONS),
        one_of(HALF_RATE_POSITIONS),
    ),
    "half_rate.interpolator": Field(
        "",
        "weights that make the other frames, in any layout; they stay with the student",
        weights,
        changeable=True,
    ),
    "score.min_timestep": Field(20.0, "lower bound of these timesteps, of 1000"),
    "score.max_timestep": Field(980.0, "upper bound of these timesteps, of 1000"),
    "fake_score_updates": Field(5, "updates of fake_score before each update of the generator", not_negative),
    "fake_score_samples": Field(
        "an_update",
        "'an_update': each of them makes its own samples, to a random step (Algorithm 1); 'a_cycle': they learn from "
        "the x0 at all steps of one rollout",
        one_of(FAKE_SCORE_SAMPLES),
    ),
    "loss.distribution_matching": Field(
        1.0, "weight of L_KL, Eq. 4; 0 switches the term off", not_negative, recorded=True
    ),
    "loss.regression": Field(
        2.0, "weight of L_reg, Eq. 9; 0 switches the term off and its forward pass", not_negative, recorded=True
    ),
    "loss.regression_weighting": Field(
        "adaptive", "'adaptive' (Eqs. 5-7) or 'fixed' (w = 1, the ablation)", one_of(("adaptive", "fixed"))
    ),
    "loss.adaptive_k": Field(3.0, "steepness k of the adaptive weight", not_negative, recorded=True),
    "loss.adaptive_alpha": Field(0.95, "share of the old mean that stays in the loss history", below_one),
    "loss.adaptive_uses": Field(
        "before",
        "the weight uses the mean 'before' the update (paper) or 'after' it (authors)",
        one_of(("before", "after")),
    ),
    "loss.temporal": Field(0.05, "weight of L_temp, Eq. 8; 0 switches the term off", not_negative, recorded=True),
    "loss.temporal_clip": Field(
        0.6, "L_temp gives no gradient at or below this; -inf never truncates", not_nan, recorded=True
    ),
    "optimizer.learning_rate": Field(2e-6, "AdamW's learning rate of the generator", not_negative, recorded=True),
    "optimizer.fake_score_learning_rate": Field(
        2e-6, "AdamW's learning rate of fake_score", not_negative, recorded=True
    ),
    "optimizer.beta1": Field(0.9, "AdamW's decay of the first moment", below_one),
    "optimizer.beta2": Field(0.999, "AdamW's decay of the second moment", below_one),
    "optimizer.epsilon": Field(1e-8, "AdamW's epsilon", not_negative),
    "optimizer.weight_decay": Field(
        0.01, "AdamW's decoupled weight decay (PyTorch's default; the paper names none)", not_negative, recorded=True
    ),
    "optimizer.max_grad_norm": Field(
        10.0, "gradients are scaled down to this global norm", not_negative, recorded=True
    ),
    "ema_decay": Field(0.0, "decay of the running mean of the generator's weights; 0 keeps none", below_one),
}


def default_config() -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    return config_from(FIELDS)


def validate(config) -> None:
    """Check a config that is to be trained with, as far as it can be checked without files or devices.

    Raises:
      UserError: naming the field and what it may be.
    """
    validate_values(config)
    distillation.check_named(config)
    if config.half_rate.steps and not config.half_rate.interpolator:
        raise UserError("config.half_rate.interpolator is empty: give weights, see scripts/train_interpolator.py")


def validate_values(config) -> None:
    """Check every value, whether or not weights and data are named.

    Raises:
      UserError: naming the field and what it may be.
    """
    flat = check_values(config, FIELDS)
    low, high = flat["score.min_timestep"], flat["score.max_timestep"]
    wrong = None if 0 < low <= high <= 1000 else f"and score.max_timestep={high} must rise in 0..1000"
    require("score.min_timestep", low, wrong)
    distillation.check_accumulation(flat)
    if not active(terms.generator_terms(config.loss)):
        raise UserError("config.loss: every term has weight 0, nothing would be trained; set one of them")
    num_steps = len(StudentSchedule(tuple(config.student.timesteps)).timesteps)
    half_steps = flat["half_rate.steps"]
    require("half_rate.steps", half_steps, None if 0 <= half_steps <= num_steps else f"must be 0 to {num_steps}")

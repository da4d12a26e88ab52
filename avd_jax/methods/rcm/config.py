"""Every field of an rCM distillation's config; the defaults are those of NVlabs/rcm for Wan2.1 1.3B."""

import ml_collections

from avd_jax.diffusion.student import StudentSchedule
from avd_jax.errors import UserError
from avd_jax.fields import (
    Field,
    Fields,
    at_least,
    below_one,
    check_values,
    config_from,
    finite,
    not_negative,
    one_of,
    positive,
    with_defaults,
)
from avd_jax.methods import distillation
from avd_jax.methods.distillation_fields import DISTILLATION_FIELDS
from avd_jax.methods.rcm import terms
from avd_jax.training.config import RUN_FIELDS
from avd_jax.training.method import active

FIELDS: Fields = {
    **with_defaults(RUN_FIELDS, method="rcm"),
    **DISTILLATION_FIELDS,
    "student.timesteps": Field(
        (987.7, 933.8, 852.9, 609.0),
        "timesteps (1000 sigma) at which the student is sampled; fewer steps leave the last ones out",
    ),
    "rollout.times": Field(
        "random",
        "of the student's samples in training: 'random', which serves every number of steps, or the 'schedule' above",
        one_of(("random", "schedule")),
    ),
    "consistency.mean": Field(
        0.7, "mean of ln(sigma / (1 - sigma)) at which consistency is asked for; 1.5 for the 14B model", finite
    ),
    "consistency.deviation": Field(1.6, "its standard deviation", positive),
    "consistency.warmup": Field(
        1000, "generator updates with consistency alone, over which its tangent grows to full strength", at_least(0)
    ),
    "consistency.intervals": Field(
        48, "of the discrete loss: steps from noise to data, shifted by score.shift", at_least(1)
    ),
    "fake_score_updates": Field(
        4, "updates of fake_score before each update of the generator, after the warm-up", at_least(0)
    ),
    "loss.consistency": Field(
        0.07, "weight of L_CM, whose tangent has unit size; 0 switches the term off", not_negative, recorded=True
    ),
    "loss.discrete_consistency": Field(
        0.0,
        "weight of the loss between two steps of the teacher (100 in rcm's 'dcm'), without tangents",
        not_negative,
        recorded=True,
    ),
    "loss.distribution_matching": Field(
        1.0, "weight of L_KL; 0 switches it off, and fake_score", not_negative, recorded=True
    ),
    "loss.fake_score_weighting": Field(
        "trigonometric",
        "of fake_score's loss over noise levels: 'trigonometric' (1 at both ends, 1/2 between) or 'even'",
        one_of(("trigonometric", "even")),
    ),
    "optimizer.learning_rate": Field(2e-6, "AdamW's learning rate of the generator", not_negative, recorded=True),
    "optimizer.fake_score_learning_rate": Field(
        4e-7, "AdamW's learning rate of fake_score", not_negative, recorded=True
    ),
    "optimizer.warmup_steps": Field(100, "a network's updates over which its rate rises from a millionth", at_least(1)),
    "optimizer.beta1": Field(0.0, "AdamW's decay of the first moment; 0 keeps none", below_one),
    "optimizer.beta2": Field(0.999, "AdamW's decay of the second moment", below_one),
    "optimizer.epsilon": Field(1e-8, "AdamW's epsilon", not_negative),
    "optimizer.weight_decay": Field(0.01, "AdamW's decoupled weight decay", not_negative, recorded=True),
    "optimizer.max_grad_norm": Field(
        0.0, "gradients are scaled down to this global norm; 0: never", not_negative, recorded=True
    ),
    "ema_power": Field(
        6.937,
        "power by which the running mean of the generator's weights remembers (its memory is a tenth of the run); 0 "
        "keeps none",
        not_negative,
    ),
}


def default_config() -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    return config_from(FIELDS)


def validate(config) -> None:
    """Check a config that is to be trained with (UserError names the field and what it may be)."""
    validate_values(config)
    distillation.check_named(config)


def validate_values(config) -> None:
    """Check every value, whether or not weights and data are named (UserError as for `validate`)."""
    flat = check_values(config, FIELDS)
    distillation.check_accumulation(flat)
    StudentSchedule(tuple(config.student.timesteps))
    if not active(terms.generator_terms(config, None)):
        raise UserError("config.loss: every term has weight 0, nothing would be trained; set one of them")

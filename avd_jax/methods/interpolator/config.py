"""Every field of a training of the frame interpolator; the defaults are the paper's."""

from avd_jax.errors import UserError
from avd_jax.fields import Field, Fields, at_least, check_values, weights, with_defaults
from avd_jax.methods.transformers import WHICH_FIELDS, sets
from avd_jax.models.interpolator import InterpolatorConfig
from avd_jax.training.config import MESH_FIELDS, RUN_FIELDS, SCHEDULE_FIELDS

FIELDS: Fields = {
    **with_defaults(
        RUN_FIELDS, method="interpolator", num_steps=10000, batch_size=32, log_every=50, checkpoint_every=1000
    ),
    "init_from": Field(
        "",
        "weights to start from, such as an AVD checkpoint, which set the sizes; empty: a new network",
        weights,
        changeable=True,
    ),
    **WHICH_FIELDS,
    "model.widths": Field(
        (64, 128, 256), "channels of the three levels, without init_from; the authors' are 32, 64, 128"
    ),
    "data.latents": Field("", "folder of encoded videos (encode.py), or several: a:3,b:1", sets, changeable=True),
    "data.held_out": Field(
        64, "clips, spread evenly over the set, that no update sees and the error is measured on", at_least(1)
    ),
    "sample.clips": Field(4, "held-out clips to show beside what is made of them", at_least(0), changeable=True),
    "sample.vae": Field("", "weights of the VAE that decodes them; empty: none are shown", weights, changeable=True),
    **MESH_FIELDS,
    **with_defaults(
        SCHEDULE_FIELDS,
        optimizer__learning_rate=1e-5,
        optimizer__warmup_steps=100,
        optimizer__beta2=0.999,
    ),
}


def validate_values(config) -> None:
    """Check every value (UserError names the field)."""
    flat = check_values(config, FIELDS)
    if flat["optimizer.weight_decay"]:
        raise UserError("config.optimizer.weight_decay must be 0: it would shrink BatchNorm's statistics")
    InterpolatorConfig(widths=tuple(config.model.widths))


def validate(config) -> None:
    """Check every value, and that the data are named (UserError names the field)."""
    validate_values(config)
    if not config.data.latents:
        raise UserError("config.data.latents is empty: give the folder that scripts/encode.py wrote")

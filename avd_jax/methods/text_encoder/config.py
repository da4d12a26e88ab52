"""Every field of a training of a tiny text encoder."""

from avd_jax.errors import UserError
from avd_jax.fields import Field, Fields, at_least, check_values, local, not_negative, with_defaults
from avd_jax.training.config import RUN_FIELDS

FIELDS: Fields = {
    **with_defaults(
        RUN_FIELDS, method="text_encoder", num_steps=2000, batch_size=64, log_every=100, checkpoint_every=1000
    ),
    "tokenizer": Field("", "folder of its tokenizer", local, changeable=True),
    "model.dim": Field(64, "width of the embeddings", at_least(1)),
    "model.ffn_dim": Field(128, "hidden width of the feed-forward layers", at_least(1)),
    "model.num_heads": Field(4, "attention heads", at_least(1)),
    "model.head_dim": Field(16, "width of a head", at_least(1)),
    "model.num_layers": Field(2, "blocks", at_least(1)),
    "optimizer.learning_rate": Field(2e-3, "Adam's rate, which falls to zero along a cosine", not_negative),
}


def validate_values(config) -> None:
    """Check the values (UserError names the field)."""
    check_values(config, FIELDS)


def validate(config) -> None:
    """Check the values, and that the tokenizer is named (UserError names the field)."""
    validate_values(config)
    if not config.tokenizer:
        raise UserError("config.tokenizer is empty: give the folder of weights whose tokenizer/ is to be used")

"""Every field of a training or fine-tuning by flow matching."""

from avd_jax.errors import UserError
from avd_jax.fields import Field, Fields, at_least, check_values, one_of, require, share, weights, with_defaults
from avd_jax.methods.transformers import ATTENTION_FIELDS, DTYPES, LORA_FIELDS, REMAT, WHICH_FIELDS, sets
from avd_jax.models.wan_dit import REMAT_POLICIES
from avd_jax.training.config import MESH_FIELDS, RUN_FIELDS, SCHEDULE_FIELDS

FIELDS: Fields = {
    **with_defaults(
        RUN_FIELDS, method="flow_matching", num_steps=10000, batch_size=16, log_every=50, checkpoint_every=500
    ),
    "init_from": Field(
        "", "weights to fine-tune, in any layout; empty: a new model of the sizes below", weights, changeable=True
    ),
    **WHICH_FIELDS,
    **LORA_FIELDS,
    "model.dim": Field(128, "width of the tokens, without init_from", at_least(1)),
    "model.ffn_dim": Field(512, "hidden width of the feed-forward layers, without init_from", at_least(1)),
    "model.num_heads": Field(4, "attention heads, without init_from", at_least(1)),
    "model.num_layers": Field(4, "blocks, without init_from", at_least(1)),
    "model.patch_size": Field((1, 2, 2), "latent frames, rows and columns that make a token, without init_from"),
    "model.text_len": Field(32, "tokens of a prompt that the model sees, without init_from", at_least(1)),
    "data.latents": Field("", "folder of encoded videos (encode.py), or several: a:3,b:1", sets, changeable=True),
    "timestep.shift": Field(3.0, "timestep shift of the random timesteps"),
    "timestep.min": Field(0.0, "lower bound of these timesteps, of 1000"),
    "timestep.max": Field(1000.0, "upper bound of these timesteps, of 1000"),
    "prompt_dropout": Field(0.1, "share of the examples that see the negative prompt instead of their own", share),
    "compute_dtype": Field("float32", "dtype of matrix products; masters and moments are float32", DTYPES),
    "remat": Field(
        "none", "what the backward pass keeps of a block: " + ", ".join(REMAT_POLICIES), REMAT, changeable=True
    ),
    **MESH_FIELDS,
    **ATTENTION_FIELDS,
    **SCHEDULE_FIELDS,
    "optimizer.name": Field(
        "adamw",
        "adamw, or muon for the matrices of the blocks: from scratch, with a higher rate",
        one_of(("adamw", "muon")),
    ),
}


def validate_values(config) -> None:
    """Check every value (UserError names the field)."""
    flat = check_values(config, FIELDS)
    low, high = flat["timestep.min"], flat["timestep.max"]
    without = flat["init_lora"] and not flat["init_from"]
    require("init_lora", flat["init_lora"], "goes with init_from, whose weights it changes" if without else None)
    require("timestep.min", low, None if 0 <= low <= high <= 1000 else "and timestep.max must rise in 0..1000")


def validate(config) -> None:
    """Check every value, and that the data are named (UserError names the field)."""
    validate_values(config)
    if not config.data.latents:
        raise UserError("config.data.latents is empty: give the folder that scripts/encode.py wrote")

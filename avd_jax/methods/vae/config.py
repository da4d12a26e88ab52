"""Every field of a training of a small VAE, and the sizes that they name."""

from avd_jax.data.world_clips import FIRST_VAE_CLIP
from avd_jax.fields import Field, Fields, at_least, check_values, not_negative, require, with_defaults
from avd_jax.models.wan_vae import WanVAEConfig
from avd_jax.training.config import RUN_FIELDS, SCHEDULE_FIELDS

FIELDS: Fields = {
    **with_defaults(RUN_FIELDS, method="vae", num_steps=4000, batch_size=3, log_every=20, checkpoint_every=250),
    "model.base_dim": Field(8, "channels at full resolution", at_least(1)),
    "model.z_dim": Field(16, "channels of the latents", at_least(1)),
    "model.dim_mult": Field((1, 3, 6), "channels of each level, in base_dim"),
    "model.temporal_downsample": Field(
        (True, True), "whether each level but the last halves the frames, not only the sides"
    ),
    "model.num_res_blocks": Field(1, "residual blocks a level of the encoder; the decoder has one more", at_least(1)),
    "data.first_clip": Field(
        FIRST_VAE_CLIP, "number of the first clip of the built-in world; later work uses the ones below"
    ),
    "data.frames": Field(17, "frames of a whole clip, 4n + 1"),
    "data.height": Field(64, "pixels of a whole clip"),
    "data.width": Field(64, "pixels of a whole clip"),
    "data.crop_frames": Field(17, "frames of a crop, 4n + 1; colours drift beyond what was trained"),
    "data.crop_size": Field(32, "pixels of a crop's sides, a multiple of the VAE's stride"),
    "loss.gradient": Field(0.5, "weight of the differences of neighbouring pixels", not_negative),
    "loss.kl": Field(1e-4, "weight of the divergence from a normal distribution", not_negative),
    **with_defaults(SCHEDULE_FIELDS, optimizer__learning_rate=5e-4, optimizer__warmup_steps=20, ema_decay=0.995),
}


def validate_values(config) -> None:
    """Check the values (UserError names the field)."""
    flat = check_values(config, FIELDS)
    sizes = model_config(config)
    for name in ("data.frames", "data.crop_frames"):
        if flat[name] % sizes.temporal_stride != 1:
            require(name, flat[name], f"is not {sizes.temporal_stride}n + 1")
    size, stride = flat["data.crop_size"], sizes.spatial_stride
    if size < stride or size % stride or size > min(flat["data.height"], flat["data.width"]):
        require("data.crop_size", size, f"must be a multiple of {stride}, and no larger than the clip")
    if flat["data.crop_frames"] > flat["data.frames"]:
        require("data.crop_frames", flat["data.crop_frames"], "is more than data.frames")


validate = validate_values  # it needs nothing but what the config says


def model_config(config) -> WanVAEConfig:
    """Return the VAE's sizes, with latent statistics that normalise nothing."""
    sizes = config.model
    return WanVAEConfig(
        base_dim=sizes.base_dim,
        z_dim=sizes.z_dim,
        dim_mult=tuple(sizes.dim_mult),
        num_res_blocks=sizes.num_res_blocks,
        temporal_downsample=tuple(sizes.temporal_downsample),
        latents_mean=(0.0,) * sizes.z_dim,
        latents_std=(1.0,) * sizes.z_dim,
    )

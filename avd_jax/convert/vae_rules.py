"""Conversion tables of the video autoencoder: Wan's own keys, diffusers' keys, and their configs.

Sources: `Wan2.1_VAE.pth` (keys of wan/modules/vae.py) and diffusers' `AutoencoderKLWan`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from avd_jax.convert.engine import Rule
from avd_jax.errors import UserError, closest
from avd_jax.models.wan_vae import RGB, WanVAEConfig

_CONV3D, _CONV2D = "o i t h w -> t h w i o", "o i h w -> 1 h w i o"
_POINTWISE3D, _POINTWISE2D = "o i 1 1 1 -> i o", "o i 1 1 -> i o"
_SCALE3D, _SCALE2D, _VECTOR = "c 1 1 1 -> c", "c 1 1 -> c", "c -> c"

# (Flax name, Wan's, diffusers', layout of the weight; None: a norm) of what a layer of each kind holds.
_RESIDUAL = (
    ("norm1", "residual.0", "norm1", None),
    ("conv1", "residual.2", "conv1", _CONV3D),
    ("norm2", "residual.3", "norm2", None),
    ("conv2", "residual.6", "conv2", _CONV3D),
)
_SHORTCUT = (("shortcut", "shortcut", "conv_shortcut", _POINTWISE3D),)
_RESAMPLE = (("conv", "resample.1", "resample.1", _CONV2D),)
_TIME_CONV = (("time_conv", "time_conv", "time_conv", _CONV3D),)
_ATTENTION = (("to_qkv", "to_qkv", "to_qkv", _POINTWISE2D), ("proj", "proj", "proj", _POINTWISE2D))


def _layers(config: WanVAEConfig) -> Iterator[tuple[str, str, str, tuple]]:
    """Yield (Flax path, Wan's prefix, diffusers' prefix, parts) of every layer."""
    widths = [config.base_dim * multiplier for multiplier in config.dim_mult]
    index, channels = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            path = f"encoder.downsamples.{index}"
            yield path, path, f"encoder.down_blocks.{index}", _residual(channels, width)
            index, channels = index + 1, width
        if level < len(config.temporal_downsample):
            path = f"encoder.downsamples.{index}"
            yield path, path, f"encoder.down_blocks.{index}", _resample(config.temporal_downsample[level])
            index += 1

    temporal = config.temporal_downsample[::-1]
    index, channels = 0, widths[-1]
    for level, width in enumerate(widths[::-1]):
        for block in range(config.num_res_blocks + 1):
            path = f"decoder.upsamples.{index}"
            yield path, path, f"decoder.up_blocks.{level}.resnets.{block}", _residual(channels, width)
            index, channels = index + 1, width
        if level < len(temporal):
            path = f"decoder.upsamples.{index}"
            yield path, path, f"decoder.up_blocks.{level}.upsamplers.0", _resample(temporal[level])
            index, channels = index + 1, channels // 2

    for side in ("encoder", "decoder"):
        yield f"{side}.middle.0", f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RESIDUAL
        yield f"{side}.middle.1", f"{side}.middle.1", f"{side}.mid_block.attentions.0", _ATTENTION
        yield f"{side}.middle.2", f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RESIDUAL


def _residual(in_channels: int, out_channels: int) -> tuple:
    return _RESIDUAL + (_SHORTCUT if in_channels != out_channels else ())


def _resample(temporal: bool) -> tuple:
    return _RESAMPLE + (_TIME_CONV if temporal else ())


def _table(config: WanVAEConfig) -> Iterator[tuple[str, str, str, str]]:
    """Yield (Flax path, Wan's key, diffusers' key, layout) of every leaf."""
    yield from _weights("conv1", "conv1", "quant_conv", _POINTWISE3D)
    yield from _weights("conv2", "conv2", "post_quant_conv", _POINTWISE3D)
    for side in ("encoder", "decoder"):
        yield from _weights(f"{side}.conv1", f"{side}.conv1", f"{side}.conv_in", _CONV3D)
        yield f"{side}.head_norm.scale", f"{side}.head.0.gamma", f"{side}.norm_out.gamma", _SCALE3D
        yield from _weights(f"{side}.head_conv", f"{side}.head.2", f"{side}.conv_out", _CONV3D)
        attention = f"{side}.middle.1.norm"
        yield f"{attention}.scale", f"{attention}.gamma", f"{side}.mid_block.attentions.0.norm.gamma", _SCALE2D
    for path, wan, diffusers, parts in _layers(config):
        for part, wan_part, diffusers_part, layout in parts:
            names = f"{path}.{part}", f"{wan}.{wan_part}", f"{diffusers}.{diffusers_part}"
            if layout is None:
                yield f"{names[0]}.scale", f"{names[1]}.gamma", f"{names[2]}.gamma", _SCALE3D
            else:
                yield from _weights(*names, layout)


def _weights(path: str, wan: str, diffusers: str, layout: str):
    yield f"{path}.kernel", f"{wan}.weight", f"{diffusers}.weight", layout
    yield f"{path}.bias", f"{wan}.bias", f"{diffusers}.bias", _VECTOR


def native_rules(config: WanVAEConfig) -> list[Rule]:
    """Return the table for the keys of `Wan2.1_VAE.pth`."""
    return [Rule(wan, path, layout) for path, wan, _, layout in _table(config)]


def diffusers_rules(config: WanVAEConfig) -> list[Rule]:
    """Return the table for diffusers' AutoencoderKLWan."""
    return [Rule(diffusers, path, layout) for path, _, diffusers, layout in _table(config)]


def config_from_native(shapes: Mapping[str, tuple[int, ...]], *, name: str = "Wan2.1_VAE.pth") -> WanVAEConfig:
    """Read the sizes off the shapes of `Wan2.1_VAE.pth`, which has no config beside it.

    Args:
      shapes: key -> shape of the file's tensors.
      name: what the messages call the file, usually its path.

    Returns:
      the config; the latents' mean and standard deviation, which the file does not hold, are Wan2.1's.

    Raises:
      UserError: when a key that the sizes are read from is missing, or the latents are not Wan2.1's 16 channels.
    """

    def size(key: str) -> int:
        if key not in shapes:
            raise UserError(f"{name}: the key {key!r} is missing{closest(key, shapes)}; it holds no Wan2.1 VAE")
        return shapes[key][0]

    base_dim, z_dim = size("encoder.conv1.bias"), size("conv2.bias")
    if z_dim != WanVAEConfig.z_dim:
        raise UserError(f"{name}: conv2.bias has {z_dim} channels; Wan2.1's VAE has {WanVAEConfig.z_dim}")
    widths, temporal, level = [], [], []
    index = 0
    while any(key.startswith(f"encoder.downsamples.{index}.") for key in shapes):
        prefix = f"encoder.downsamples.{index}"
        if f"{prefix}.resample.1.bias" in shapes:
            temporal.append(f"{prefix}.time_conv.bias" in shapes)
            widths.append(level)
            level = []
        else:
            level.append(size(f"{prefix}.residual.6.bias"))
        index += 1
    widths.append(level)
    uniform = all(len(level) == len(widths[0]) > 0 and len(set(level)) == 1 for level in widths)
    if not uniform or any(level[0] % base_dim for level in widths):
        raise UserError(f"{name}: encoder.downsamples has widths {widths}; it holds no Wan2.1 VAE")
    return WanVAEConfig(
        base_dim=base_dim,
        dim_mult=tuple(level[0] // base_dim for level in widths),
        num_res_blocks=len(widths[0]),
        temporal_downsample=tuple(temporal),
    )


# Fields of diffusers' config that this model has, in diffusers' spelling.
_FIELDS = {
    "base_dim": "base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temporal_downsample": "temperal_downsample",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}
# Fields that only Wan2.1's value is known of; older files leave some out.
_FIXED = {
    "attn_scales": [],
    "in_channels": RGB,
    "is_residual": False,
    "out_channels": RGB,
    "patch_size": None,
}


def config_from_diffusers(config_json: Mapping[str, Any], *, name: str = "config.json") -> WanVAEConfig:
    """Read diffusers' `vae/config.json`; fields that it leaves out have Wan2.1's values.

    Args:
      config_json: the file's entries.
      name: what the messages call the file, usually its path.

    Raises:
      UserError: naming the field that is not Wan2.1's, or not known.
    """
    class_name = config_json.get("_class_name", "AutoencoderKLWan")
    if class_name != "AutoencoderKLWan":
        raise UserError(f"{name}: _class_name is {class_name!r}; only AutoencoderKLWan is known")
    for field, value in _FIXED.items():
        if config_json.get(field, value) != value:
            raise UserError(f"{name}: {field} is {config_json[field]!r}; Wan2.1's VAE has {value!r}")
    values = {
        ours: tuple(config_json[theirs]) if isinstance(config_json[theirs], list | tuple) else config_json[theirs]
        for ours, theirs in _FIELDS.items()
        if theirs in config_json
    }
    config = WanVAEConfig(**values)
    derived = _derived(config)
    if config_json.get("decoder_base_dim") is None:
        derived["decoder_base_dim"] = None
    for field, value in derived.items():
        if config_json.get(field, value) != value:
            raise UserError(f"{name}: {field} is {config_json[field]!r}; with the other fields it must be {value!r}")
    known = {*_FIELDS.values(), *_FIXED, *derived, "dropout"}
    unknown = [field for field in config_json if field not in known and not field.startswith("_")]
    if unknown:
        raise UserError(f"{name}: the field {unknown[0]!r} is not known{closest(unknown[0], known)}")
    return config


def _derived(config: WanVAEConfig) -> dict[str, int | None]:
    return {
        "decoder_base_dim": config.base_dim,
        "scale_factor_spatial": config.spatial_stride,
        "scale_factor_temporal": config.temporal_stride,
    }


def config_to_diffusers(config: WanVAEConfig) -> dict[str, Any]:
    """Return the entries of diffusers' `vae/config.json`."""
    values = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    values = {field: list(value) if isinstance(value, tuple) else value for field, value in values.items()}
    fixed = _FIXED | _derived(config) | {"decoder_base_dim": None, "dropout": 0.0}
    entries = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0"} | values | fixed
    return dict(sorted(entries.items()))

"""The Wan2.1 video autoencoder (wan/modules/vae.py, arXiv 2503.20314).

It maps 4n + 1 frames to n + 1 latent frames with 8 times smaller sides. Frames come in groups, the first frame
and then 4 at a time, with the causal convolutions' last frames carried through a `lax.scan`: memory does not grow with
the clip, and one group is compiled, not n + 1. Blocks of one shape in a row are compiled once, too.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from avd_jax.errors import UserError
from avd_jax.models.vae_layers import (
    AttentionBlock,
    CausalConvolution,
    Convolution,
    Downsample,
    Head,
    ResidualBlock,
    RMSNorm,
    Upsample,
    linear,
)
from avd_jax.models.vae_tiles import MEMORY_GIB, Pass, Tiles, nbytes, reach
from avd_jax.shapes import Latents, Video

RGB = 3
# Bytes that layers on pixels hold for each that they keep, at most: see `Pass`.
ENCODER_WORKING, DECODER_WORKING = 5.3, 3.7


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of a WanVAE and the statistics of its latents; the defaults are Wan2.1's."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    def __post_init__(self):
        for name, count in (
            ("temporal_downsample", len(self.dim_mult) - 1),
            ("latents_mean", self.z_dim),
            ("latents_std", self.z_dim),
        ):
            if len(getattr(self, name)) != count:
                raise UserError(f"{name} has {len(getattr(self, name))} values; give {count}, as many as the VAE needs")

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent pixel, in height and in width."""
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Video frames a latent frame, after the first."""
        return 2 ** sum(self.temporal_downsample)


class Encoder(nnx.Module):
    """From a group of video frames to the mean and log-variance of its latent frame."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs, *, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        channels = config.base_dim * config.dim_mult[0]
        self.conv1 = CausalConvolution(RGB, channels, **options)
        layers = []
        for level, multiplier in enumerate(config.dim_mult):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(channels, config.base_dim * multiplier, **options))
                channels = config.base_dim * multiplier
            if level < len(config.temporal_downsample):
                layers.append(Downsample(channels, temporal=config.temporal_downsample[level], **options))
        self.downsamples = nnx.List(layers)
        self.middle = _middle(channels, options)
        self.head_norm = RMSNorm(channels, param_dtype=param_dtype)
        self.head_conv = CausalConvolution(channels, 2 * config.z_dim, **options)

    def stages(self) -> tuple[list, list]:
        """Return the layers on pixels, each of which sees near neighbours only, and then those on latents."""
        layers = [self.conv1, *self.downsamples]
        last = max(i for i, layer in enumerate(layers) if i == 0 or isinstance(layer, Downsample))
        return layers[: last + 1], [*layers[last + 1 :], *self.middle, Head(self.head_norm, self.head_conv)]

    def __call__(self, frames, past, first=False):
        """Encode frames [B F H W 3] to [B F/4 H/8 W/8 2*z_dim]; return it with the layers' pasts."""
        return apply(itertools.chain(*self.stages()), frames, past, first)


class Decoder(nnx.Module):
    """From a latent frame to its group of video frames."""

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs, *, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        channels = config.base_dim * config.dim_mult[-1]
        self.conv1 = CausalConvolution(config.z_dim, channels, **options)
        self.middle = _middle(channels, options)
        temporal = config.temporal_downsample[::-1]
        layers = []
        for level, multiplier in enumerate(config.dim_mult[::-1]):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(channels, config.base_dim * multiplier, **options))
                channels = config.base_dim * multiplier
            if level < len(temporal):
                layers.append(Upsample(channels, temporal=temporal[level], **options))
                channels //= 2
        self.upsamples = nnx.List(layers)
        self.head_norm = RMSNorm(channels, param_dtype=param_dtype)
        self.head_conv = CausalConvolution(channels, RGB, **options)

    def stages(self) -> tuple[list, list]:
        """Return the layers on latents, and then those on pixels, each of which sees near neighbours only."""
        layers = [*self.upsamples, Head(self.head_norm, self.head_conv)]
        first = next((i for i, layer in enumerate(layers) if isinstance(layer, Upsample)), len(layers) - 1)
        return [self.conv1, *self.middle, *layers[:first]], layers[first:]

    def __call__(self, frames, past, first=False):
        """Decode frames [B F H W z_dim] to [B 4F 8H 8W 3]; return it with the layers' pasts."""
        return apply(itertools.chain(*self.stages()), frames, past, first)


def _middle(channels, options):
    return nnx.List(
        [
            ResidualBlock(channels, channels, **options),
            AttentionBlock(channels, **options),
            ResidualBlock(channels, channels, **options),
        ]
    )


def apply(layers, x, past, first=False):
    """Apply layers to x [B F H W C]; `past` is a tuple with an entry for each row of alike layers, or None."""
    rows = [list(row) for _, row in itertools.groupby(layers, key=_shape_of_block)]
    pasts = [None] * len(rows) if past is None else list(past)
    for i, row in enumerate(rows):
        if isinstance(row[0], AttentionBlock):
            x = row[0](x)
        elif len(row) == 1:
            x, pasts[i] = row[0](x, pasts[i], first)
        else:
            x, pasts[i] = _apply_row(row, x, pasts[i], first)
    return x, tuple(pasts)


def _shape_of_block(layer):
    """Return what layers have in common that one compiled block can serve, and nothing else has.

    Blocks that are TPU kernels compile fast, and a loop would copy what each of them has seen in and out of a stack.
    """
    if isinstance(layer, ResidualBlock) and layer.shortcut is None and not layer.conv1.tpu_kernels:
        return layer.conv1.kernel.shape
    return id(layer)


def _apply_row(blocks, x, past, first):
    """Apply blocks of the same shape one after another in a loop; their pasts are stacked."""
    graphdefs, states = zip(*map(nnx.split, blocks), strict=True)

    def apply(x, state_and_past):
        state, past = state_and_past
        return nnx.merge(graphdefs[0], state)(x, past, first)

    return jax.lax.scan(apply, x, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), past))


class WanVAE(nnx.Module):
    """The autoencoder: `z = vae.encode(video)` and `video = vae.decode(z)`.

    Args:
      config: sizes and latent statistics.
      rngs: initial random weights; `nnx.eval_shape` builds the abstract model.
      dtype: compute dtype of the convolutions and matrix products; norms and softmax are float32.
      param_dtype: dtype of the stored parameters.
    """

    def __init__(self, config: WanVAEConfig, rngs: nnx.Rngs, *, dtype=jnp.float32, param_dtype=jnp.float32):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, rngs, **options)
        self.decoder = Decoder(config, rngs, **options)
        # Wan's names: conv1 comes after the encoder, conv2 before the decoder.
        self.conv1 = linear(2 * config.z_dim, 2 * config.z_dim, options | {"rngs": rngs})
        self.conv2 = linear(config.z_dim, config.z_dim, options | {"rngs": rngs})

    def encode(self, video: Video, *, tiles: Tiles | None = None, memory_gib: float = MEMORY_GIB) -> Latents:
        """Encode a clip to the mean of its latent posterior, normalised with Wan's mean and standard deviation.

        Args:
          video: [B F H W 3] in [-1, 1]; F = 4n + 1, H and W divisible by 8 (the config's strides).
          tiles: into how many parts height and width are cut, which are encoded one after another with what they need
            of their neighbours: the latents are the same, up to rounding. None: few enough for `memory_gib`.
          memory_gib: what a device may hold, video and parameters included.

        Returns:
          latents [B 1 + (F - 1)/4 H/8 W/8 z_dim], float32.

        Raises:
          UserError: naming the size or the dtype that does not fit; even small tiles need more memory.
        """
        video = jnp.asarray(video)
        _check_tiles(tiles)
        stride, side = self.config.temporal_stride, self.config.spatial_stride
        _check_clip("video", video, "channels", RGB)
        if (video.shape[1] - 1) % stride:
            raise UserError(f"video has {video.shape[1]} frames; give a multiple of {stride} and one more")
        for name, size in zip(("height", "width"), video.shape[2:4], strict=True):
            if size % side:
                raise UserError(f"video {name} is {size}; give a multiple of {side}")
        return _encode(*nnx.split(self), video, tiles, memory_gib)

    def decode(self, latents: Latents, *, tiles: Tiles | None = None, memory_gib: float = MEMORY_GIB) -> Video:
        """Decode latents to a clip.

        Args:
          latents: normalised latents [B F H W z_dim].
          tiles, memory_gib: as in `encode`.

        Returns:
          video [B 4(F - 1) + 1 8H 8W 3], float32, nominally in [-1, 1] but not clipped: clip when pixels are written.

        Raises:
          UserError: when the latents' axes, channels or dtype do not fit; even small tiles need more memory.
        """
        latents = jnp.asarray(latents)
        _check_tiles(tiles)
        _check_clip("latents", latents, "z_dim", self.config.z_dim)
        return _decode(*nnx.split(self), latents, tiles, memory_gib)


def computing_in(vae: WanVAE, dtype, *, tpu_kernels: bool = False) -> WanVAE:
    """Return the same VAE with convolutions and products in `dtype`, in which it stores their kernels.

    With `tpu_kernels` and bfloat16 its layers are those of `vae_kernels.py`, which run on TPUs with large VMEM only.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanVAE(vae.config, nnx.Rngs(0), dtype=dtype)))
    leaves = dict(nnx.to_flat_state(nnx.state(vae)))
    for path, leaf in nnx.to_flat_state(state):
        array = leaves[path][...]
        leaf.set_value(array.astype(dtype) if path[-1] == "kernel" else array)
    made = nnx.merge(graphdef, state)
    for _, layer in nnx.iter_modules(made):
        if isinstance(layer, Convolution):
            layer.tpu_kernels = tpu_kernels and jnp.dtype(dtype) == jnp.bfloat16
    return made


def _check_tiles(tiles) -> None:
    numbers = isinstance(tiles, tuple) and len(tiles) == 2 and all(type(n) is int and n > 0 for n in tiles)
    if tiles is not None and not numbers:
        raise UserError(f"tiles={tiles!r}: give how many in height and width, such as (1, 2), or None")


def _check_clip(name: str, array, channels_name: str, channels: int) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} is {array.dtype}; give floating-point values")
    if array.ndim != 5 or array.shape[-1] != channels or 0 in array.shape:
        raise UserError(
            f"{name} has shape {array.shape}; give [batch frames height width {channels_name}={channels}], none empty"
        )


# Compiled here, since run eagerly a scan over a fresh closure would be compiled anew by every call.
@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _encode(graphdef, state, video, tiles, memory_gib):
    vae = nnx.merge(graphdef, state)
    time, space = vae.config.temporal_stride, vae.config.spatial_stride
    pixels, latents = (functools.partial(apply, layers) for layers in vae.encoder.stages())
    sizes = {"frames_in": time, "pixels_in": space, "reach": reach(vae.encoder.stages()[0], space)}
    on_pixels = Pass(video, pixels, **sizes, working=ENCODER_WORKING)
    # The layers on latents read a copy of the result in another layout.
    tiles = tiles or on_pixels.tiles_within(memory_gib, nbytes((state, on_pixels.result)))
    features = on_pixels.run(tiles)
    moments = vae.conv1(Pass(features, latents).run())
    mean, _ = jnp.split(moments.astype(jnp.float32), 2, axis=-1)  # float32: what follows is statistics, not network
    return (mean - jnp.array(vae.config.latents_mean)) / jnp.array(vae.config.latents_std)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _decode(graphdef, state, latents, tiles, memory_gib):
    vae = nnx.merge(graphdef, state)
    time, space = vae.config.temporal_stride, vae.config.spatial_stride
    first, pixels = (functools.partial(apply, layers) for layers in vae.decoder.stages())
    latents = latents.astype(jnp.float32) * jnp.array(vae.config.latents_std) + jnp.array(vae.config.latents_mean)
    features = Pass(vae.conv2(latents), first).run()
    sizes = {"frames_out": time, "pixels_out": space, "reach": reach(vae.decoder.stages()[1], 1)}
    on_pixels = Pass(features, pixels, **sizes, working=DECODER_WORKING)
    video = jax.ShapeDtypeStruct(on_pixels.result.shape, jnp.float32)
    tiles = tiles or on_pixels.tiles_within(memory_gib, nbytes((state, video)))
    return on_pixels.run(tiles).astype(jnp.float32)

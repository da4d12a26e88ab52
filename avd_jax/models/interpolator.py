"""The frame interpolator: a 2-D U-Net that makes the latent frame between two others (docs/interpolation.md).

Three levels: a block of convolution, normalisation and ReLU each, max-pooling between them, transposed convolutions on
the way back, each followed by the skip connection and a block, and a 1x1 convolution at the end. Structure, names and
BatchNorm are those of the authors' code, so that its checkpoints load as they are.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from avd_jax.errors import UserError
from avd_jax.shapes import Array, Latents, typechecked

POOL = 2
EPS = 1e-5  # PyTorch's default

Images = Float[Array, "images height width channels"]


@dataclasses.dataclass(frozen=True)
class InterpolatorConfig:
    """Sizes of an interpolator; the defaults are the authors' code's, whose file also holds one of 512, 1024, 2048.

    Attributes:
      channels: of a latent frame.
      widths: channels of the three levels.
    """

    channels: int = 16
    widths: tuple[int, int, int] = (32, 64, 128)

    def __post_init__(self):
        if len(self.widths) != 3 or any(type(width) is not int or width < 1 for width in (*self.widths, self.channels)):
            raise UserError(
                f"the interpolator's widths={self.widths} and channels={self.channels} must be three and one positive "
                "whole numbers"
            )


class BatchNorm(nnx.Module):
    """BatchNorm in inference mode, over the last axis; its statistics are no parameters and get no gradient.

    The first ones, mean 0 and variance 1, change nothing, so that what is trained here is trained without
    normalisation, and yet fits the authors' network.
    """

    def __init__(self, width: int, param_dtype):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(width, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(width, param_dtype))

    def __call__(self, x: Images) -> Images:
        """Normalise in float32: stored variances of unused channels are tiny."""
        mean, var = (jax.lax.stop_gradient(stat[...]).astype(jnp.float32) for stat in (self.mean, self.var))
        factor = self.scale[...] * jax.lax.rsqrt(var + EPS)
        return ((x.astype(jnp.float32) - mean) * factor + self.bias[...]).astype(x.dtype)


class Block(nnx.Module):
    """3x3 convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_width: int, width: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        self.conv = nnx.Conv(
            in_width, width, (3, 3), use_bias=False, padding=1, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )
        self.norm = BatchNorm(width, param_dtype)

    def __call__(self, x: Images) -> Images:
        """Return [N H W width]."""
        return jax.nn.relu(self.norm(self.conv(x)))


class Upsample(nnx.Module):
    """Transposed convolution of stride 2 and kernel 2, whose outputs do not overlap: a matrix product a pixel."""

    def __init__(self, in_width: int, width: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (in_width, POOL, POOL, width), param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.dtype = dtype

    def __call__(self, x: Images) -> Images:
        """Return [N 2H 2W width]."""
        kernel = self.kernel[...].astype(self.dtype)
        doubled = jnp.einsum("nhwi,ipqo->nhpwqo", x.astype(self.dtype), kernel)
        return rearrange(doubled, "n h p w q o -> n (h p) (w q) o") + self.bias[...].astype(self.dtype)


class Interpolator(nnx.Module):
    """The U-Net: `longer = interpolator(latents)`.

    Args:
      config: sizes.
      rngs: initial random weights; `nnx.eval_shape` builds the abstract model.
      dtype: compute dtype.
      param_dtype: dtype of the stored parameters.
    """

    def __init__(self, config: InterpolatorConfig, rngs: nnx.Rngs, *, dtype=jnp.float32, param_dtype=jnp.float32):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        first, second, third = config.widths
        self.config, self.dtype = config, dtype
        self.enc1 = Block(2 * config.channels, first, **options)
        self.enc2 = Block(first, second, **options)
        self.enc3 = Block(second, third, **options)
        self.upconv2 = Upsample(third, second, **options)
        self.dec2 = Block(2 * second, second, **options)
        self.upconv1 = Upsample(second, first, **options)
        self.dec1 = Block(2 * first, first, **options)
        self.out_conv = nnx.Linear(first, config.channels, **options)

    @typechecked
    def __call__(self, latents: Latents) -> Float[Array, "batch 2*frames-1 height width channels"]:
        """Return the latents [B 2F-1 H W C] with a made frame between each two of [B F H W C], which are kept exactly.

        All pairs of all examples are one batch. One frame has no neighbour and comes back alone.

        Raises:
          UserError: latents of another number of channels.
        """
        if latents.shape[-1] != self.config.channels:
            raise UserError(
                f"the latents have {latents.shape[-1]} channels, the interpolator takes {self.config.channels}; "
                "use the one that was trained for this VAE"
            )
        if latents.shape[1] == 1:
            return latents
        made = self.between(left=latents[:, :-1], right=latents[:, 1:]).astype(latents.dtype)
        both = rearrange(jnp.stack([latents[:, :-1], made], axis=2), "b f two h w c -> b (f two) h w c")
        return jnp.concatenate([both, latents[:, -1:]], axis=1)

    @typechecked
    def between(self, *, left: Latents, right: Latents) -> Latents:
        """Return the frame in the middle of each pair, [B F H W C] for [B F H W C]."""
        pairs = rearrange(jnp.concatenate([left, right], axis=-1), "b f h w c -> (b f) h w c")
        middle = self._unet(pairs.astype(self.dtype))
        return rearrange(middle, "(b f) h w c -> b f h w c", b=left.shape[0])

    def _unet(self, pairs: Images) -> Images:
        height, width = pairs.shape[1:3]
        # The authors' network takes multiples of 4 only; other sizes continue at the edge and are cut again.
        edges = [(0, 0), (0, -height % POOL**2), (0, -width % POOL**2), (0, 0)]
        level1 = self.enc1(jnp.pad(pairs, edges, mode="edge"))
        level2 = self.enc2(_pool(level1))
        level3 = self.enc3(_pool(level2))
        level2 = self.dec2(jnp.concatenate([self.upconv2(level3), level2], axis=-1))
        level1 = self.dec1(jnp.concatenate([self.upconv1(level2), level1], axis=-1))
        return self.out_conv(level1)[:, :height, :width]


def _pool(x: Images) -> Images:
    return nnx.max_pool(x, (POOL, POOL), strides=(POOL, POOL))

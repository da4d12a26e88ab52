"""Layers of the Wan2.1 video autoencoder (wan/modules/vae.py): causal convolution, residual, attention, resampling.

A clip is processed in groups of frames, the first group being its first frame alone. Every layer that looks back in
time is called as `y, past = layer(x, past)`: `past` holds the last frames that it has seen, and None says that `x` is
the clip's first frame. Activations are `B F H W C`.

A loop over groups needs groups of one size. So the first frame may also come repeated to a whole group, with zeros as
its past: `layer(x, past, first)` with a true `first`, which may be traced. Then only the first frame of `y` means
anything, and the returned past is what one first frame leaves.

`layer.reach(before, after)` says how many rows and columns before and after a piece of a picture the layer must see if
what follows it must see so many of its results.

Products of float32 name their precision: by default TPUs and GPUs would round both factors, to 8 and 11 bits.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Float

from avd_jax.models import vae_kernels
from avd_jax.models.placement import LANES
from avd_jax.shapes import Array, typechecked

# Of float32 products: three bfloat16 passes on TPUs, TF32 on NVIDIA GPUs (as in PyTorch's convolutions), float32 on
# CPUs. Latents of the trained small VAE come within 1.4e-5 (TPU) and 9.6e-4 (GPU) of float32's, relative RMS; to store
# them in bfloat16 costs 1.7e-3.
PRECISION = jax.lax.Precision.HIGH
FEW_CHANNELS = 32  # fewer results than that of a pixel are not made by a kernel
SCORES_BYTES = 2**28  # of one frame's attention that are held at a time

Frames = Float[Array, "batch frames height width in_channels"]
Kernel = Float[Array, "frame_taps row_taps column_taps in_channels out_channels"]
ConvolvedFrames = Float[Array, "batch out_frames out_height out_width out_channels"]


@typechecked
def convolve(
    x: Frames,
    kernel: Kernel,
    *,
    strides: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
) -> ConvolvedFrames:
    """Convolve over frames, rows and columns.

    Args:
      x: [B F H W in_channels].
      kernel: [T R S in_channels out_channels], in the dtype of x.
      strides: over frames, rows and columns.
      padding: zeros before and after the rows, and the columns; frames are not padded.

    Returns:
      [B (F - T) // strides[0] + 1 H' W' out_channels].
    """
    # XLA's 3-D convolution is 1.3 to 20 times slower than its 2-D one on CPU, and 1.1 to 1.75 times faster on TPU.
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_convolve_by_tap, strides=strides, padding=padding),
        default=functools.partial(_convolve_3d, strides=strides, padding=padding),
    )


def _convolve_3d(x, kernel, *, strides, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        ((0, 0), *padding),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=PRECISION,
    )


def _convolve_by_tap(x, kernel, *, strides, padding):
    taps = kernel.shape[0]
    stride, *strides_2d = strides
    frames = (x.shape[1] - taps) // stride + 1

    def convolve_2d(tap):
        seen = x[:, tap : tap + (frames - 1) * stride + 1 : stride]
        return jax.lax.conv_general_dilated(
            rearrange(seen, "b f h w c -> (b f) h w c"),
            kernel[tap],
            strides_2d,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,  # the taps are added up before rounding, as inside a 3-D convolution
        )

    y = sum(convolve_2d(tap) for tap in range(taps)).astype(x.dtype)
    return rearrange(y, "(b f) h w c -> b f h w c", f=frames)


class Convolution(nnx.Module):
    """Convolution with a bias, over frames without padding (see `convolve`).

    Attributes:
      kernel: [T R S in_channels out_channels].
      bias: [out_channels].
      tpu_kernels: whether it runs on a TPU that `vae_kernels.py` serves, in bfloat16; see `wan_vae.computing_in`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        *,
        rngs: nnx.Rngs,
        dtype,
        param_dtype,
        strides: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    ):
        shape = (*kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))
        self.strides, self.padding, self.dtype, self.tpu_kernels = strides, padding, dtype, False

    def __call__(self, x, *, last_taps: int | None = None):
        """Apply to x [B F H W C]; with `last_taps`, only that many of the kernel's last frame taps."""
        taps = self.kernel.shape[0] if last_taps is None else last_taps
        kernel = self.kernel[...][-taps:].astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, strides=self.strides, padding=self.padding)
        return y + self.bias[...].astype(self.dtype)


class CausalConvolution(Convolution):
    """3x3x3 convolution that keeps all sizes; each frame sees itself and the two before it, zeros before the clip."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        super().__init__(
            in_channels,
            out_channels,
            (3, 3, 3),
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            padding=((1, 1), (1, 1)),
        )

    def __call__(self, x, past, first=False):
        """Apply to x [B F H W C] after `past`, the two frames before it [B 2 H W C]; return y and x's last two."""
        if past is None:
            # Both earlier taps would see zeros only.
            return super().__call__(x, last_taps=1), jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([past, x], axis=1)
        return super().__call__(x), jnp.where(first, x[:, 1:3], x[:, -2:])

    def reach(self, before: int, after: int) -> tuple[int, int]:
        """See above."""
        return before + 1, after + 1


class RMSNorm(nnx.Module):
    """Root-mean-square norm over channels with a learnt scale, in float32."""

    def __init__(self, channels: int, *, param_dtype):
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))

    def __call__(self, x):
        """Normalise x [... C]; an all-zero vector stays zero."""
        # Squares of bf16 activations over hundreds of channels lose the low bits that the norm divides by.
        wide = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        normalised = wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * x.shape[-1] ** 0.5
        return (normalised * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def linear(in_channels: int, out_channels: int, options) -> nnx.Linear:
    """Return a linear layer over channels whose products have the VAE's precision."""
    return nnx.Linear(in_channels, out_channels, precision=PRECISION, **options)


def _convolve_activated(norm: RMSNorm, conv: CausalConvolution, x, past, first, skip=None):
    """Return conv(silu(norm(x)), past, first), with `skip` added to its first result."""
    graphdef, state = nnx.split((norm, conv))

    def plain(state, x, past, first, skip):
        norm, conv = nnx.merge(graphdef, state)
        y, past = conv(jax.nn.silu(norm(x)), past, first)
        return y if skip is None else y + skip, past

    def fused(state, x, past, first, skip):
        norm, conv = nnx.merge(graphdef, state)
        params = {"scale": norm.scale[...], "kernel": conv.kernel[...].astype(conv.dtype), "bias": conv.bias[...]}
        return vae_kernels.convolve_activated(x, past, first, skip=skip, **params)

    # A kernel's results fill whole registers: RGB alone would take 43 times the memory, and so would the video.
    if past is None or not conv.tpu_kernels or conv.kernel.shape[-1] < FEW_CHANNELS:
        return plain(state, x, past, first, skip)
    return _with_gradients_of(plain, fused, state, x, past, jnp.asarray(first), skip)


def _with_gradients_of(plain, kernel, *args):
    """Return `kernel` of arguments; gradients are those of `plain`."""
    both = jax.custom_vjp(kernel)
    both.defvjp(lambda *args: (kernel(*args), args), lambda args, gradient: jax.vjp(plain, *args)[1](gradient))
    return both(*args)


class Head:
    """Norm, SiLU and causal convolution, which end a network."""

    def __init__(self, norm: RMSNorm, conv: CausalConvolution):
        self._norm, self._conv, self.reach = norm, conv, conv.reach

    def __call__(self, x, past, first=False):
        """Apply to x [B F H W C]; `past` is the convolution's."""
        return _convolve_activated(self._norm, self._conv, x, past, first)


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU and causal convolution, added to the input (through `shortcut` if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = RMSNorm(in_channels, param_dtype=param_dtype)
        self.conv1 = CausalConvolution(in_channels, out_channels, **options)
        self.norm2 = RMSNorm(out_channels, param_dtype=param_dtype)
        self.conv2 = CausalConvolution(out_channels, out_channels, **options)
        self.shortcut = linear(in_channels, out_channels, options) if in_channels != out_channels else None

    def __call__(self, x, past, first=False):
        """Apply to x [B F H W in_channels]; `past` is the pair of both convolutions' pasts."""
        past1, past2 = (None, None) if past is None else past
        skip = x if self.shortcut is None else self.shortcut(x)
        x, past1 = _convolve_activated(self.norm1, self.conv1, x, past1, first)
        x, past2 = _convolve_activated(self.norm2, self.conv2, x, past2, first, skip)
        return x, (past1, past2)

    def reach(self, before: int, after: int) -> tuple[int, int]:
        """See above."""
        return before + 2, after + 2


class AttentionBlock(nnx.Module):
    """Self-attention among the pixels of one frame, with a single head as wide as the channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm = RMSNorm(channels, param_dtype=param_dtype)
        self.to_qkv = linear(channels, 3 * channels, options)
        self.proj = linear(channels, channels, options)

    def __call__(self, x):
        """Apply to x [B F H W C]."""
        batch, _, height, width, _ = x.shape
        query, key, value = rearrange(self.to_qkv(self.norm(x)), "b f h w (three c) -> three (b f) (h w) 1 c", three=3)

        def attend(query):
            # No fused kernel has heads of 384 channels; XLA's path keeps scores and softmax in float32.
            with jax.default_matmul_precision(PRECISION.name.lower()):
                return jax.nn.dot_product_attention(query, key, value, implementation="xla")

        row_of_scores = 4 * len(query) * width * height * width
        rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * row_of_scores <= SCORES_BYTES))
        if rows == height:
            attended = attend(query)
        else:
            parts = jax.lax.map(attend, rearrange(query, "n (p q) 1 c -> p n q 1 c", q=rows * width))
            attended = rearrange(parts, "p n q 1 c -> n (p q) 1 c")
        return x + self.proj(rearrange(attended, "(b f) (h w) 1 c -> b f h w c", b=batch, h=height))


class Downsample(nnx.Module):
    """Halve height and width; if `temporal`, also the frames, except the clip's first."""

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.conv = Convolution(channels, channels, (1, 3, 3), strides=(1, 2, 2), padding=((0, 1), (0, 1)), **options)
        self.time_conv = Convolution(channels, channels, (3, 1, 1), strides=(2, 1, 1), **options) if temporal else None

    def __call__(self, x, past, first=False):
        """Apply to x [B F H W C], F even after the first frame; `past` is the half-size frame before it."""
        x = self.conv(x)
        if self.time_conv is None:
            return x, None
        if past is None:
            return x, x
        halved = self.time_conv(jnp.concatenate([past, x], axis=1))
        return jnp.where(first, x[:, : halved.shape[1]], halved), jnp.where(first, x[:, :1], x[:, -1:])

    def reach(self, before: int, after: int) -> tuple[int, int]:
        """See above."""
        return 2 * before, 2 * after + 1  # a result at i sees 2i, 2i + 1 and 2i + 2


class Upsample(nnx.Module):
    """Double height and width and halve the channels; if `temporal`, double the frames, except the clip's first."""

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.time_conv = Convolution(channels, 2 * channels, (3, 1, 1), **options) if temporal else None
        self.conv = Convolution(channels, channels // 2, (1, 3, 3), padding=((1, 1), (1, 1)), **options)

    def __call__(self, x, past, first=False):
        """Apply to x [B F H W C]; `past` is the two frames before it, as the time convolution sees them."""
        if self.time_conv is not None:
            if past is None:
                # The second frame sees zeros in place of the first, so the first is not handed on.
                past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
            else:
                seen = jnp.concatenate([past, x], axis=1)
                past = jnp.where(first, 0, seen[:, -2:])
                x = jnp.where(first, jnp.concatenate([x, x], axis=-1), self.time_conv(seen))
                return self._enlarge(x, 2), past
        return self._enlarge(x, 1), past

    def _enlarge(self, x, parts):
        """Double height and width of frames, `parts` of which stand side by side in the channels."""
        graphdef, state = nnx.split(self.conv)

        def plain(state, x):
            x = rearrange(x, "b f h w (parts c) -> b (f parts) h w c", parts=parts)
            return nnx.merge(graphdef, state)(repeat(x, "b f h w c -> b f (h two) (w deux) c", two=2, deux=2))

        def fused(state, x):
            conv = nnx.merge(graphdef, state)
            kernel = conv.kernel[...][0].astype(conv.dtype)
            return vae_kernels.upsample(x, kernel=kernel, bias=conv.bias[...], parts=parts)

        whole_registers = parts == 1 or x.shape[-1] // parts % LANES == 0
        if self.conv.tpu_kernels and whole_registers:
            return _with_gradients_of(plain, fused, state, x)
        return plain(state, x)

    def reach(self, before: int, after: int) -> tuple[int, int]:
        """See above."""
        return -(-(before + 1) // 2), -(-(after + 1) // 2)

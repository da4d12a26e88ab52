"""TPU kernels of the Wan2.1 video autoencoder: norm, SiLU and causal convolution in one, and upsampling in one.

XLA pads, cuts and copies a frame around each convolution of one clip, and goes through it five times more for norm,
SiLU, bias and residual. These kernels read it once and write it once. A cell of the grid takes a few whole rows of all
frames, with a row more on each side, and holds them in the vector memory (VMEM), where columns are sublanes and
channels lanes. Then three things keep the matrix units busy:

* All taps over frames and rows are one product: their inputs stand side by side in the lanes, whole registers each.
* Taps over columns are columns of that product, and what they give is moved by one column in float32: one rotation,
  where moving the bfloat16 inputs would mean to unpack them.
* Nearest-neighbour upsampling before a 3x3 convolution is a 2x2 convolution for each of the four pixels that one
  becomes: 16 taps where there were 36.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from avd_jax.models.placement import LANES
from avd_jax.models.splash import round_up

CONVOLVE, UPSAMPLE = "vae_convolve", "vae_upsample"  # in profiles and in the compiler's dumps
VMEM_BYTES = 60 * 2**20  # that a kernel may use; a core of v5p has 64 MiB, v5e and v6e have 128
_BLOCK_BYTES = 44 * 2**20  # of that for blocks and what is made of them
_MOST_ROWS = 8
_PACKED = 16  # rows of a bfloat16 register


def convolve_activated(x, past, first, *, scale, kernel, bias, skip=None, interpret: bool = False):
    """Return the causal 3x3x3 convolution of silu(norm(x)), and the last two frames that it has seen.

    Norm, SiLU, sums and `skip` are float32, and the result is rounded once.

    Args:
      x: [B F H W in_channels].
      past: [B 2 H W in_channels], the two frames before x after norm and SiLU.
      first: whether x is the first frame of a clip, repeated; see `vae_layers.py`.
      scale: [in_channels], of the root-mean-square norm.
      kernel: [3 3 3 in_channels out_channels], in the dtype of x.
      bias: [out_channels].
      skip: [B F H W out_channels] to add, or None.
      interpret: run the kernels' bodies step by step, on any backend.

    Returns:
      [B F H W out_channels] and [B 2 H W in_channels], in the dtype of x.
    """
    batch, frames, height, width, channels = x.shape
    out_channels = kernel.shape[-1]
    lanes, out_lanes = round_up(channels, LANES), round_up(out_channels, LANES)
    taps = jnp.pad(kernel, ((0, 0),) * 3 + ((0, lanes - channels), (0, out_lanes - out_channels)))
    taps = taps.transpose(0, 1, 3, 2, 4).reshape(9 * lanes, 3 * out_lanes)  # frames and rows; columns side by side
    bias = jnp.pad(bias.astype(jnp.float32), (0, out_lanes - out_channels))[None]
    scale = scale.astype(jnp.float32)[None]
    skips = [] if skip is None else [skip]
    # Blocks come and go while the one between them is at work; the scratch is one.
    padded = round_up(width, _PACKED)
    held = (4 * (frames + 2) + frames + 2) * lanes + 2 * frames * out_lanes * (1 + len(skips))
    rows = _rows(height, padded * held * x.dtype.itemsize, taps)
    blocks = functools.partial(_with_neighbours, rows=rows, height=height, width=width)
    # What is added is not needed again, and its place is the result's: a cell reads its rows before it writes them.
    aliases = {10: 0} if skips else {}
    convolve = pl.pallas_call(
        functools.partial(_convolve, height=height),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, height // rows),
            in_specs=[
                *blocks(frames, channels),
                *blocks(2, channels),
                *map(_whole, (scale, taps, bias)),
                *[_rows_of(frames, rows, width, out_channels) for _ in skips],
            ],
            out_specs=[_rows_of(frames, rows, width, out_channels), _rows_of(2, rows, width, channels)],
            scratch_shapes=[pltpu.VMEM((frames + 2, rows + 2, padded, lanes), x.dtype)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, frames, height, width, out_channels), x.dtype),
            jax.ShapeDtypeStruct(past.shape, x.dtype),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name=(name := f"{CONVOLVE}_{frames}x{height}x{width}_{channels}_{out_channels}_{rows}" + "_add" * len(skips)),
    )
    with jax.named_scope(name):  # the compiler's dumps take the name from here
        return convolve(jnp.asarray(first, jnp.int32).reshape(1), x, x, x, past, past, past, scale, taps, bias, *skips)


def _convolve(first, x, above, below, past, past_above, past_below, scale, taps, bias, *rest, height):
    """Convolve some rows.

    Args:
      first: [1].
      x, above, below: [F rows W C], and [F 1 W C] of the rows before and after them.
      past, past_above, past_below: likewise, of two frames.
      scale, taps, bias: as the product needs them.
      rest: skip [F rows W N] if there is one, the outputs of the shape of `x` and `past`, and `seen`: room for all
        frames and rows after norm and SiLU, its columns and channels filled up with zeros.
      height: of the picture.
    """
    *skip, out, kept, seen = rest
    frames, rows, width, channels = x.shape
    columns, out_channels, out_lanes = seen.shape[2], out.shape[-1], bias.shape[-1]
    inside_above, inside_below = _neighbours_exist(rows, height)

    def put(frame, row, values):
        seen[frame, row, :width] = _filled_up(values, seen.shape[-1])

    def activate(values):
        wide = values.astype(jnp.float32)
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        half = wide * (lax.rsqrt(jnp.maximum(square, 1e-24)) * (0.5 * channels**0.5)) * scale[...]
        return (half + half * jnp.tanh(half)).astype(seen.dtype)  # silu(2 half), with one transcendental

    if columns > width:
        seen[:, :, width:] = jnp.zeros((*seen.shape[:2], columns - width, seen.shape[-1]), seen.dtype)
    for frame in range(2):
        put(frame, 0, jnp.where(inside_above, past_above[frame, 0], 0))
        put(frame, rows + 1, jnp.where(inside_below, past_below[frame, 0], 0))

    @_loop(frames, 1)
    def _(frame, _):
        put(frame + 2, 0, activate(jnp.where(inside_above, above[frame, 0], 0)))
        put(frame + 2, rows + 1, activate(jnp.where(inside_below, below[frame, 0], 0)))

    @_loop(2, rows)
    def _(frame, row):
        put(frame, row + 1, past[frame, row])

    @_loop(frames, rows)
    def _(frame, row):
        put(frame + 2, row + 1, activate(x[frame, row]))

    begin = jnp.where(first[0] != 0, 1, frames)  # the first frame comes repeated, and counts once

    @_loop(2, rows)
    def _(frame, row):
        kept[frame, row] = seen[begin + frame, row + 1, :width, :channels]

    @_loop(frames, rows)
    def _(frame, row):
        side_by_side = [seen[frame + t, row + r] for t in range(3) for r in range(3)]
        sums = _product(jnp.concatenate(side_by_side, axis=-1), taps[...])
        left, middle, right = (sums[:, i * out_lanes : (i + 1) * out_lanes] for i in range(3))
        y = _from_the_left(left) + middle + _from_the_right(right, width) + bias[...]
        y = y[:width, :out_channels]
        for one in skip:
            y = y + one[frame, row].astype(jnp.float32)
        out[frame, row] = y.astype(out.dtype)


def upsample(x, *, kernel, bias, parts: int = 1, interpret: bool = False):
    """Return the 3x3 convolution of x with height and width doubled by repeating each pixel.

    Args:
      x: [B F H W parts*in_channels]; `parts` frames that follow one another stand side by side in the channels.
      kernel: [3 3 in_channels out_channels], in the dtype of x.
      bias: [out_channels].
      parts: above 1, in_channels is a multiple of LANES.
      interpret: as above.

    Returns:
      [B parts*F 2H 2W out_channels], in the dtype of x.
    """
    batch, frames, height, width, channels = x.shape
    channels //= parts
    out_channels = kernel.shape[-1]
    lanes, out_lanes = round_up(channels, LANES), round_up(out_channels, LANES)
    padded = round_up(width, _PACKED)
    taps = jnp.pad(kernel, ((0, 0), (0, 0), (0, lanes - channels), (0, out_lanes - out_channels)))
    taps = _of_phases(_of_phases(taps, 0), 2)  # [row phase, row, column phase, column, in, out]
    taps = taps.transpose(0, 1, 4, 2, 3, 5).reshape(2, 2 * lanes, 4 * out_lanes)
    bias = jnp.pad(bias.astype(jnp.float32), (0, out_lanes - out_channels))[None]
    held = (2 + 1) * lanes + 2 * 4 * out_lanes
    rows = _rows(height, padded * held * x.dtype.itemsize, taps)
    last = height - 1

    def place(row):
        return lambda b, f, i: (b, lax.div(f, parts), row(i), 0, lax.rem(f, parts))

    enlarge = pl.pallas_call(
        functools.partial(_upsample, height=height),
        grid=(batch, frames * parts, height // rows),
        in_specs=[
            pl.BlockSpec((None, None, rows, width, channels), place(lambda i: i)),
            pl.BlockSpec((None, None, 1, width, channels), place(lambda i: jnp.maximum(i * rows - 1, 0))),
            pl.BlockSpec((None, None, 1, width, channels), place(lambda i: jnp.minimum(i * rows + rows, last))),
            *map(_whole, (taps, bias)),
        ],
        out_specs=pl.BlockSpec((None, None, 2 * rows, 2 * width, out_channels), lambda b, f, i: (b, f, i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, frames * parts, 2 * height, 2 * width, out_channels), x.dtype),
        scratch_shapes=[
            pltpu.VMEM((rows + 2, padded, lanes), x.dtype),
            *[pltpu.VMEM((2 * padded, LANES), jnp.float32)] * (out_lanes // LANES),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name=(name := f"{UPSAMPLE}_{frames * parts}x{height}x{width}_{channels}_{out_channels}_{rows}"),
    )
    with jax.named_scope(name):
        return enlarge(x, x, x, taps, bias)


def _of_phases(taps, axis):
    """Split an axis of 3 taps on repeated pixels into [phase, tap] of 2x2 taps on the pixels themselves."""
    before, own, after = (lax.index_in_dim(taps, i, axis, keepdims=False) for i in range(3))
    even, odd = jnp.stack([before, own + after], axis), jnp.stack([before + own, after], axis)
    return jnp.stack([even, odd], axis)


def _upsample(x, above, below, taps, bias, out, seen, *wide, height):
    """Upsample some rows.

    Args:
      x, above, below: [rows W C], and [1 W C] of the rows before and after them.
      taps: [2 2*C 4*N], for even and odd rows; of even columns those on the left and on the pixel, then of odd columns.
      bias: [1 N].
      out: [2*rows 2*W N].
      seen: room for all rows, columns and channels filled up with zeros.
      wide: for each register's lanes room for a row of the result, in float32: its columns can be written two apart.
      height: of the picture.
    """
    rows, width, _ = x.shape
    columns, out_channels, lanes = seen.shape[1], out.shape[-1], bias.shape[-1]
    inside_above, inside_below = _neighbours_exist(rows, height, axis=2)
    if columns > width:
        seen[:, width:] = jnp.zeros((rows + 2, columns - width, seen.shape[-1]), seen.dtype)
    seen[0, :width] = _filled_up(jnp.where(inside_above, above[0], 0), seen.shape[-1])
    seen[rows + 1, :width] = _filled_up(jnp.where(inside_below, below[0], 0), seen.shape[-1])

    @_loop(rows, 1)
    def _(row, _):
        seen[row + 1, :width] = _filled_up(x[row], seen.shape[-1])

    @_loop(rows, 2)
    def _(row, phase):
        side_by_side = jnp.concatenate([seen[row + phase], seen[row + phase + 1]], axis=-1)
        sums = _product(side_by_side, taps[phase])
        left, even, odd, right = (sums[:, i * lanes : (i + 1) * lanes] for i in range(4))
        halves = _from_the_left(left) + even + bias[...], odd + _from_the_right(right, width) + bias[...]
        for register, row_of in enumerate(wide):
            here = slice(register * LANES, min((register + 1) * LANES, out_channels))
            for i, half in enumerate(halves):
                row_of[pl.ds(i, columns, stride=2), :] = half[:, register * LANES : (register + 1) * LANES]
            out[2 * row + phase, :, here] = row_of[: 2 * width, : here.stop - here.start].astype(out.dtype)


def _product(x, taps):
    # The precision is named, since one that a user sets for all products is none that a kernel has for bfloat16.
    return jnp.dot(x, taps, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _from_the_left(sums):
    """Move [columns N] one column to the right; the first gets zeros."""
    return jnp.where(_column(sums) == 0, 0.0, pltpu.roll(sums, 1, 0))


def _from_the_right(sums, width):
    """Move [columns N] one column to the left; the last of `width` gets zeros."""
    return jnp.where(_column(sums) == width - 1, 0.0, pltpu.roll(sums, sums.shape[0] - 1, 0))


def _column(sums):
    return lax.broadcasted_iota(jnp.int32, sums.shape, 0)


def _filled_up(values, lanes):
    missing = lanes - values.shape[-1]
    if not missing:
        return values
    return jnp.concatenate([values, jnp.zeros((*values.shape[:-1], missing), values.dtype)], axis=-1)


def _loop(frames, rows):
    """Run a function of a frame and a row for each of them, in a loop that is compiled once."""

    def run(body):
        lax.fori_loop(0, frames * rows, lambda i, _: body(lax.div(i, rows), lax.rem(i, rows)), None)

    return run


def _neighbours_exist(rows, height, axis=1):
    """Return whether there is a row above those of this cell, and one below."""
    cell = pl.program_id(axis)
    return cell > 0, (cell + 1) * rows < height


def _rows(height: int, row_bytes: int, taps) -> int:
    """Return how many rows a cell takes: a divisor of the height."""
    room = _BLOCK_BYTES - taps.size * taps.dtype.itemsize
    return max(n for n in range(1, _MOST_ROWS + 1) if height % n == 0 and (n == 1 or n * row_bytes <= room))


def _whole(array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))


def _rows_of(frames, rows, width, channels) -> pl.BlockSpec:
    return pl.BlockSpec((None, frames, rows, width, channels), lambda b, i, *_: (b, 0, i, 0, 0))


def _with_neighbours(frames, channels, *, rows, height, width) -> list[pl.BlockSpec]:
    """Return the blocks of a cell's rows, of the row above them and of the row below, or of any where there is none."""
    one = None, frames, 1, width, channels
    return [
        _rows_of(frames, rows, width, channels),
        pl.BlockSpec(one, lambda b, i, *_: (b, 0, jnp.maximum(i * rows - 1, 0), 0, 0)),
        pl.BlockSpec(one, lambda b, i, *_: (b, 0, jnp.minimum(i * rows + rows, height - 1), 0, 0)),
    ]

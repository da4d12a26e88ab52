"""RAFT: the optical flow from one picture to another (the large model).

Sources: arXiv 2003.12039; `core/raft.py`, `extractor.py`, `corr.py` and `update.py` of princeton-vl/RAFT, which VBench
has a copy of. Names are theirs.

Two pictures become features at an eighth of their size, and all pairs of their pixels are correlated. From a flow of 0
on, each step reads the correlations around the places that the flow points to, and a recurrent unit makes a correction
of the flow from them. The last flow is brought to full size by a learnt mean of 3 x 3 neighbours.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from avd_jax.models.interpolator import BatchNorm
from avd_jax.models.linear import einsum
from avd_jax.shapes import Array, typechecked

Pictures = Float[Array, "batch height width 3"]
Flow = Float[Array, "batch height width 2"]

STEPS = 20  # VBench's
SCALE = 8  # pixels of a side that become one
SMALLEST = 128  # pixels of a side: below, the coarsest correlations have no two pixels to read between
_EPS = 1e-5


@dataclass(frozen=True)
class RAFTConfig:
    """Sizes; the defaults are those of the published large models.

    Attributes:
      widths: channels of the encoders' three stages.
      feature_dim: channels of the features that are correlated.
      hidden_dim: of the recurrent unit.
      context_dim: what the recurrent unit sees of the first picture.
      levels: sizes at which correlations are read, each half the one before.
      radius: pixels around a place, at each level, at which they are read.
      motion_widths: channels of the two convolutions on correlations, and of the two on the flow.
      motion_dim: channels of what both become, the flow's own two among them.
      head_dim: hidden channels of the correction and of the mask.
    """

    widths: tuple[int, int, int] = (64, 96, 128)
    feature_dim: int = 256
    hidden_dim: int = 128
    context_dim: int = 128
    levels: int = 4
    radius: int = 4
    motion_widths: tuple[int, int, int, int] = (256, 192, 128, 64)
    motion_dim: int = 128
    head_dim: int = 256

    @property
    def correlations(self) -> int:
        """Correlations that are read for a pixel."""
        return self.levels * (2 * self.radius + 1) ** 2


def _conv(inputs: int, outputs: int, size: int | tuple[int, int], *, stride: int = 1, rngs: nnx.Rngs, param_dtype):
    """Return a convolution with a bias, and zeros around, which keeps the size but for its stride."""
    size = (size, size) if isinstance(size, int) else size
    padding = [(side // 2, side // 2) for side in size]
    options = {"dtype": jnp.float32, "param_dtype": param_dtype, "precision": jax.lax.Precision.HIGHEST}
    return nnx.Conv(inputs, outputs, size, strides=stride, padding=padding, rngs=rngs, **options)


class InstanceNorm(nnx.Module):
    """Each channel of each picture with mean 0 and variance 1; it has no parameters."""

    def __call__(self, x: Array) -> Array:
        """Normalise x [B H W C]."""
        x = x - jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(1, 2), keepdims=True) + _EPS)


def _norm(batch: bool, width: int, param_dtype) -> nnx.Module:
    return BatchNorm(width, param_dtype) if batch else InstanceNorm()


class ResidualBlock(nnx.Module):
    """Twice convolution, norm and ReLU, added to the input, which has a convolution and a norm if there is a stride."""

    def __init__(self, inputs: int, width: int, *, stride: int, batch: bool, rngs: nnx.Rngs, param_dtype):
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.conv1 = _conv(inputs, width, 3, stride=stride, **options)
        self.conv2 = _conv(width, width, 3, **options)
        self.norm1, self.norm2 = (_norm(batch, width, param_dtype) for _ in range(2))
        self.downsample = _conv(inputs, width, 1, stride=stride, **options) if stride > 1 else None
        self.norm3 = _norm(batch, width, param_dtype) if stride > 1 else None

    def __call__(self, x: Array) -> Array:
        """Apply to x [B H W inputs]."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        if self.downsample is not None:
            x = self.norm3(self.downsample(x))
        return jax.nn.relu(x + y)


class Encoder(nnx.Module):
    """Pictures to features at an eighth of their size."""

    def __init__(self, config: RAFTConfig, outputs: int, *, batch: bool, rngs: nnx.Rngs, param_dtype):
        options = {"rngs": rngs, "param_dtype": param_dtype}
        first, *_ = widths = config.widths
        self.conv1 = _conv(3, first, 7, stride=2, **options)
        self.norm1 = _norm(batch, first, param_dtype)
        stages = []
        for inputs, width, stride in zip((first, *widths), widths, (1, 2, 2), strict=False):
            block = ResidualBlock(inputs, width, stride=stride, batch=batch, **options)
            stages.append(nnx.List([block, ResidualBlock(width, width, stride=1, batch=batch, **options)]))
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = _conv(widths[-1], outputs, 1, **options)

    def __call__(self, x: Array) -> Array:
        """Return [B H/8 W/8 outputs] for x [B H W 3]."""
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.conv2(x)


class MotionEncoder(nnx.Module):
    """Correlations and flow to features of the motion, the last two of which are the flow itself."""

    def __init__(self, config: RAFTConfig, **options):
        one, two, three, four = config.motion_widths
        self.convc1, self.convc2 = _conv(config.correlations, one, 1, **options), _conv(one, two, 3, **options)
        self.convf1, self.convf2 = _conv(2, three, 7, **options), _conv(three, four, 3, **options)
        self.conv = _conv(two + four, config.motion_dim - 2, 3, **options)

    def __call__(self, flow: Array, correlations: Array) -> Array:
        """Return [B h w motion_dim]."""
        seen = jax.nn.relu(self.convc2(jax.nn.relu(self.convc1(correlations))))
        known = jax.nn.relu(self.convf2(jax.nn.relu(self.convf1(flow))))
        return jnp.concatenate([jax.nn.relu(self.conv(jnp.concatenate([seen, known], -1))), flow], -1)


class RecurrentUnit(nnx.Module):
    """A gated recurrent unit along the rows, and another along the columns."""

    def __init__(self, config: RAFTConfig, **options):
        inputs = config.hidden_dim + config.context_dim + config.motion_dim
        for name in "zrq":
            setattr(self, f"conv{name}1", _conv(inputs, config.hidden_dim, (1, 5), **options))
            setattr(self, f"conv{name}2", _conv(inputs, config.hidden_dim, (5, 1), **options))

    def __call__(self, hidden: Array, x: Array) -> Array:
        """Return the next hidden state [B h w hidden_dim]."""
        for update, reset, candidate in (
            (self.convz1, self.convr1, self.convq1),
            (self.convz2, self.convr2, self.convq2),
        ):
            both = jnp.concatenate([hidden, x], -1)
            share = jax.nn.sigmoid(update(both))
            kept = jax.nn.sigmoid(reset(both)) * hidden
            hidden = (1 - share) * hidden + share * jnp.tanh(candidate(jnp.concatenate([kept, x], -1)))
        return hidden


class Head(nnx.Module):
    """Two convolutions with a ReLU between them."""

    def __init__(self, config: RAFTConfig, outputs: int, size: int, **options):
        self.conv1 = _conv(config.hidden_dim, config.head_dim, 3, **options)
        self.conv2 = _conv(config.head_dim, outputs, size, **options)

    def __call__(self, x: Array) -> Array:
        """Apply to x [B h w hidden_dim]."""
        return self.conv2(jax.nn.relu(self.conv1(x)))


class UpdateBlock(nnx.Module):
    """What one step is made of."""

    def __init__(self, config: RAFTConfig, **options):
        self.encoder = MotionEncoder(config, **options)
        self.gru = RecurrentUnit(config, **options)
        self.flow_head = Head(config, 2, 3, **options)
        self.mask = Head(config, 9 * SCALE**2, 1, **options)


class RAFT(nnx.Module):
    """The flow from pictures to others; all in float32.

    Args:
      config: the sizes.
      rngs: keys for the random initialisation.
      param_dtype: of the stored parameters.
    """

    def __init__(self, config: RAFTConfig, rngs: nnx.Rngs, *, param_dtype=jnp.float32):
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.config = config
        self.fnet = Encoder(config, config.feature_dim, batch=False, **options)
        self.cnet = Encoder(config, config.hidden_dim + config.context_dim, batch=True, **options)
        self.update_block = UpdateBlock(config, **options)

    @typechecked
    def __call__(self, first: Pictures, second: Pictures, steps: int = STEPS) -> Flow:
        """Return for each pixel of the first pictures how far to the right and down it is in the second, in pixels.

        A pair has (H W / 64)^2 correlations, and a third of it more for the smaller sizes: with all else 0.4 GiB at
        480 x 832 and 2.3 GiB at 720 x 1280, however many steps there are.

        Args:
          first: values in 0..255; height and width are multiples of 8 and 128 at least (see `padded`).
          second: of the same shape.
          steps: corrections of the flow.

        Raises:
          ValueError: another height or width.
        """
        if any(side % SCALE or side < SMALLEST for side in first.shape[1:3]):
            raise ValueError(f"pictures of {first.shape[1]} x {first.shape[2]}; RAFT takes multiples of 8 from 128 on")
        first, second = (2 * (x.astype(jnp.float32) / 255) - 1 for x in (first, second))
        pyramid = self._correlations(*jnp.split(self.fnet(jnp.concatenate([first, second])), 2))
        hidden, context = jnp.split(self.cnet(first), [self.config.hidden_dim], -1)
        context = jax.nn.relu(context)
        rows, columns = hidden.shape[1:3]
        places = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1).astype(jnp.float32)

        def step(state, _):
            hidden, flow = state
            motion = self.update_block.encoder(flow, self._around(pyramid, places + flow))
            hidden = self.update_block.gru(hidden, jnp.concatenate([context, motion], -1))
            return (hidden, flow + self.update_block.flow_head(hidden)), None

        start = (jnp.tanh(hidden), jnp.zeros((*hidden.shape[:3], 2), jnp.float32))
        (hidden, flow), _ = jax.lax.scan(step, start, length=steps)
        return _enlarged(flow, 0.25 * self.update_block.mask(hidden))

    def _correlations(self, first: Array, second: Array) -> list[Array]:
        """Return the correlation of all pairs [B h w h w], and the same with the second picture's sides halved."""
        level = einsum("bhwc,bijc->bhwij", first, second) / self.config.feature_dim**0.5
        pyramid = [level]
        for _ in range(self.config.levels - 1):
            even = level[..., : level.shape[-2] // 2 * 2, : level.shape[-1] // 2 * 2]
            level = jnp.mean(rearrange(even, "b h w (i p) (j q) -> b h w i j p q", p=2, q=2), (-2, -1))
            pyramid.append(level)
        return pyramid

    def _around(self, pyramid: list[Array], places: Array) -> Array:
        """Return the correlations around places [B h w 2] (x, y): [B h w correlations], for x outer and y inner.

        Between pixels they are interpolated; beyond the edge they are 0. Both is a product with a matrix of weights for
        the rows and one for the columns, since a device for such products is slow at gathering.
        """
        offsets = jnp.arange(-self.config.radius, self.config.radius + 1)
        found = []
        for number, level in enumerate(pyramid):
            at = places[..., None] / 2**number + offsets  # [B h w 2 n]
            columns, rows = (
                jnp.maximum(0, 1 - jnp.abs(at[..., axis, :, None] - jnp.arange(level.shape[-1 - axis])))
                for axis in (0, 1)
            )
            narrow = einsum("bhwij,bhwyi->bhwyj", level, rows)
            found.append(rearrange(einsum("bhwyj,bhwxj->bhwxy", narrow, columns), "b h w x y -> b h w (x y)"))
        return jnp.concatenate(found, -1)


def _enlarged(flow: Array, mask: Array) -> Array:
    """Return the flow [B 8h 8w 2] of pixels: each a mean of 3 x 3 around it in [B h w 2], weighted by softmax(mask)."""
    rows, columns = flow.shape[1:3]
    padded = jnp.pad(SCALE * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    weights = jax.nn.softmax(rearrange(mask, "b h w (n p q) -> b h w n p q", n=9, p=SCALE), axis=3)
    flow = einsum("bhwnpq,bhwnc->bhwpqc", weights, jnp.stack(around, 3))
    return rearrange(flow, "b h w p q c -> b (h p) (w q) c")


def padded(pictures: Array) -> Array:
    """Return pictures [B H W 3] continued at their edges to multiples of 8, the smaller half of it above and left."""
    edges = [(0, 0), *((-side % SCALE // 2, (-side % SCALE + 1) // 2) for side in pictures.shape[1:3]), (0, 0)]
    return jnp.pad(pictures, edges, mode="edge")

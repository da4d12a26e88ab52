"""One vision transformer for CLIP ViT-B/32, CLIP ViT-L/14 and DINO ViT-B/16: images to one vector each.

Sources: arXiv 2010.11929 (ViT); CLIP's `clip/model.py` (arXiv 2103.00020); DINO's `vision_transformer.py` (arXiv
2104.14294). All are encoders with the norms in front. CLIP has a norm before the first block too, quick-GELU, and a
projection of the class token; DINO has a bias on its patches, GELU, and takes images of any size.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from avd_jax.models.attention import attention
from avd_jax.models.layers import scan_layers
from avd_jax.models.linear import Linear, einsum, project
from avd_jax.models.placement import Placement
from avd_jax.models.resampling import resampled, taps
from avd_jax.shapes import Array, Tokens, typechecked

Images = Float[Array, "batch image_height image_width 3"]
Features = Float[Array, "batch features"]

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
# A few hundred tokens: the fused kernels would pad them to whole blocks, and gain nothing.
_PLACEMENT = Placement(kernel="xla")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the transformer; the defaults are CLIP ViT-L/14.

    Attributes:
      image_size: pixels of a side of the square images that the positions were trained for.
      patch_size: pixels of a side of a patch.
      dim: width of the residual stream.
      num_layers: blocks.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward layer.
      projection_dim: width of the projected class token; 0 for no projection.
      clip: whether it is built as CLIP's: a norm before the blocks, no bias on the patches, one size of images.
      activation: one of ACTIVATIONS.
      eps: epsilon of the layer norms.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    projection_dim: int = 768
    clip: bool = True
    activation: str = "quick_gelu"
    eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches of a side of the images that the positions were trained for."""
        return self.image_size // self.patch_size

    @property
    def feature_dim(self) -> int:
        """Width of the result."""
        return self.projection_dim or self.dim


CLIP_L_14 = ViTConfig()
CLIP_B_32 = ViTConfig(patch_size=32, dim=768, num_layers=12, num_heads=12, mlp_dim=3072, projection_dim=512)
DINO_B_16 = ViTConfig(
    patch_size=16, dim=768, num_layers=12, num_heads=12, mlp_dim=3072,
    projection_dim=0, clip=False, activation="gelu", eps=1e-6,
)  # fmt: skip
VIT_MODELS = {"CLIP ViT-L/14": CLIP_L_14, "CLIP ViT-B/32": CLIP_B_32, "DINO ViT-B/16": DINO_B_16}


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias [D], all in float32; the result is in `dtype`."""

    def __init__(self, dim: int, eps: float, *, dtype):
        self.scale, self.bias = nnx.Param(jnp.ones((dim,), jnp.float32)), nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Normalise the last axis."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)


class ProjectToQKV(nnx.Module):
    """Linear map from tokens to queries, keys and values at once: kernel [3 D H K], bias [3 H K]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        shape = (3, config.dim, config.num_heads, config.dim // config.num_heads)
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=(2, 3), batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((3, *shape[2:]), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Tokens) -> Array:
        """Return [3 B H N K]."""
        return project("bnd,sdhk->sbhnk", x, self.kernel[...], self.bias[...], self.dtype)


class SelfAttention(nnx.Module):
    """Multi-head self-attention; heads `h` of width `k` are columns `h * K + k` of the output's kernel [H*K D]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        self.qkv = ProjectToQKV(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.o = Linear(config.dim, config.dim, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: Tokens) -> Tokens:
        """Attend from every token to all."""
        query, key, value = self.qkv(x)
        return self.o(rearrange(attention(query, key, value, placement=_PLACEMENT), "b h n k -> b n (h k)"))


class FeedForward(nnx.Module):
    """`fc2(activation(fc1(x)))`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        self.fc1 = Linear(config.dim, config.mlp_dim, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.fc2 = Linear(config.mlp_dim, config.dim, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.activation = config.activation

    def __call__(self, x: Tokens) -> Tokens:
        """Apply to each token."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """One layer: self-attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1, self.norm2 = (LayerNorm(config.dim, config.eps, dtype=dtype) for _ in range(2))
        self.attn = SelfAttention(config, **options)
        self.mlp = FeedForward(config, **options)

    def __call__(self, x: Tokens) -> Tokens:
        """Apply to tokens [B N D] in float32."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nnx.Module):
    """One token for each patch: kernel [P P 3 D] and, for DINO, a bias [D]."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, dtype, param_dtype):
        size = config.patch_size
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (size, size, 3, config.dim), param_dtype))
        self.bias = None if config.clip else nnx.Param(jnp.zeros((config.dim,), param_dtype))
        self.size = size
        self.dtype = dtype

    def __call__(self, images: Images) -> Array:
        """Return [B rows columns D]; what is left at the right and at the bottom is no patch, as in a convolution."""
        rows, columns = images.shape[1] // self.size, images.shape[2] // self.size
        images = images[:, : rows * self.size, : columns * self.size].astype(self.dtype)
        patches = rearrange(images, "b (r p) (c q) i -> b r c p q i", p=self.size, q=self.size)
        x = einsum("brcpqi,pqid->brcd", patches, self.kernel[...].astype(self.dtype))
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class VisionTransformer(nnx.Module):
    """Images to one vector each.

    Args:
      config: the sizes.
      rngs: keys for the random initialisation.
      dtype: of the matrix products; the residual stream, norms, softmax and projection are float32.
      param_dtype: of the stored parameters but for the norms, which are float32.
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, *, dtype=jnp.float32, param_dtype=jnp.float32):
        self.config = config
        options = {"dtype": dtype, "param_dtype": param_dtype}
        normal = nnx.initializers.normal(0.02)
        self.patch = PatchEmbedding(config, rngs=rngs, **options)
        self.class_embedding = nnx.Param(normal(rngs.params(), (config.dim,), param_dtype))
        self.positions = nnx.Param(normal(rngs.params(), (1 + config.grid**2, config.dim), param_dtype))
        self.pre_norm = LayerNorm(config.dim, config.eps, dtype=jnp.float32) if config.clip else None

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs):
            return Block(config, rngs=rngs, **options)

        self.blocks = make_blocks(rngs)
        self.norm = LayerNorm(config.dim, config.eps, dtype=jnp.float32)
        shape = (config.dim, config.projection_dim)
        init = nnx.initializers.lecun_normal()
        self.projection = nnx.Param(init(rngs.params(), shape, param_dtype)) if config.projection_dim else None

    @typechecked
    def __call__(self, images: Images) -> Features:
        """Return the class token behind the last norm and, for CLIP, the projection: [B feature_dim] in float32.

        Args:
          images: normalised as the model wants them (`vit_images.py`). CLIP takes squares of `config.image_size`; DINO
            takes other sizes too, and resamples its positions.

        Raises:
          ValueError: images of a size that the model does not take.
        """
        x = self.patch(images).astype(jnp.float32)
        positions = self._positions(*x.shape[1:3])
        x = rearrange(x, "b r c d -> b (r c) d")
        first = jnp.broadcast_to(self.class_embedding[...].astype(jnp.float32), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + positions
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = self.norm(_apply_blocks(*nnx.split(self.blocks), x)[:, 0])
        return x if self.projection is None else einsum("bd,df->bf", x, self.projection[...].astype(jnp.float32))

    def _positions(self, rows: int, columns: int) -> Array:
        """Return [1 + rows * columns D] in float32."""
        positions, grid = self.positions[...].astype(jnp.float32), self.config.grid
        if (rows, columns) == (grid, grid):
            return positions
        if self.config.clip or not rows or not columns:
            raise ValueError(f"a model for {grid} x {grid} patches was given {rows} x {columns}")
        x = rearrange(positions[1:], "(r c) d -> r c d", r=grid)
        for axis, size in enumerate((rows, columns)):
            # DINO adds a tenth of a patch to the new size, and its weights were only ever evaluated so.
            x = resampled(x, axis, *taps(grid, size, scale=(size + 0.1) / grid))
        return jnp.concatenate([positions[:1], rearrange(x, "r c d -> (r c) d")])


# Compiled here, once for all calls: a user who calls the model eagerly would otherwise compile the scan each time.
@functools.partial(jax.jit, static_argnums=0)
def _apply_blocks(graph: nnx.GraphDef, layers: nnx.State, x: Array) -> Array:
    return scan_layers(lambda x, layer: nnx.merge(graph, layer)(x), x, layers)

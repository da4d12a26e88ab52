"""umT5, the text encoder of Wan2.1: a T5 v1.1 encoder whose every layer has its own relative position bias.

Architecture and attribute names follow Wan's own `wan/modules/t5.py` (encoder of `umt5_xxl`); T5 itself is
arXiv 1910.10683, umT5 arXiv 2304.09151. What differs from an ordinary transformer: queries are not scaled by
1/sqrt(head_dim), positions enter only as a bias on the attention logits, and no layer has an additive bias.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from avd_jax.models.layers import scan_layers
from avd_jax.shapes import AttentionMask, InputIds, PromptEmbeds, typechecked


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are umT5-XXL, as every Wan2.1 uses it.

    Attributes:
      vocab_size: rows of the token embedding (padded, larger than the tokenizer's vocabulary).
      dim: width of the residual stream and of the output.
      ffn_dim: hidden width of the gated feed-forward layer.
      num_heads: attention heads.
      head_dim: width of one head; `num_heads * head_dim` need not be `dim`.
      num_layers: blocks.
      num_buckets: rows of each layer's relative position table, half of them for each direction.
      max_distance: distance in tokens from which all positions share the last bucket.
      eps: epsilon of the RMS norms.
    """

    vocab_size: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


def relative_position_buckets(length: int, *, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of every (query, key) pair, [length length] int32.

    The first half of the buckets is for keys at or before the query, the second for keys after it. In each half the
    nearer distances have a bucket of their own, the others share logarithmically wider ones up to `max_distance`.
    Source: T5's bidirectional buckets (arXiv 1910.10683, section 2.1).
    """
    offsets = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offsets)
    per_direction = num_buckets // 2
    exact = per_direction // 2
    # float32 as in the reference: a bucket's edge must not move by one because a logarithm is rounded differently.
    log_distance = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    coarse = exact + (log_distance * (per_direction - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(coarse, per_direction - 1))
    return (bucket + per_direction * (offsets > 0)).astype(np.int32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a scale and neither mean nor bias; the result is in `dtype`."""

    def __init__(self, dim: int, eps: float, *, dtype, param_dtype):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x):
        """Normalise the last axis of x."""
        x = x.astype(jnp.float32)  # the residual stream of T5 reaches thousands: its squares need float32
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with a bias on the logits and no scaling of the queries."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, *, dtype, param_dtype):
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        heads = (config.num_heads, config.head_dim)
        self.q, self.k, self.v = (linear(config.dim, heads) for _ in range(3))
        self.o = linear(heads, config.dim, axis=(-2, -1))

    def __call__(self, x, bias):
        """Attend over x [B L dim] with bias [B heads L L] (float32) added to the logits; returns [B L dim]."""
        # The activations are transposed here, not inside the projections: XLA on a CPU would transpose their kernels.
        query = rearrange(self.q(x), "batch length heads channels -> batch heads length channels")
        key = rearrange(self.k(x), "batch length heads channels -> batch heads channels length")
        value = rearrange(self.v(x), "batch length heads channels -> batch heads length channels")
        # float32: the logits are not scaled down, so they are large and bfloat16 would keep few of their digits
        logits = jnp.matmul(query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(x.dtype)
        out = jnp.matmul(weights, value)
        return self.o(rearrange(out, "batch heads length channels -> batch length heads channels"))


class FeedForward(nnx.Module):
    """Gated feed-forward layer: `fc2(fc1(x) * gelu(gate(x)))` with the tanh form of GELU."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, *, dtype, param_dtype):
        self.gate = _linear(config.dim, config.ffn_dim, rngs, dtype, param_dtype)
        self.fc1 = _linear(config.dim, config.ffn_dim, rngs, dtype, param_dtype)
        self.fc2 = _linear(config.ffn_dim, config.dim, rngs, dtype, param_dtype)

    def __call__(self, x):
        """Apply to the last axis of x [... dim]."""
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """One layer: self-attention and feed-forward, each after its norm and added to the residual stream."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, *, dtype, param_dtype):
        self.norm1 = RMSNorm(config.dim, config.eps, dtype=dtype, param_dtype=param_dtype)
        self.attn = SelfAttention(config, rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm2 = RMSNorm(config.dim, config.eps, dtype=dtype, param_dtype=param_dtype)
        self.ffn = FeedForward(config, rngs, dtype=dtype, param_dtype=param_dtype)
        self.pos_embedding = nnx.Embed(
            config.num_buckets, config.num_heads, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x, buckets, mask_bias):
        """Apply to x [B L dim] (float32), with buckets [L L] and mask_bias [B 1 1 L], 0 or a large negative number."""
        table = self.pos_embedding.embedding[...].astype(jnp.float32)  # added to the float32 logits
        bias = jnp.take(table.T, buckets, axis=1) + mask_bias
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """umT5's encoder: token ids -> one embedding a token.

    Args:
      config: the sizes.
      rngs: keys for the random initialisation.
      dtype: dtype of the matrix products and of the result.
      param_dtype: dtype in which the parameters are stored.
    """

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs, *, dtype=jnp.float32, param_dtype=jnp.float32):
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(config.vocab_size, config.dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs):
            return Block(config, rngs, dtype=dtype, param_dtype=param_dtype)

        self.blocks = make_blocks(rngs)
        self.norm = RMSNorm(config.dim, config.eps, dtype=dtype, param_dtype=param_dtype)

    @typechecked
    def __call__(self, input_ids: InputIds, attention_mask: AttentionMask) -> PromptEmbeds:
        """Encode tokens.

        Args:
          input_ids: [B L] token ids, padded after the last token.
          attention_mask: [B L], 1 (or True) for tokens, 0 for padding.

        Returns:
          [B L dim] in `dtype`; zero where the mask is zero, as Wan's transformer wants its text padded.
        """
        mask = attention_mask.astype(bool)
        mask_bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        buckets = relative_position_buckets(
            input_ids.shape[1], num_buckets=self.config.num_buckets, max_distance=self.config.max_distance
        )
        # The residual stream stays in float32: it grows so large that bfloat16 would lose a layer's contribution.
        x = self.token_embedding(input_ids).astype(jnp.float32)

        x = _apply_blocks(*nnx.split(self.blocks), x, buckets, mask_bias)
        return jnp.where(mask[..., None], self.norm(x), 0)


# Compiled here, once for all calls: a user who calls the encoder eagerly would otherwise compile the scan each time.
@functools.partial(jax.jit, static_argnums=0)
def _apply_blocks(graph: nnx.GraphDef, layers: nnx.State, x, buckets, mask_bias):
    return scan_layers(lambda x, layer: nnx.merge(graph, layer)(x, buckets, mask_bias), x, layers)


def _linear(in_dim: int, out_dim: int, rngs: nnx.Rngs, dtype, param_dtype) -> nnx.Linear:
    return nnx.Linear(in_dim, out_dim, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

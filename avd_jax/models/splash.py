"""The TPU attention kernel: `jax.experimental.pallas.ops.tpu.splash_attention`, with padding and masked keys."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from avd_jax.models.placement import LANES, SplashBlocks


def splash_attention(
    query, key, value, *, valid_keys: int, blocks: SplashBlocks, residual_name: str, interpret: bool = False
):
    """Return softmax(query key^T) value, [B H N K]; the kernel does not scale the scores.

    Args:
      query: [B H N K], scaled.
      key, value: [B H M K]; those from `valid_keys` on are padding, which no query sees.
      blocks: sizes; those larger than the sequence are cut to it.
      residual_name: under which a remat policy finds what the backward pass needs, the output and its logsumexp.
      interpret: run the kernel's body step by step, on any backend.
    """
    tokens, keys = query.shape[2], key.shape[2]
    sizes = _block_sizes(blocks, tokens, keys)
    query = padded(query, max(sizes.block_q, sizes.block_q_dkv))
    key, value = (padded(x, max(sizes.block_kv, sizes.block_kv_dkv)) for x in (key, value))
    heads, padded_tokens, padded_keys = query.shape[1], query.shape[2], key.shape[2]
    mask = masks.FullMask((padded_tokens, padded_keys))
    if padded_keys != valid_keys:
        # Padded queries see the valid keys too: a softmax over nothing would be undefined.
        mask = _FirstKeys((padded_tokens, padded_keys), valid_keys)
    # Built while tracing: a cached kernel would hold on to the tracers of the program that it was first built in.
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=residual_name,
        interpret=interpret,
    )
    output = jax.vmap(attend)(query, key, value)
    return output[:, :, :tokens]


@dataclass(frozen=True)
class _FirstKeys(masks.Mask):
    """All queries see the first keys; only blocks with others among them are masked in the kernel."""

    size: tuple[int, int]
    keys: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def __getitem__(self, index) -> np.ndarray:
        queries, keys = (np.arange(size)[part] for size, part in zip(self.size, index, strict=True))
        return np.broadcast_to(keys < self.keys, (len(queries), len(keys)))


def _block_sizes(blocks: SplashBlocks, tokens: int, keys: int) -> kernel.BlockSizes:
    def cut(sizes):
        queries, block, compute = sizes
        block = min(block, _round_up(keys, LANES))
        # A block that was cut has to stay a multiple of what is computed at a time.
        compute = compute if block % compute == 0 else LANES
        return min(queries, _round_up(tokens, LANES)), block, compute

    q, kv, compute = cut(blocks.forward)
    q_back, kv_back, compute_back = cut(blocks.backward)
    return kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q_back,
        block_kv_dkv=kv_back,
        block_kv_dkv_compute=compute_back,
        block_q_dq=None if blocks.fused_backward else q_back,
        block_kv_dq=None if blocks.fused_backward else kv_back,
        use_fused_bwd_kernel=blocks.fused_backward,
    )


def padded(x, multiple: int):
    """Return heads [B H N K] with zeros behind the tokens, up to a multiple."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0)))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

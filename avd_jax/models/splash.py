"""TPU attention kernels: `jax.experimental.pallas.ops.tpu.splash_attention`, with padding and masked keys.

Forward and backward are apart, each padded to its own blocks: the backward kernels serve any forward kernel that
returns the logsumexp.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from avd_jax.models.placement import LANES, AttentionBlocks


def splash_forward(
    query, key, value, *, valid_keys: int, blocks: AttentionBlocks, logsumexp: bool, interpret: bool = False
):
    """Return softmax(query key^T) value, [B H N K], and the logsumexp of each query's scores, [B H N] in float32.

    The kernel does not scale the scores.

    Args:
      query: [B H N K], scaled.
      key, value: [B H M K]; those from `valid_keys` on are padding, which no query sees.
      blocks: sizes; those larger than the sequence are cut to it.
      logsumexp: whether to write it; None is returned otherwise.
      interpret: run the kernel's body step by step, on any backend.
    """
    tokens, keys = query.shape[2], key.shape[2]
    sizes = _block_sizes(blocks, tokens, keys)
    query = padded(query, sizes.block_q)
    key, value = (padded(x, sizes.block_kv) for x in (key, value))
    attend = _make_kernel(query, key, sizes, save_residuals=logsumexp, interpret=interpret)
    segments = _segments(query, key, valid_keys)
    found = jax.vmap(lambda *arrays: attend(*arrays, segment_ids=segments))(query, key, value)
    output, (sums,) = found if logsumexp else (found, (None,))
    return output[:, :, :tokens], sums[:, :, :tokens] if logsumexp else None


def splash_backward(
    query, key, value, output, logsumexp, gradient, *, valid_keys: int, blocks: AttentionBlocks, interpret: bool = False
):
    """Return the gradients of query, key and value, by splash's backward kernels; any forward kernel may come before.

    Args:
      query, key, value, valid_keys, blocks, interpret: as for `splash_forward`.
      output, logsumexp: of the forward kernel, [B H N K] and [B H N].
      gradient: [B H N K], of the output.
    """
    tokens, keys = query.shape[2], key.shape[2]
    sizes = _block_sizes(blocks, tokens, keys)
    # The output's gradient is zero for padded queries, and so is all that comes of them.
    query, output, gradient = (padded(x, sizes.block_q_dkv) for x in (query, output, gradient))
    logsumexp = padded(logsumexp[..., None], sizes.block_q_dkv)[..., 0]
    key, value = (padded(x, sizes.block_kv_dkv) for x in (key, value))
    attend = _make_kernel(query, key, sizes, save_residuals=False, interpret=interpret)
    segments = _segments(query, key, valid_keys)

    def backward(query, key, value, output, logsumexp, gradient):
        residuals = (query, key, value, segments, None, output, logsumexp, attend.dq_mask_info, attend.dkv_mask_info)
        # JAX offers this rule to no other forward kernel, so it is called by its private name.
        return kernel._splash_attention_bwd(**attend.kwargs, res=residuals, do=gradient)[3:6]

    found = jax.vmap(backward)(query, key, value, output, logsumexp, gradient)
    return tuple(x[:, :, :size] for x, size in zip(found, (tokens, keys, keys), strict=True))


def _make_kernel(query, key, sizes: kernel.BlockSizes, **options):
    # Built while tracing: a cached kernel would hold on to the tracers of the program that it was first built in.
    mask = masks.MultiHeadMask([masks.FullMask((query.shape[2], key.shape[2]))] * query.shape[1])
    return kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, **options)


def _segments(query, key, valid_keys: int) -> kernel.SegmentIds | None:
    """Return what hides the keys that do not count from all queries, padded ones too; None if all keys count.

    A mask would hide them as well, but it is brought in by blocks of 32 bits, which take all of the 16 MiB of VMEM
    that such a kernel has on a v5e.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if keys == valid_keys:
        return None
    return kernel.SegmentIds(jnp.zeros(tokens, jnp.int32), (jnp.arange(keys) >= valid_keys).astype(jnp.int32))


def _cut(sizes, tokens: int, keys: int) -> tuple[int, int, int]:
    queries, block, compute = sizes
    block = min(block, round_up(keys, LANES))
    # A block that was cut has to stay a multiple of what is computed at a time.
    compute = compute if block % compute == 0 else LANES
    return min(queries, round_up(tokens, LANES)), block, compute


def _block_sizes(blocks: AttentionBlocks, tokens: int, keys: int) -> kernel.BlockSizes:
    q, kv, compute = _cut(blocks.forward, tokens, keys)
    q_back, kv_back, compute_back = _cut(blocks.backward, tokens, keys)
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
    """Return heads [... N K] with zeros behind the tokens, up to a multiple."""
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, -x.shape[-2] % multiple), (0, 0)))


def round_up(size: int, multiple: int) -> int:
    """Return the first multiple that is not below `size`."""
    return -(-size // multiple) * multiple

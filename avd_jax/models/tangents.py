"""Attention with its forward tangent, for `jax.jvp`: blockwise, so that the scores are never held whole.

    P = softmax(S),  S = q k^T,  tS = tq k^T + q tk^T,  H = P * tS
    o = P v,         to = P tv + H v - rowsum(H) o

A scan goes over blocks of keys with the running maximum of the scores, by which all sums are rescaled, as flash
attention does for o alone. It is plain JAX and runs on every backend; sums, maximum and exponentials are float32.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.custom_derivatives import SymbolicZero

from avd_jax.models.linear import einsum
from avd_jax.models.placement import LANES
from avd_jax.models.splash import padded, round_up

BLOCK_KEYS = 1024
LARGEST_BLOCK = 2**25  # scores that are held at a time: 128 MiB, a few times over


def with_tangents(attend, *, valid_keys: int):
    """Return `attend(query, key, value)` with a rule for `jax.jvp`; it cannot be differentiated backwards.

    Args:
      attend: attention on one device, of queries [B H N K] that are scaled already, keys and values [B H M K].
      valid_keys: how many of the keys count, the first ones.
    """

    def rule(primals, tangents):
        zero = [type(tangent) is SymbolicZero for tangent in tangents]
        given = [jnp.zeros(x.shape, x.dtype) if none else x for x, none in zip(tangents, zero, strict=True)]
        if all(zero[1:]):  # cross-attention: its keys and values are the text's
            given[1:] = None, None
        return attention_and_tangent(*primals, *given, valid_keys=valid_keys)

    with_rule = jax.custom_jvp(attend)
    with_rule.defjvp(rule, symbolic_zeros=True)
    return with_rule


def attention_and_tangent(
    query, key, value, query_tangent, key_tangent, value_tangent, *, valid_keys: int, block_keys: int = BLOCK_KEYS
):
    """Return softmax(query key^T) value and its tangent, both [B H N K] in the dtype of the queries.

    Args:
      query, query_tangent: [B H N K], scaled.
      key, value, key_tangent, value_tangent: [B H M K]; those from `valid_keys` on are padding, which no query sees.
        The tangents of keys and values may both be None, for zero.
      valid_keys: how many of the keys count.
      block_keys: keys at a time.
    """
    tokens, dtype = query.shape[2], query.dtype
    block = min(block_keys, round_up(valid_keys, LANES))
    static = key_tangent is None
    # The products with q and tq, or with v and tv, are one.
    queries = [query_tangent] if static else [query_tangent, query]
    keys = [key] if static else [key, key_tangent]
    values = [value] if static else [value, value_tangent]
    sides = key, jnp.concatenate(keys, axis=-1), jnp.concatenate(values, axis=-1)
    blocks = [_cut(x[:, :, :valid_keys].astype(dtype), block) for x in sides]
    counted = _cut(jnp.ones((1, 1, valid_keys, 1), bool), block)[..., 0]  # padding is False

    def of_queries(part):
        query, moving = part
        size, wide = value.shape[-1], jnp.promote_types(jnp.float32, dtype)
        rows = query.shape[:3]

        def step(carry, block):
            largest, total, drift, output, tangent = carry
            keys, both, values, counts = block
            scores = einsum("bhqk,bhmk->bhqm", query, keys, preferred_element_type=wide)
            scores = jnp.where(counts[:, :, None], scores, -jnp.inf)
            change = einsum("bhqk,bhmk->bhqm", moving, both, preferred_element_type=wide)
            now = jnp.maximum(largest, jnp.max(scores, axis=-1))
            keep = jnp.exp(largest - now)
            weights = jnp.exp(scores - now[..., None])
            changes = weights * change
            summed = einsum("bhqm,bhmk->bhqk", weights.astype(dtype), values, preferred_element_type=wide)
            turned = einsum("bhqm,bhmk->bhqk", changes.astype(dtype), values[..., :size], preferred_element_type=wide)
            if not static:
                turned += summed[..., size:]
            carry = (
                now,
                keep * total + jnp.sum(weights, axis=-1),
                keep * drift + jnp.sum(changes, axis=-1),
                keep[..., None] * output + summed[..., :size],
                keep[..., None] * tangent + turned,
            )
            return carry, None

        zero, wide_zero = jnp.zeros(rows, wide), jnp.zeros((*rows, size), wide)
        start = jnp.full(rows, -jnp.inf, wide), zero, zero, wide_zero, wide_zero
        (_, total, drift, output, tangent), _ = jax.lax.scan(step, start, (*blocks, counted))
        output, tangent, drift = output / total[..., None], tangent / total[..., None], drift / total
        return output.astype(dtype), (tangent - drift[..., None] * output).astype(dtype)

    rows = _rows_at_a_time(query, block)
    parts = [_cut(x.astype(dtype), rows) for x in (query, jnp.concatenate(queries, axis=-1))]
    found = jax.lax.map(of_queries, tuple(parts))
    return tuple(rearrange(x, "part b h n k -> b h (part n) k")[:, :, :tokens] for x in found)


def _rows_at_a_time(query, block: int) -> int:
    """Return how many queries are worked on together: even parts, each within LARGEST_BLOCK scores."""
    *outer, tokens, _ = query.shape
    most = max(LANES, LARGEST_BLOCK // (math.prod(outer) * block) // LANES * LANES)
    parts = -(-tokens // most)
    return min(most, round_up(-(-tokens // parts), LANES)) if parts > 1 else tokens


def _cut(x, size: int):
    """Return tokens [B H N K], padded with zeros, as blocks [N/size B H size K]."""
    return rearrange(padded(x, size), "b h (part n) k -> part b h n k", n=size)

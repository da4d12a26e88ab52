"""Attention as one function, with the kernel that the backend does best.

Heads stand before tokens, `B H N K`: the projections write them so, and no transpose stands between a projection, the
rotary embedding and the kernel.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from avd_jax.shapes import Array, Heads, typechecked

ContextHeads = Float[Array, "batch heads context_tokens head_dim"]

OUTPUT_NAME = "attention_output"  # what a remat policy names to keep attention's result


@typechecked
def attention(query: Heads, key: ContextHeads, value: ContextHeads) -> Heads:
    """Return softmax(query key^T / sqrt(K)) value: [B H N K] for queries [B H N K], keys and values [B H M K].

    cuDNN's fused kernel serves half-precision on CUDA devices, XLA everything else. Softmax is float32 in both.
    """
    half_precision = query.dtype in (jnp.bfloat16, jnp.float16)
    if half_precision and jax.default_backend() in ("gpu", "cuda"):
        output = _cudnn(query, key, value)
    else:
        output = _xla(query, key, value)
    return checkpoint_name(output, OUTPUT_NAME)


def _xla(query, key, value):
    scores = jnp.einsum("bhqk,bhmk->bhqm", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    # Scores of 32,760 keys need float32: bf16 sums of so many exponentials are off by percents.
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqm,bhmk->bhqk", probabilities, value)


def _cudnn(query, key, value):
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(jax.nn.dot_product_attention(query, key, value, implementation="cudnn"), 1, 2)

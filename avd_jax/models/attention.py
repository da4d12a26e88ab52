"""Attention as one function, with the kernel that suits the devices and with sequence parallelism.

Heads come before tokens, `B H N K`: the projections write them so, and no transpose comes between a projection, the
rotary embedding, the exchange of heads for tokens and the kernel.

If a mesh axis shares the tokens, an all-to-all gives each device all tokens of some heads, and another brings the
output back (Ulysses, arXiv 2309.14509). Keys of another sequence, such as the text's, are few: every device has them
all, and attends from its own tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float

from avd_jax.errors import UserError
from avd_jax.models.linear import einsum
from avd_jax.models.pipelined import cut_parts, join_parts, pipelined_forward
from avd_jax.models.placement import TPU_KERNELS, Placement
from avd_jax.models.splash import padded, splash_backward, splash_forward
from avd_jax.models.tangents import with_tangents
from avd_jax.shapes import Array, Heads, typechecked

ContextHeads = Float[Array, "batch heads context_tokens head_dim"]

OUTPUT_NAME = "attention_output"  # the result of the kernels that let a policy name it
LARGEST_SCORES = 2**28  # that XLA's attention holds at a time, 1 GiB
_CUDNN = "dot_product_attention_fwd_wrapper"


def keep_attention(primitive, *inputs, **params) -> bool:
    """Keep attention's output and logsumexp, a policy for `jax.checkpoint`: the forward kernel runs once.

    cuDNN's residuals have no name, but the primitive that makes them has.
    """
    named = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
    return primitive.name == _CUDNN or named(primitive, *inputs, **params)


@typechecked
def attention(
    query: Heads,
    key: ContextHeads,
    value: ContextHeads,
    *,
    placement: Placement = Placement(),  # noqa: B008 - it is frozen
    valid_keys: int | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Heads:
    """Return softmax(scale query key^T) value: [B H N K] for queries [B H N K], keys and values [B H M K].

    Softmax is float32 in every kernel.

    Args:
      query, key, value: global arrays. Tokens that are sharded must be divided by the shards.
      placement: the kernel and, if there is more than one device, the mesh.
      valid_keys: how many of the keys count, the first ones; the rest are padding. None: all.
      scale: of the scores. None: 1 / sqrt(K). With 1 the queries are taken as they are.
      interpret: run the TPU kernels step by step, on any backend.

    Raises:
      UserError: heads that the sequence axis does not divide.
    """
    valid_keys = key.shape[2] if valid_keys is None else valid_keys
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if scale != 1:  # here, where the compiler makes it part of whatever wrote the queries
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    attend = functools.partial(_attend, placement=placement, valid_keys=valid_keys, interpret=interpret)
    if placement.tangents:
        attend = with_tangents(attend, valid_keys=valid_keys)
    mesh = placement.mesh
    if mesh is None or mesh.size == 1:
        return attend(query, key, value)

    axis, shards = placement.sequence_axis, placement.sequence_shards
    check_heads(query.shape[1], shards)
    own_keys = key.shape[2] == query.shape[2]  # self-attention: the keys are cut as the queries are
    queries_spec = placement.spec(query.shape[0], None, axis)
    keys_spec = queries_spec if own_keys else placement.spec(query.shape[0])

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(queries_spec, keys_spec, keys_spec),
        out_specs=queries_spec,
        check_vma=False,  # kernels do not say how their results vary over the mesh
    )
    def attend_on_each_device(query, key, value):
        if not own_keys:
            key, value = key.astype(query.dtype), value.astype(query.dtype)
        if shards == 1 or not own_keys:
            return attend(query, key, value)
        kernel = placement.kernel_for(query.dtype)
        if kernel in TPU_KERNELS:
            query, key, value = map(_channels_in_lanes, (query, key, value))
        parts = (_tokens_for_heads(x, axis, shards) for x in (query, key, value))
        if kernel == "pipelined" and not placement.tangents:
            output = _on_tpu(*parts, "pipelined", valid_keys=valid_keys, blocks=placement.blocks, interpret=interpret)
        else:
            output = cut_parts(attend(*map(join_parts, parts)), shards)
        return _heads_for_tokens(output, axis)

    if not own_keys:
        # Their gradients are summed over the devices that share the queries: in float32.
        key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    return attend_on_each_device(query, key, value)


def _channels_in_lanes(x):
    """Return heads [B H N K] and have the compiler write them, and their gradient, as the TPU kernels read them.

    What kernels want reaches through no exchange: it would write tokens in the lanes, and copy them all before it.
    """
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2, 3)))


def _tokens_for_heads(x, axis: str, shards: int):
    """Return all tokens of some heads, in parts [S B H/S N/S K], for some tokens of all heads, [B H N/S K]."""
    # The axis that is exchanged comes first, else XLA moves it there and back.
    parts = rearrange(x, "b (s h) n k -> s b h n k", s=shards)
    return jax.lax.all_to_all(parts, axis, 0, 0, tiled=True)


def _heads_for_tokens(parts, axis: str):
    """Undo `_tokens_for_heads`."""
    return rearrange(jax.lax.all_to_all(parts, axis, 0, 0, tiled=True), "s b h n k -> b (s h) n k")


def check_heads(heads: int, shards: int) -> None:
    """Raise a UserError unless `heads` can be shared out over `shards` devices of the sequence axis."""
    if heads % shards:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"{heads} attention heads cannot be shared out over config.mesh.seq={shards} devices; set it to one of "
            + ", ".join(map(str, fitting))
        )


def _attend(query, key, value, *, placement: Placement, valid_keys: int, interpret: bool):
    """Attend on one device."""
    kernel = placement.kernel_for(query.dtype)
    if kernel in TPU_KERNELS:
        parts = (x[None] for x in (query, key, value))
        return _on_tpu(*parts, kernel, valid_keys=valid_keys, blocks=placement.blocks, interpret=interpret)[0]
    if kernel == "cudnn":
        return _cudnn(query, key, value, valid_keys)
    return checkpoint_name(_xla(query, key, value, valid_keys), OUTPUT_NAME)


def _on_tpu(query, key, value, kernel: str, **options):
    """Attend with one of two forward kernels, tokens in parts [S B H N/S K]; the backward kernels are splash's."""
    shards = query.shape[0]

    @jax.custom_vjp
    def attend(query, key, value):
        return forward(query, key, value)[0]

    def forward(query, key, value, *, logsumexp=False):
        if kernel == "splash":
            output, sums = splash_forward(*map(join_parts, (query, key, value)), logsumexp=logsumexp, **options)
            return cut_parts(output, shards), sums
        return pipelined_forward(query, key, value, **options)

    def forward_for_gradients(query, key, value):
        output, logsumexp = (checkpoint_name(x, OUTPUT_NAME) for x in forward(query, key, value, logsumexp=True))
        return output, (query, key, value, output, logsumexp)

    def backward(residuals, gradient):
        *arrays, logsumexp = residuals
        found = splash_backward(*map(join_parts, arrays), logsumexp, join_parts(gradient), **options)
        return tuple(cut_parts(x, shards) for x in found)

    attend.defvjp(forward_for_gradients, backward)
    return attend(query, key, value)


def _xla(query, key, value, valid_keys):
    key, value = (x[:, :, :valid_keys] for x in (key, value))
    *outer, tokens, _ = query.shape
    rows = max(1, LARGEST_SCORES // (math.prod(outer) * valid_keys))
    if rows >= tokens:
        return _xla_rows(query, key, value)
    # Some queries at a time: those of 480p at once would have 48 GiB of scores. The backward pass makes them again.
    parts = rearrange(padded(query, rows), "b h (part n) k -> part b h n k", n=rows)
    # float32 outside of the loop, which adds up the parts' gradients.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)
    attend = jax.checkpoint(lambda part: _xla_rows(part, *(x.astype(query.dtype) for x in wide)))
    output = jax.lax.map(attend, parts)
    return rearrange(output, "part b h n k -> b h (part n) k")[:, :, :tokens]


def _xla_rows(query, key, value):
    scores = einsum("bhqk,bhmk->bhqm", query, key, preferred_element_type=jnp.float32)
    # Scores of 32,760 keys need float32: bf16 sums of so many exponentials are off by percents.
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return einsum("bhqm,bhmk->bhqk", probabilities, value)


def _cudnn(query, key, value, valid_keys):
    tokens = query.shape[2]
    # Its backward pass refuses odd numbers of queries and of keys. An even number needs no mask.
    query, key, value = (padded(x, 2) for x in (query, key[:, :, :valid_keys], value[:, :, :valid_keys]))
    lengths = {}
    if key.shape[2] != valid_keys:
        counts = {"query_seq_lengths": query.shape[2], "key_value_seq_lengths": valid_keys}
        lengths = {name: jnp.full(query.shape[0], count, jnp.int32) for name, count in counts.items()}
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    output = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn", **lengths)
    return jnp.swapaxes(output, 1, 2)[:, :, :tokens]

"""A forward attention kernel for TPUs that keeps the matrix units busy; its backward pass is splash's.

All keys and values of a head, or a large part of them, stay in the vector memory (VMEM). A loop in the kernel goes
through them, a chunk at a time, with the running softmax of flash attention (arXiv 2205.14135). Three things bring it
to the limit of the matrix units:

* The loop is a pipeline. While one chunk's scores are exponentiated and multiplied with the values, the next chunk's
  are made, so the matrix units have work while the vector units do theirs.
* Scores stand as (keys, queries). The sums and maxima of the softmax then run over sublanes, which is cheap, and their
  results are one row that needs no spreading over lanes. The maximum is taken while scores are written.
* Only the last chunk has keys that do not count, and the loop does not reach it, so the loop has no mask.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from avd_jax.models.placement import LANES, AttentionBlocks
from avd_jax.models.splash import padded, round_up

NAME = "pipelined_attention"  # of the kernel, in profiles and in the compiler's dumps
SUBLANES = 8  # of a TPU's vector registers
RESIDENT_BYTES = 40 * 2**20  # of VMEM for keys and values: 40,960 in bfloat16, twice, so that the next head's can come
VMEM_BYTES = 60 * 2**20  # that the kernel may use; a core of v5p has 64 MiB, v5e and v6e have 128
_LOWEST = -1e30  # a score that counts for nothing, and that no arithmetic makes infinite


@functools.partial(jax.jit, static_argnames=("valid_keys", "blocks", "interpret"))
def pipelined_forward(query, key, value, *, valid_keys: int, blocks: AttentionBlocks, interpret: bool = False):
    """Return softmax(query key^T) value, [S B H N/S K], and the logsumexp of each query's scores, [B H N] in float32.

    The tokens come in S parts, as devices send them that each had one, and so does the result: the kernel reads its
    blocks from where they lie, which saves copies. It does not scale the scores.

    Args:
      query: [S B H N/S K], scaled.
      key, value: [S B H M/S K]; those from `valid_keys` on are padding, which no query sees.
      blocks: sizes; those larger than the sequence are cut to it.
      interpret: run the kernel's body step by step, on any backend.
    """
    shards, batch, heads, tokens, width = query.shape
    rows = min(blocks.pipelined[0], round_up(shards * tokens, LANES))
    chunk, chunks, parts = cut_keys(valid_keys, blocks.pipelined[1], width, key.dtype)
    if shards > 1 and (tokens % rows or parts > 1 or shards * key.shape[3] < chunks * chunk):
        whole = (join_parts(x)[None] for x in (query, key, value))
        output, logsumexp = pipelined_forward(*whole, valid_keys=valid_keys, blocks=blocks, interpret=interpret)
        return cut_parts(output[0], shards), logsumexp
    if shards == 1:
        query = padded(query, rows)
        key, value = (padded(x, chunk) for x in (key, value))
    # One part has no axis of its own, as in the backward kernels: else what makes the queries is compiled twice.
    outer = (shards, batch * heads) if shards > 1 else (batch * heads,)
    each = query.shape[3] // rows  # blocks of queries in a part
    query, key, value = (x.reshape(*outer, *x.shape[3:]) for x in (query, key, value))
    if shards == 1:
        queries = pl.BlockSpec((None, rows, width), lambda head, block, part: (head, block, 0))
        keys = pl.BlockSpec((None, chunks * chunk, width), lambda head, block, part: (head, part, 0))
    else:
        queries = pl.BlockSpec(
            (None, None, rows, width), lambda head, block, part: (lax.div(block, each), head, lax.rem(block, each), 0)
        )
        keys = pl.BlockSpec((shards, None, *key.shape[2:]), lambda head, block, part: (0, head, 0, 0))
    statistics = pltpu.VMEM((SUBLANES, rows), jnp.float32)
    attend = pl.pallas_call(
        functools.partial(_kernel, chunk=chunk, chunks=chunks, valid_keys=valid_keys, parts=parts),
        grid=(batch * heads, shards * each, parts),
        in_specs=[queries, keys, keys],
        out_specs=[queries, pl.BlockSpec((None, 1, rows), lambda head, block, part: (head, 0, block))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch * heads, 1, shards * each * rows), jnp.float32),
        ],
        scratch_shapes=[
            *[pltpu.VMEM((chunk, rows), jnp.float32)] * 2,
            *[statistics] * 3,
            pltpu.VMEM((width, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=NAME,
    )
    with jax.named_scope(NAME):  # the compiler's dumps take the name from here
        output, logsumexp = attend(query, key, value)
    output, logsumexp = output.reshape(shards, batch, heads, -1, width), logsumexp.reshape(batch, heads, -1)
    return output[:, :, :, :tokens], logsumexp[:, :, : shards * tokens]


def join_parts(x):
    """Return heads [B H N K] of tokens that come in parts, [S B H N/S K]."""
    return rearrange(x, "s b h n k -> b h (s n) k")


def cut_parts(x, shards: int):
    """Undo `join_parts`."""
    return rearrange(x, "b h (s n) k -> s b h n k", s=shards)


def cut_keys(keys: int, largest_chunk: int, width: int, dtype) -> tuple[int, int, int]:
    """Return (keys in a chunk, chunks in a part, parts): the parts are alike and only the last chunk is not full.

    Args:
      keys: that count.
      largest_chunk: a multiple of LANES.
      width: of a head.
      dtype: of the keys and values.
    """
    key_bytes = round_up(width, LANES) * jnp.dtype(dtype).itemsize
    fitting = max(RESIDENT_BYTES // (4 * key_bytes) // LANES, 1) * LANES  # keys and values, two of each
    # Two chunks at least, if there are as many keys: one alone has nothing to run beside.
    largest_chunk = min(largest_chunk, round_up(-(-keys // 2), LANES), fitting)
    cuts = []
    # A number of chunks that has no fitting divisor, such as a prime, asks for chunks of another size.
    for chunk in range(largest_chunk, max(largest_chunk // 2, LANES) - 1, -LANES):
        total = -(-keys // chunk)
        chunks = max(n for n in range(1, total + 1) if total % n == 0 and n * chunk <= fitting)
        cuts.append((chunk, chunks, total // chunks))
        if chunks == total:
            break
    return max(cuts, key=lambda cut: cut[0] * cut[1])


def loop_trips(chunks: int) -> int:
    """Return how often the loop runs: two chunks each, but the last's scores, which have the mask, are made behind."""
    return max(chunks - 2, 0) // 2


def _kernel(
    query,
    key,
    value,
    output,
    logsumexp,
    even,
    odd,
    highest,
    correction,
    total,
    weighted,
    *,
    chunk,
    chunks,
    valid_keys,
    parts,
):
    """Attend from one block of queries to one part of the keys.

    Args:
      query, key, value: [rows K], [S part/S K] and [S part/S K].
      output, logsumexp: [rows K] and [1 rows], written with the last part.
      even, odd: scores of a chunk [chunk rows], by the chunk's number.
      highest: the scores' running maximum, [8 rows], the same in all rows.
      correction: by which sums up to here are multiplied since `highest` grew, likewise.
      total: running sum of the exponentials in eight parts, [8 rows].
      weighted: running sum of the values, [K rows].
      chunk, chunks, valid_keys, parts: how the keys are cut, and how many of all of them count.
    """
    part = pl.program_id(2)
    key, value = (x.reshape(-1, x.shape[-1]) for x in (key, value))

    def first():
        highest[...] = jnp.full_like(highest, _LOWEST)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def make_scores(number, into, *, last):
        """Write the scores of a chunk and return their maximum in eight parts, [8 rows]."""
        scores = _product(key[_slice(number, chunk)], query[...], 1, 1)
        if last and valid_keys % chunk:
            counted = valid_keys - (part * chunks + number) * chunk
            scores = jnp.where(lax.broadcasted_iota(jnp.int32, scores.shape, 0) < counted, scores, _LOWEST)
        into[...] = scores
        return scores.reshape(-1, SUBLANES, scores.shape[1]).max(axis=0)

    def raise_highest(maximum):
        old = highest[...]
        highest[...] = jnp.maximum(old, maximum.max(axis=0, keepdims=True))
        correction[...] = jnp.exp(old - highest[...])

    def add(number, scores, following=None, *, last=False):
        """Add a chunk to the sums, and make the scores of the next one meanwhile."""
        # Read before the next chunk changes them.
        shift, factor = highest[:1], correction[...]
        if following is not None:
            maximum = make_scores(number + 1, following, last=last)
        weights = jnp.exp(scores[...] - shift)
        total[...] = factor * total[...] + weights.reshape(-1, SUBLANES, weights.shape[1]).sum(axis=0)
        values = _product(value[_slice(number, chunk)], weights.astype(value.dtype), 0, 0)
        weighted[...] = factor[:1] * weighted[...] + values
        if following is not None:
            raise_highest(maximum)

    def add_two(pair, carry):
        add(2 * pair, even, odd)
        add(2 * pair + 1, odd, even)
        return carry

    def finish():
        sums = total[...].sum(axis=0, keepdims=True)
        output[...] = (weighted[...] / sums).T.astype(output.dtype)
        logsumexp[...] = highest[:1] + jnp.log(sums)

    _at(part == 0, first, parts)
    raise_highest(make_scores(0, even, last=chunks == 1))
    pairs = loop_trips(chunks)
    lax.fori_loop(0, pairs, add_two, None)
    buffers = even, odd
    for number in range(2 * pairs, chunks - 1):
        add(number, buffers[number % 2], buffers[1 - number % 2], last=number == chunks - 2)
    add(chunks - 1, buffers[(chunks - 1) % 2])
    _at(part == parts - 1, finish, parts)


def _at(condition, run, parts):
    """Run only if a condition on the part holds; without a branch if there is one part, for which it does."""
    if parts == 1:
        run()
    else:
        pl.when(condition)(run)


def _slice(number, size):
    start = number * size
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, size), size)


def _product(a, b, axis_a, axis_b):
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)

"""The FLOP count against counts made by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from training_cases import DIT

from avd_jax.capacity.flops import count_flops, jaxpr_flops
from avd_jax.errors import UserError
from avd_jax.models.functional import make_denoiser
from avd_jax.parallel.mesh import make_mesh


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def matmul(x, y):
    return x @ y


A, B = shape(3, 5), shape(5, 7)
ONCE = 2 * 3 * 5 * 7
SQUARE = shape(4, 4)


def test_products():
    assert count_flops(matmul, A, B) == ONCE
    assert count_flops(jax.jit(matmul), A, B) == ONCE
    assert count_flops(lambda x, y: jnp.einsum("bhqk,bhmk->bhqm", x, y), shape(2, 3, 5, 4), shape(2, 3, 7, 4)) == (
        2 * 2 * 3 * 5 * 7 * 4
    )
    assert count_flops(lambda x: jnp.sum(jnp.exp(x) + x), A) == 0


def test_convolution_and_its_gradients():
    x, kernel = shape(2, 8, 8, 3), shape(3, 3, 3, 10)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    once = 2 * (2 * 8 * 8 * 10) * (3 * 3 * 3)
    assert count_flops(convolve, x, kernel) == once
    all_three = jax.value_and_grad(lambda x, kernel: jnp.sum(convolve(x, kernel)), argnums=(0, 1))
    assert count_flops(all_three, x, kernel) == 3 * once

    def by_group(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
        )

    assert count_flops(by_group, x, shape(2, 2, 1, 6)) == 2 * (2 * 4 * 4 * 6) * (2 * 2 * 1)


def test_gradient_costs_twice_as_much_again():
    gradient = jax.grad(lambda x, y: jnp.sum(matmul(x, y) ** 2), argnums=(0, 1))
    assert count_flops(gradient, A, B) == 3 * ONCE


def test_scan_counts_its_length_and_remat_its_second_forward():
    def stack(x, weights, wrap):
        return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0].sum()

    weights, layer = shape(6, 4, 4), 2 * 4**3
    assert count_flops(lambda x, w: stack(x, w, lambda f: f), SQUARE, weights) == 6 * layer
    for wrap, passes in ((lambda f: f, 3), (jax.checkpoint, 4)):
        gradient = jax.grad(lambda x, w, wrap=wrap: stack(x, w, wrap), argnums=(0, 1))
        assert count_flops(gradient, SQUARE, weights) == passes * 6 * layer


def test_loops_of_unknown_length_need_a_number():
    def rollout(x, steps):
        return jax.lax.fori_loop(0, steps, lambda _, x: x @ x, x)

    steps = jax.ShapeDtypeStruct((), jnp.int32)
    assert count_flops(rollout, SQUARE, steps, dynamic_trips=1.5) == 1.5 * 2 * 4**3
    assert count_flops(lambda x: rollout(x, 3), SQUARE) == 3 * 2 * 4**3
    with pytest.raises(UserError, match="give dynamic_trips"):
        count_flops(rollout, SQUARE, steps)
    # Loops without work, such as those of random numbers, need none.
    assert count_flops(lambda x, steps: jax.lax.fori_loop(0, steps, lambda _, x: x + 1, x), SQUARE, steps) == 0


def test_the_dearest_branch_counts():
    def choose(which, x):
        return jax.lax.cond(which, lambda x: x @ x @ x, lambda x: x, x)

    assert count_flops(choose, jax.ShapeDtypeStruct((), bool), SQUARE) == 2 * 2 * 4**3


def test_shard_map_counts_every_device():
    mesh = make_mesh(data=4, seq=2)

    def product(x, y):
        return jax.shard_map(matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)(x, y)

    # Each half of `seq` makes the same product: it is made twice, and counted twice.
    assert count_flops(product, shape(8, 5), B) == 2 * (2 * 8 * 5 * 7)


def test_a_kernel_counts_once_a_grid_cell():
    def kernel(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] @ y_ref[...]

    def product(x, y):
        return pl.pallas_call(
            kernel,
            grid=(4, 2),
            in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
            out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
            out_shape=shape(32, 16),
        )(x, y)

    once = 2 * 32 * 16 * 16
    assert count_flops(product, shape(32, 16), shape(16, 16)) == once
    both = jax.make_jaxpr(lambda x, y: jnp.tanh(product(x, y)) @ y)(shape(32, 16), shape(16, 16))
    assert jaxpr_flops(both) == 2 * once
    assert jaxpr_flops(both, kernels_only=True) == once


def test_the_transformer():
    """Against the sizes of its matrices, for a forward pass and for a gradient with remat."""
    dim, ffn, layers, text = DIT.dim, DIT.ffn_dim, DIT.num_layers, DIT.text_len
    batch, tokens = 2, 3 * 2 * 2
    self_attention = tokens * 4 * dim * dim + 2 * tokens * tokens * dim
    cross_attention = tokens * 2 * dim * dim + text * 2 * dim * dim + 2 * tokens * text * dim
    blocks = layers * (self_attention + cross_attention + tokens * 2 * dim * ffn)
    text_embedding = text * (DIT.text_dim * dim + dim * dim)
    time_embedding = DIT.freq_dim * dim + dim * dim + dim * 6 * dim
    ends = tokens * dim * (4 * DIT.in_dim + 4 * DIT.out_dim)
    forward = 2 * batch * (blocks + text_embedding + time_embedding + ends)

    inputs = shape(batch, 3, 4, 4, 4), shape(batch), {"prompt_embeds": shape(batch, text, 16)}
    network = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat="block")
    params = network.abstract_params()
    assert count_flops(network, params, *inputs) == forward

    traced = jax.jit(jax.grad(lambda params: jnp.sum(network(params, *jax.tree.map(jnp.zeros_like, inputs))))).trace(
        params
    )
    blocks *= 2 * batch
    # Nothing asks for the gradients of the three inputs, which the first matrices would give.
    no_gradient = 2 * batch * (tokens * dim * 4 * DIT.in_dim + text * DIT.text_dim * dim + DIT.freq_dim * dim)
    assert jaxpr_flops(traced.jaxpr) == 3 * forward + blocks - no_gradient


def test_cudnn_attention(cudnn):
    query, key = (jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16) for tokens in (256, 128))

    def attend(query, key, value):
        return jnp.sum(jax.nn.dot_product_attention(query, key, value, implementation="cudnn").astype(jnp.float32))

    product = 2 * 2 * 4 * 256 * 128 * 64
    assert count_flops(attend, query, key, key) == 2 * product
    both = jax.make_jaxpr(lambda *args: attend(*args) + jnp.sum(args[0] @ jnp.zeros((64, 8))))(query, key, key)
    assert jaxpr_flops(both, kernels_only=True) == 2 * product < jaxpr_flops(both)
    assert count_flops(jax.grad(attend, argnums=(0, 1, 2)), query, key, key) == 7 * product

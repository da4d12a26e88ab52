"""Attention against a float64 softmax written out in NumPy, and the other kernels and meshes against that one."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from avd_jax.errors import UserError
from avd_jax.models import attention as attention_module
from avd_jax.models import pipelined
from avd_jax.models.attention import attention, keep_attention
from avd_jax.models.functional import denoiser
from avd_jax.models.placement import AttentionBlocks, Placement
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.parallel.mesh import make_mesh


def reference(query, key, value):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.empty((*query.shape[:3], value.shape[-1]))
    for b, h, i in np.ndindex(query.shape[:3]):
        scores = key[b, h] @ query[b, h, i] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        output[b, h, i] = weights / weights.sum() @ value[b, h]
    return output


def inputs(tokens, context, *, size=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (2, 3, tokens, 6), (2, 3, context, 6), (2, 3, context, 6)
    return [(size * rng.standard_normal(shape)).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(("tokens", "context"), [(7, 7), (7, 3), (1, 9)])
def test_softmax(tokens, context):
    query, key, value = inputs(tokens, context)
    np.testing.assert_allclose(attention(query, key, value), reference(query, key, value), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_scale_of_the_scores(scale):
    query, key, value = inputs(7, 3)
    expected = reference(query * scale * query.shape[-1] ** 0.5, key, value)
    np.testing.assert_allclose(attention(query, key, value, scale=scale), expected, rtol=2e-5, atol=1e-6)


def test_large_scores_do_not_overflow():
    query, key, value = inputs(5, 5, size=100.0)
    np.testing.assert_allclose(attention(query, key, value), reference(query, key, value), rtol=1e-3, atol=1e-2)


def test_many_keys_of_equal_score_average_in_half_precision():
    query = np.zeros((1, 1, 1, 4), jnp.bfloat16)
    value = np.random.default_rng(0).standard_normal((1, 1, 4096, 4)).astype(jnp.bfloat16) + jnp.bfloat16(1)
    output = attention(query, np.zeros_like(value), value)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(output[0, 0, 0], np.float64), np.asarray(value, np.float64).mean((0, 1, 2)), rtol=2**-7
    )


def test_half_precision_is_close():
    query, key, value = inputs(8, 8, dtype=jnp.bfloat16)
    expected = reference(query, key, value)
    error = np.asarray(attention(query, key, value), np.float64) - expected
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 1e-2


def test_gradient_is_that_of_the_formula():
    query, key, value = inputs(4, 5)
    differentiate = jax.jit(jax.grad(lambda *args: jnp.sum(attention(*args) ** 2), argnums=(0, 1, 2)))
    gradients = differentiate(query, key, value)
    step = 1e-6
    for argument, gradient in enumerate(gradients):
        arrays = [x.astype(np.float64) for x in (query, key, value)]
        for index in [(0, 0, 0, 0), (1, 2, 3, 4)]:
            losses = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[argument][index] += sign * step
                losses.append(np.sum(reference(*moved) ** 2))
            assert gradient[index] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3, abs=1e-5)


BLOCKS = AttentionBlocks(forward=(128, 256, 128), backward=(128, 256, 128), pipelined=(128, 128))
SPLIT = dataclasses.replace(BLOCKS, fused_backward=False)


def wide_inputs(tokens, context, *, batch=2, heads=2, head_dim=128):
    rng = np.random.default_rng(0)
    shapes = ((batch, heads, n, head_dim) for n in (tokens, context, context))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@functools.cache
def values_and_gradients(placement, tokens, context, valid_keys, interpret):
    """The output, and the gradients of a random functional of it."""
    arrays = wide_inputs(tokens, context)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), jnp.float32)

    def loss(*arrays):
        output = attention(*arrays, placement=placement, valid_keys=valid_keys, interpret=interpret)
        return jnp.sum(output * weights), output

    gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return output, gradients


# Both share the backward kernels, so that each forward kernel comes before one way of them.
@pytest.mark.parametrize(("kernel", "blocks"), [("splash", BLOCKS), ("pipelined", SPLIT)])
@pytest.mark.parametrize(
    ("tokens", "context", "valid_keys"),
    [
        (256, 256, 256),  # whole blocks
        (384, 384, 377),  # padded by the caller: blocks of 256 are padded once more
        (200, 200, None),  # padded by the kernel's wrapper
        (200, 128, None),  # cross-attention
        (130, 70, 60),  # both padded, in other amounts
    ],
)
def test_the_tpu_kernels_agree_with_xla(tokens, context, valid_keys, kernel, blocks):
    found = values_and_gradients(Placement(kernel, blocks=blocks), tokens, context, valid_keys, True)
    expected = values_and_gradients(Placement("xla"), tokens, context, valid_keys, False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize(("keys", "chunks_at_a_time"), [(700, 99), (601, 99), (760, 2), (380, 1)])
def test_the_pipelined_kernel_takes_any_number_of_chunks_and_parts(keys, chunks_at_a_time, monkeypatch):
    """Even and odd numbers of chunks, all of them in VMEM and not; only the last is not full."""
    monkeypatch.setattr(pipelined, "RESIDENT_BYTES", chunks_at_a_time * 4 * 128 * 128 * 4)
    query, key, value = wide_inputs(128, 768, batch=1, heads=1)
    whole = (x[None] for x in (query, key, value))
    (output,), logsumexp = pipelined.pipelined_forward(*whole, valid_keys=keys, blocks=BLOCKS, interpret=True)
    scores = np.asarray(query[0, 0], np.float64) @ np.asarray(key[0, 0, :keys], np.float64).T
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    sums = exponentials.sum(axis=1)
    np.testing.assert_allclose(logsumexp[0, 0], np.log(sums) + scores.max(axis=1), rtol=1e-5)
    expected = exponentials / sums[:, None] @ np.asarray(value[0, 0, :keys], np.float64)
    np.testing.assert_allclose(output[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shards", "tokens", "valid_keys", "as_they_lie"),
    [(2, 512, 500, True), (4, 512, 300, True), (2, 384, 384, False)],
)
def test_the_pipelined_kernel_takes_tokens_in_parts(shards, tokens, valid_keys, as_they_lie):
    """From where they lie if whole blocks of queries are in each part; two heads, so that parts are apart."""
    arrays = wide_inputs(tokens, tokens, batch=1)
    run = functools.partial(pipelined.pipelined_forward, valid_keys=valid_keys, blocks=BLOCKS, interpret=True)
    parts = [pipelined.cut_parts(x, shards) for x in arrays]
    output, logsumexp = run(*parts)
    (expected,), expected_logsumexp = run(*(x[None] for x in arrays))
    np.testing.assert_array_equal(pipelined.join_parts(output), expected)
    np.testing.assert_array_equal(logsumexp, expected_logsumexp)
    outside = jax.make_jaxpr(run)(*parts).jaxpr.eqns[0].params["jaxpr"].eqns
    assert as_they_lie == all(equation.primitive.name != "transpose" for equation in outside)


def test_the_pipelined_kernel_is_close_in_half_precision():
    query, key, value = (x.astype(jnp.bfloat16) for x in wide_inputs(128, 256, batch=1, heads=1))
    output = attention(query, key, value, placement=Placement("pipelined", blocks=BLOCKS), interpret=True)
    expected = reference(query, key, value)
    assert output.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((np.asarray(output, np.float64) - expected) ** 2) / np.mean(expected**2)) < 1e-2


@pytest.mark.parametrize(
    ("kind", "kernel"), [("TPU v4", "splash"), ("TPU v5 lite", "pipelined"), ("TPU v5", "pipelined"), ("cpu", "xla")]
)
def test_the_device_chooses_the_kernel(kind, kernel, monkeypatch):
    device = SimpleNamespace(platform="tpu" if "TPU" in kind else "cpu", device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert Placement().kernel_for(jnp.bfloat16) == kernel


@pytest.mark.parametrize("sizes", [(1024,), (1024, 100), (0, 1024)])
def test_the_pipelined_kernels_blocks_are_checked(sizes):
    with pytest.raises(UserError, match=r"attention.pipelined_blocks=\(.*must be two multiples of 128"):
        AttentionBlocks(pipelined=sizes)


def test_padded_keys_get_no_gradient():
    _, (_, key, value) = values_and_gradients(Placement("pipelined", blocks=SPLIT), 384, 384, 377, True)
    for gradient in (key, value):
        assert not np.any(gradient[:, :, 377:])
        assert np.all(np.any(gradient[:, :, :377], axis=-1))


@pytest.mark.parametrize("kernel", ["xla", "pipelined"])
@pytest.mark.parametrize(("tokens", "context"), [(512, 512), (256, 70)])
def test_sequence_parallelism_changes_nothing(kernel, tokens, context):
    """Heads and tokens change places and back, on a mesh that shares the batch too."""
    mesh = make_mesh(data=1, fsdp=2, seq=4)
    arrays = wide_inputs(tokens, context, heads=4, head_dim=16 if kernel == "xla" else 128)
    placement = Placement(kernel, mesh=mesh, batch_axes=("data", "fsdp"), sequence_axis="seq", blocks=BLOCKS)

    def run(placement):
        def loss(*arrays):
            output = attention(*arrays, placement=placement, valid_keys=context - 5, interpret=True)
            return jnp.sum(output**2), output

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    for a, b in zip(jax.tree.leaves(run(placement)), jax.tree.leaves(run(Placement("xla"))), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_ulysses_exchanges_and_gathers_nothing():
    """Self-attention moves heads and tokens with four all-to-alls and no more."""
    mesh = make_mesh(data=1, fsdp=2, seq=4)
    placement = Placement("xla", mesh=mesh, batch_axes=("data", "fsdp"), sequence_axis="seq")
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "seq"))
    arrays = [jax.device_put(x, sharding) for x in wide_inputs(64, 64, heads=4, head_dim=16)]
    text = jax.jit(lambda *arrays: attention(*arrays, placement=placement)).lower(*arrays).compile().as_text()
    assert text.count(" all-to-all(") == 4
    assert "all-gather" not in text


def test_a_batch_that_the_mesh_does_not_divide_is_held_whole():
    mesh = make_mesh(data=1, fsdp=4, seq=2)
    placement = Placement("xla", mesh=mesh, batch_axes=("data", "fsdp"), sequence_axis="seq")
    arrays = wide_inputs(16, 16, batch=3, head_dim=8)
    np.testing.assert_allclose(
        jax.jit(lambda *arrays: attention(*arrays, placement=placement))(*arrays), attention(*arrays), atol=1e-5
    )


def test_heads_must_be_shared_out_evenly():
    mesh = make_mesh(data=1, fsdp=1, seq=8)
    placement = Placement("xla", mesh=mesh, batch_axes=("data", "fsdp"), sequence_axis="seq")
    with pytest.raises(UserError, match=r"12 attention heads .* config.mesh.seq=8 .* 1, 2, 3, 4, 6, 12"):
        jax.eval_shape(lambda *arrays: attention(*arrays, placement=placement), *wide_inputs(16, 16, heads=12))


@pytest.mark.parametrize(
    ("kernel", "name"), [("pipelined", pipelined.NAME), ("splash", "_fwd"), ("cudnn", "fwd_wrapper")]
)
def test_saved_attention_runs_its_forward_once(kernel, name, cudnn):
    """With that policy a gradient holds as many forward kernels as there are attentions."""
    query, key, value = (x.astype(jnp.bfloat16) for x in wide_inputs(128, 128))
    placement = Placement(kernel, blocks=BLOCKS)

    def loss(query, policy):
        def block(query):
            output = attention(jnp.cos(query), key, value, placement=placement, interpret=True)
            return jnp.sum(jnp.sin(output))

        return jax.checkpoint(block, policy=policy)(query)

    def forward_kernels(policy):
        return _live_kernels(jax.make_jaxpr(jax.grad(functools.partial(loss, policy=policy)))(query).jaxpr, name)

    assert forward_kernels(keep_attention) == 1
    assert forward_kernels(jax.checkpoint_policies.nothing_saveable) == 2


@functools.cache
def small_dit():
    config = WanDiTConfig(dim=64, ffn_dim=8, num_heads=8, num_layers=1, in_dim=4, out_dim=4, text_dim=8, text_len=7)
    return nnx.eval_shape(lambda: WanDiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat="save_attention"))


@pytest.mark.parametrize("kernel", ["xla", "pipelined", "splash", "cudnn"])
@pytest.mark.parametrize(("seq", "height"), [(1, 6), (2, 6), (4, 6), (8, 10), (8, 6)])
def test_every_mesh_takes_every_kernel_and_any_number_of_tokens(kernel, seq, height, cudnn):
    """cuDNN's backward pass refuses an odd number of queries or keys on a device; here there are 45 tokens, or 75."""
    mesh = make_mesh(data=1, fsdp=-1, seq=seq)
    dit = small_dit()
    dit.placement = Placement(kernel, mesh=mesh, batch_axes=("data", "fsdp"), sequence_axis="seq", blocks=BLOCKS)
    network, params = denoiser(dit)
    latents, timesteps = jnp.zeros((8, 3, height, 10, 4)), jnp.zeros(8)

    def loss(params):
        return jnp.sum(network(params, latents, timesteps, {"prompt_embeds": jnp.zeros((8, 7, 8))}))

    jax.eval_shape(jax.grad(loss), params)


@pytest.mark.parametrize(("valid_keys", "lengths"), [(6, None), (7, [7, 7])])
def test_cudnn_masks_a_key_that_makes_their_number_even(valid_keys, lengths, monkeypatch):
    def stand_in(query, key, value, *, scale, implementation, query_seq_lengths=None, key_value_seq_lengths=None):
        assert (implementation, key.shape[1] % 2, query.shape[1] % 2) == ("cudnn", 0, 0)
        assert key_value_seq_lengths is None or key_value_seq_lengths.tolist() == lengths
        assert (key_value_seq_lengths is None) == (lengths is None)
        mask = None if lengths is None else (jnp.arange(key.shape[1]) < lengths[0])[None, None, None]
        return plain(query, key, value, scale=scale, mask=mask)

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    query, key, value = inputs(5, 9)
    found = attention(query, key, value, placement=Placement("cudnn"), valid_keys=valid_keys)
    expected = reference(query, key[:, :, :valid_keys], value[:, :, :valid_keys])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_rows_at_a_time_are_the_same(monkeypatch):
    """XLA's kernel never holds more scores than fit, forwards and backwards; 7 rows are not cut evenly by 3."""
    arrays = inputs(7, 9)
    run = lambda *arrays: jnp.sum(attention(*arrays, valid_keys=8) ** 2)  # noqa: E731
    expected = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*arrays)
    monkeypatch.setattr(attention_module, "LARGEST_SCORES", 3 * (2 * 3) * 8)
    found = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    held = [aval.size for aval in _made(jax.make_jaxpr(jax.grad(run))(*arrays).jaxpr)]
    assert max(held) < 2 * 3 * 7 * 8


def test_parts_add_their_gradients_in_float32(monkeypatch):
    arrays = [x.astype(jnp.bfloat16) for x in wide_inputs(256, 32, head_dim=8)]
    weights = np.random.default_rng(1).standard_normal((2, 2, 256, 8), np.float32)

    def gradients(dtype):
        run = lambda *arrays: jnp.sum(attention(*arrays).astype(jnp.float32) * weights)  # noqa: E731
        return jax.jit(jax.grad(run, argnums=(1, 2)))(*(x.astype(dtype) for x in arrays))

    exact = gradients(jnp.float32)
    monkeypatch.setattr(attention_module, "LARGEST_SCORES", 1)  # a row at a time
    for found, expected in zip(gradients(jnp.bfloat16), exact, strict=True):
        error = np.asarray(found, np.float64) - expected
        assert np.sqrt(np.mean(error**2) / np.mean(np.square(expected))) < 1e-2


def _made(jaxpr):
    """Yield the abstract values of all results in a program."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from _made(getattr(value, "jaxpr", value))


def _live_kernels(jaxpr, name):
    """Count the kernels of some name in a program, but for calls without results, which the compiler drops."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("dot_product_attention"):
            count += name in equation.primitive.name
        elif equation.primitive.name == "pallas_call":
            count += name in str(equation.params.get("name") or equation.params["name_and_src_info"])
        elif equation.outvars:
            inner = (value for value in equation.params.values() if hasattr(value, "eqns"))
            count += sum(_live_kernels(getattr(value, "jaxpr", value), name) for value in inner)
    return count

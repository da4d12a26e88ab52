"""Forward tangents: blockwise attention, and the transformer under `jax.jvp`, against JAX's own of plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models import rope, tangents
from avd_jax.models.attention import attention
from avd_jax.models.functional import make_denoiser
from avd_jax.models.placement import Placement
from avd_jax.models.tangents import attention_and_tangent
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.mesh import BATCH_AXES, make_mesh

DIT = WanDiTConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=32, text_dim=16, text_len=8
)


def plain(query, key, value):
    return jax.nn.softmax(jnp.einsum("bhqk,bhmk->bhqm", query, key), axis=-1) @ value


def heads(tokens, keys, dtype=np.float64):
    rng = np.random.default_rng(0)
    sizes = (tokens, keys, keys)
    return [[jnp.asarray(rng.standard_normal((2, 3, n, 8)), dtype) for n in sizes] for _ in range(2)]


@pytest.mark.parametrize(("tokens", "keys", "valid"), [(300, 300, 290), (130, 40, 33)])
@pytest.mark.parametrize("static", [False, True])
def test_blocks_give_the_tangent_of_the_whole_softmax(tokens, keys, valid, static, monkeypatch):
    monkeypatch.setattr(tangents, "LARGEST_BLOCK", 2 * 3 * 128 * 128)  # several parts of queries too
    with jax.enable_x64(True):
        primals, given = heads(tokens, keys)
        if static:
            given[1:] = [jnp.zeros_like(x) for x in given[1:]]
        cut = [[x[0], *(one[:, :, :valid] for one in x[1:])] for x in (primals, given)]
        expected = jax.jvp(plain, *cut)
        if static:
            given[1:] = None, None
        found = attention_and_tangent(*primals, *given, valid_keys=valid, block_keys=128)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_the_tangent_is_the_central_difference():
    with jax.enable_x64(True):
        primals, given = heads(140, 140)
        step = 1e-6
        ends = [plain(*(x + sign * step * t for x, t in zip(primals, given, strict=True))) for sign in (1, -1)]
        _, tangent = attention_and_tangent(*primals, *given, valid_keys=140, block_keys=128)
        np.testing.assert_allclose(tangent, (ends[0] - ends[1]) / (2 * step), atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_single_precision_keeps_its_digits(dtype, tolerance):
    primals, given = heads(256, 256, dtype)
    wide = [[np.asarray(x, np.float32) for x in side] for side in (primals, given)]
    found = attention_and_tangent(*primals, *given, valid_keys=256, block_keys=128)
    for one, other in zip(found, jax.jvp(plain, *wide), strict=True):
        assert one.dtype == dtype
        error = np.asarray(one, np.float32) - other
        assert np.sqrt(np.mean(np.square(error)) / np.mean(np.square(other))) < tolerance


def test_memory_grows_as_the_tokens_do(monkeypatch):
    monkeypatch.setattr(tangents, "LARGEST_BLOCK", 3 * 128 * 128)

    def temporaries(tokens):
        array = jax.ShapeDtypeStruct((1, 3, tokens, 8), jnp.float32)
        run = jax.jit(lambda *x: attention_and_tangent(*x, valid_keys=tokens, block_keys=128))
        return run.lower(*[array] * 6).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 5 * short
    assert long < 4096**2 * 4


def test_a_kernel_that_has_no_tangent_is_given_one_and_keeps_its_result():
    primals, given = heads(20, 20, jnp.float32)
    placement = Placement("xla", tangents=True)
    found, tangent = jax.jvp(lambda *x: attention(*x, placement=placement), primals, given)
    expected = jax.jvp(lambda *x: attention(*x, placement=Placement("xla")), primals, given)
    np.testing.assert_allclose(found, expected[0], atol=1e-6)
    np.testing.assert_allclose(tangent, expected[1], atol=1e-5)
    splash = Placement("splash", tangents=True)  # its kernel has no rule of its own
    jax.eval_shape(lambda: jax.jvp(lambda *x: attention(*x, placement=splash), primals, given))


def test_the_rotation_turns_a_tangent_as_it_turns_the_heads():
    (x, *_), (tangent, *_) = heads(12, 12, jnp.float32)
    table = rope.rotation(3, 2, 2, 8)
    _, found = jax.jvp(lambda x: rope.rotate(x, *table), (x,), (tangent,))
    np.testing.assert_array_equal(found, rope.rotate(tangent, *table))


def inputs(batch=2):
    rng = np.random.default_rng(3)
    xt, flow = (jnp.asarray(rng.standard_normal((batch, 3, 6, 10, 4)), jnp.float32) for _ in range(2))
    embeds = jnp.asarray(rng.standard_normal((batch, 8, 16)), jnp.float32)
    return (xt, jnp.asarray([700.0, 90.0])), (flow, jnp.full(batch, 1000.0)), {"prompt_embeds": embeds}


def random_params(network):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.2, x.dtype), network.abstract_params())


def tangent_of(placement, remat="none"):
    network = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat=remat, placement=placement)
    point, along, conditions = inputs()

    @jax.jit
    def run(params):
        return jax.jvp(lambda *at: network(params, *at, conditions), point, along)

    return run(random_params(network))


def test_the_transformer_under_jvp_on_one_device_and_with_shared_tokens():
    """45 tokens on 2 devices: a padding key among them; the text has no tangent."""
    expected = tangent_of(Placement("xla"))
    scale = [np.sqrt(np.mean(np.square(x))) for x in expected]
    mesh = make_mesh(fsdp=2, seq=2, devices=jax.devices()[:4])
    shared = Placement("xla", mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq", tangents=True)
    for placement, remat in ((Placement("xla", tangents=True), "none"), (shared, "block")):
        for found, whole, size in zip(tangent_of(placement, remat), expected, scale, strict=True):
            np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * size)

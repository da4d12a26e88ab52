"""The transformer: sizes, invariances, remat, dtypes, bad input. Golden values are in test_convert_loading.py."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avd_jax.errors import UserError
from avd_jax.models import wan_dit
from avd_jax.models.functional import make_denoiser
from avd_jax.models.placement import Placement
from avd_jax.models.wan_dit import REMAT_POLICIES, WAN_1_3B, WAN_14B, WanDiT, WanDiTConfig, timestep_features
from avd_jax.parallel.mesh import BATCH_AXES, make_mesh

TINY = WanDiTConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=4, out_dim=3, freq_dim=32, text_dim=16, text_len=9
)
SHAPE = 3, 4, 6, 4


@functools.cache
def params():
    """Random parameters, biases and norms too, of the tiny transformer."""
    dit = nnx.eval_shape(lambda: WanDiT(TINY, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(nnx.state(dit)))
    rng = np.random.default_rng(0)
    filled = [rng.standard_normal(leaf.shape, np.float32) * max(leaf.shape[-2:]) ** -0.5 for leaf in leaves]
    return jax.tree.unflatten(structure, filled)


@functools.cache
def model(*, remat="none", dtype=jnp.float32):
    """Return (params, latents, timesteps, prompt_embeds) -> velocity, compiled."""
    network = make_denoiser(TINY, dtype=jnp.dtype(dtype).name, param_dtype="float32", remat=remat)
    return jax.jit(lambda params, *inputs: network.module(params)(*inputs))


def inputs(batch=2, text=5, shape=SHAPE):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((batch, *shape), np.float32)
    return latents, np.linspace(20, 980, batch, dtype=np.float32), rng.standard_normal((batch, text, 16), np.float32)


@functools.cache
def gradients(remat):
    apply = model(remat=remat)
    return jax.jit(jax.grad(lambda params: jnp.mean(apply(params, *inputs()) ** 2)))(params())


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize(("config", "count"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_full_sizes(config, count):
    state = nnx.state(nnx.eval_shape(lambda: WanDiT(config, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == count


def test_padding_is_the_models_own():
    latents, timesteps, embeds = inputs(text=5)
    padded = np.pad(embeds, ((0, 0), (0, 4), (0, 0)))
    short, long = (model()(params(), latents, timesteps, text) for text in (embeds, padded))
    np.testing.assert_array_equal(short, long)


def test_the_padding_is_attended_to():
    """As Wan does, which masks no text token."""
    latents, timesteps, embeds = inputs(text=5)
    longer = make_denoiser(dataclasses.replace(TINY, text_len=30), dtype="float32", param_dtype="float32", remat="none")
    velocity = jax.jit(lambda params, *args: longer.module(params)(*args))(params(), latents, timesteps, embeds)
    assert relative_error(velocity, run(latents, timesteps, embeds)) > 1e-4


def run(*args):
    return model()(params(), *args)


def test_each_example_is_by_itself():
    latents, timesteps, embeds = inputs(batch=3)
    together = run(latents, timesteps, embeds)
    for b in range(3):
        alone = run(latents[b : b + 1], timesteps[b : b + 1], embeds[b : b + 1])
        assert relative_error(alone[0], together[b]) < 1e-5


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_every_input_matters(argument):
    given = list(inputs())
    before = run(*given)
    given[argument] = given[argument] + 1
    assert relative_error(run(*given), before) > 1e-3


def test_velocity_has_its_own_channels_and_is_float32():
    velocity = run(*inputs())
    assert velocity.shape == (2, 3, 4, 6, 3)
    assert model(dtype=jnp.bfloat16)(params(), *inputs()).dtype == velocity.dtype == jnp.float32


def test_every_parameter_learns():
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients("none")):
        assert np.isfinite(gradient).all(), path
        name = jax.tree_util.keystr(path)
        # Softmax is the same for keys shifted alike, but the norm after the projection makes even k.bias matter.
        assert np.abs(gradient).max() > 1e-8, name
        if "blocks" in name:
            assert all(np.abs(layer).max() > 1e-8 for layer in gradient), name


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(remat):
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7),
        gradients(remat),
        gradients("none"),
    )


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_keeps_the_norms_moments_so_that_no_pass_is_made_for_them_again(remat, capsys):
    apply = model(remat=remat)
    jax.ad_checkpoint.print_saved_residuals(lambda params: jnp.mean(apply(params, *inputs()) ** 2), params())
    tokens = SHAPE[0] * SHAPE[1] * SHAPE[2] // 4
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert kept.count(f"f32[{TINY.num_layers},2,{tokens}]") == 2 * 3, kept


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "seq": 2}])
def test_the_forms_that_suit_tpus_have_the_same_values_and_gradients(axes, monkeypatch):
    usual = run(*inputs()), gradients("block")
    monkeypatch.setattr(Placement, "on_tpu", True)
    mesh = make_mesh(data=1, **axes, devices=jax.devices()[: math.prod(axes.values())])
    placement = Placement("xla", mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq")
    network = make_denoiser(TINY, dtype="float32", param_dtype="float32", remat="block", placement=placement)

    def loss(params):
        velocity = network.module(params)(*inputs())
        return jnp.mean(velocity**2), velocity

    found, velocity = jax.jit(jax.grad(loss, has_aux=True))(params())
    np.testing.assert_allclose(velocity, usual[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, usual[1])


def test_gradient_is_the_difference_quotient():
    direction = gradients("none")
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(direction)))

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda p, g: p + step / length * g, params(), direction)
        return jnp.mean(model()(moved, *inputs()) ** 2)

    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(length, rel=1e-2)


def test_half_precision_is_as_close_as_wans_own_and_the_same_for_stored_and_for_cast_weights():
    """In 30 layers; with norms, modulation, head or residual stream rounded it would be 1e-2 and more."""
    deep = dataclasses.replace(TINY, dim=128, ffn_dim=256, num_layers=30)
    exact, fake_score, teacher = (
        make_denoiser(deep, dtype=dtype, param_dtype=param_dtype, remat="none")
        for dtype, param_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    )
    masters = jax.jit(lambda: nnx.to_pure_dict(nnx.state(WanDiT(deep, rngs=nnx.Rngs(0)))))()
    # Embeddings of umT5's size, and times from the middle, as in benchmarks/precision.py.
    latents, times, conditions = inputs()[0], np.float32([250, 750]), {"prompt_embeds": 0.2 * inputs()[2]}

    def velocity(network):
        stored = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), masters, network.abstract_params())
        return jax.jit(network)(stored, latents, times, conditions)

    assert 1e-4 < relative_error(velocity(fake_score), velocity(exact)) < 5.5e-3
    np.testing.assert_array_equal(velocity(teacher), velocity(fake_score))


def test_the_backward_pass_keeps_what_blocks_see_in_their_dtype():
    """A float32 residual stream in half precision would double the memory of a training step."""
    network = make_denoiser(TINY, dtype="bfloat16", param_dtype="float32", remat="block")
    run = lambda params: jnp.sum(network.module(params)(*inputs()))  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(run, params)[1], network.abstract_params()))
    streams = [leaf for leaf in kept if leaf.shape == (TINY.num_layers, 2, 18, TINY.dim)]
    assert [leaf.dtype for leaf in streams] == [jnp.bfloat16]


def test_one_block_is_traced_however_many_there_are(monkeypatch):
    calls = []
    original = wan_dit.Block.__call__

    def counted(self, *args, **options):
        calls.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(wan_dit.Block, "__call__", counted)
    config = dataclasses.replace(TINY, num_layers=7)
    deep = make_denoiser(config, dtype="float32", param_dtype="float32", remat="none")
    calls.clear()
    jax.eval_shape(lambda params: deep.module(params)(*inputs()), deep.abstract_params())
    assert len(calls) == 1


def test_patches_are_laid_out_as_the_convolution_lays_them():
    """Wan embeds with a convolution whose stride is its kernel, and puts the head's channels back by einsum."""
    dit, config = nnx.jit(lambda: WanDiT(TINY, rngs=nnx.Rngs(0)))(), TINY
    latents = inputs()[0]
    tokens, grid = dit._patchify(latents)
    tokens = np.asarray(tokens)
    kernel, bias = np.asarray(dit.patch_embedding.kernel[...]), np.asarray(dit.patch_embedding.bias[...])
    weight = kernel.reshape(1, 2, 2, config.in_dim, config.dim)  # p q r c d
    assert grid == (3, 2, 3)
    for number, (f, h, w) in enumerate(np.ndindex(*grid)):
        expected = bias.copy().astype(np.float64)
        for q, r in np.ndindex(2, 2):
            expected = expected + latents[0, f, 2 * h + q, 2 * w + r] @ weight[0, q, r]
        np.testing.assert_allclose(tokens[0, number], expected, rtol=1e-5, atol=1e-5)

    # With every weight of the head 0, a token's patch is the head's bias in the order (q, r, channel).
    dit.head.head.kernel[...] = jnp.zeros_like(dit.head.head.kernel[...])
    dit.head.head.bias[...] = jnp.arange(12.0)
    velocity = np.asarray(nnx.jit(lambda dit, *args: dit(*args))(dit, *inputs()))
    for q, r in np.ndindex(2, 2):
        assert (velocity[:, :, q::2, r::2] == 3 * (2 * q + r) + np.arange(3)).all()


def test_timestep_features():
    features = np.asarray(timestep_features(np.float32([0, 522, 1000]), 8))
    exact = np.outer([0, 522, 1000], 10_000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(features, np.concatenate([np.cos(exact), np.sin(exact)], -1), atol=1e-4)


def test_bad_input():
    network = make_denoiser(TINY, dtype="float32", param_dtype="float32", remat="none")

    def trace(*inputs):
        jax.eval_shape(lambda params: network.module(params)(*inputs), network.abstract_params())

    latents, timesteps, embeds = inputs()
    for shape, name in (((3, 5, 6, 4), "height is 5"), ((3, 4, 7, 4), "width is 7")):
        with pytest.raises(UserError, match=name):
            trace(inputs(shape=shape)[0], timesteps, embeds)
    with pytest.raises(UserError, match="have 10 tokens, the model takes 9"):
        trace(latents, timesteps, inputs(text=10)[2])
    with pytest.raises(UserError, match=r"remat='blokc' is not one of none, block, save_attention"):
        WanDiT(TINY, rngs=nnx.Rngs(0), remat="blokc")
    with pytest.raises(UserError, match="dim=25 must be num_heads=2 times"):
        dataclasses.replace(TINY, dim=25)
    with pytest.raises(UserError, match="dim=6 must be num_heads=2 times"):
        dataclasses.replace(TINY, dim=6)

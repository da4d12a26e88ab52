"""The autoencoder's TPU kernels, run step by step on a CPU, against the layers that XLA makes."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from avd_jax.data.encoding import decoding_on
from avd_jax.models import vae_kernels, vae_layers
from avd_jax.models.vae_layers import CausalConvolution, Convolution, Head, ResidualBlock, RMSNorm, Upsample
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig, computing_in

FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("frames", "height", "width", "channels", "out_channels", "add"),
    [(2, 18, 5, 4, 3, False), (1, 3, 16, 3, 40, True)],  # in 3 cells of 6 rows, and in one cell
)
def test_activated_convolution(frames, height, width, channels, out_channels, add, first):
    norm, conv = (
        RMSNorm(channels, param_dtype=jnp.float32),
        CausalConvolution(channels, out_channels, rngs=nnx.Rngs(0), **FLOAT32),
    )
    norm.scale[...], conv.bias[...] = jnp.asarray(random(channels)), jnp.asarray(random(out_channels))
    x, past = random(2, frames, height, width, channels), random(2, 2, height, width, channels, seed=1)
    skip = random(2, frames, height, width, out_channels, seed=2) if add else None
    y, kept = jax.jit(lambda x, past: vae_layers._convolve_activated(norm, conv, x, past, first, skip))(x, past)
    ours, ours_kept = vae_kernels.convolve_activated(
        x, past, first, scale=norm.scale[...], kernel=conv.kernel[...], bias=conv.bias[...], skip=skip, interpret=True
    )
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours_kept, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "channels", "out_channels", "parts"), [(18, 5, 4, 3, 1), (2, 16, 128, 130, 2)]
)
def test_upsampling(height, width, channels, out_channels, parts):
    kernel, bias = random(3, 3, channels, out_channels), random(out_channels)
    x = random(2, 1, height, width, parts * channels, seed=1)
    ours = vae_kernels.upsample(x, kernel=kernel, bias=bias, parts=parts, interpret=True)
    frames = rearrange(x, "b f h w (parts c) -> b (f parts) h w c", parts=parts).repeat(2, axis=2).repeat(2, axis=3)
    expected = vae_layers.convolve(jnp.asarray(frames), jnp.asarray(kernel[None]), padding=((1, 1), (1, 1))) + bias
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def with_kernels(*layers):
    for layer in layers:
        for _, one in nnx.iter_modules(layer):
            one.tpu_kernels = True
    return layers


@pytest.mark.parametrize(("wanted", "kernels"), [(True, {"convolve": 2, "upsample": 1}), (False, {})])
def test_which_layers_are_kernels(wanted, kernels):
    options = {"rngs": nnx.Rngs(0), "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    block, enlarge = ResidualBlock(128, 128, **options), Upsample(128, temporal=True, **options)
    norm, rgb = RMSNorm(128, param_dtype=jnp.bfloat16), CausalConvolution(128, 3, **options)
    if wanted:
        with_kernels(block, enlarge, rgb)
    to_rgb = Head(norm, rgb)
    x = jax.ShapeDtypeStruct((1, 2, 4, 8, 128), jnp.bfloat16)

    def both(x, past, first):
        y = block(x, (past, past), first)[0]
        return enlarge(y, past, first), to_rgb(y, past, first)

    text = jax.jit(both).trace(x, x, jax.ShapeDtypeStruct((), bool)).lower(lowering_platforms=("tpu",)).as_text()
    counts = {name: text.count(f'kernel_name = "vae_{name}') for name in ("convolve", "upsample")}
    assert {name: count for name, count in counts.items() if count} == kernels


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "wanted"),
    [
        ("tpu", "TPU v5 lite", jnp.bfloat16, True),
        ("tpu", "TPU v4", jnp.bfloat16, False),  # its VMEM is too small
        ("gpu", "NVIDIA H100", jnp.bfloat16, False),
        ("cpu", "cpu", jnp.float32, False),
    ],
)
def test_where_a_decoder_has_kernels(platform, kind, dtype, wanted):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    sizes = WanVAEConfig(4, 4, (1,), 1, (), (0.0,) * 4, (1.0,) * 4)

    def both():
        vae = decoding_on(WanVAE(sizes, nnx.Rngs(0)), device)
        return vae, computing_in(vae, jnp.float32)

    for vae, expected in zip(nnx.eval_shape(both), ((dtype, wanted), (jnp.float32, False)), strict=True):
        found = {(one.dtype, one.tpu_kernels) for _, one in nnx.iter_modules(vae) if isinstance(one, Convolution)}
        assert {(jnp.dtype(name), kernels) for name, kernels in found} == {(jnp.dtype(expected[0]), expected[1])}


def test_gradients_are_those_of_the_layers(monkeypatch):
    run = functools.partial(vae_kernels.convolve_activated, interpret=True)
    monkeypatch.setattr(vae_kernels, "convolve_activated", run)
    options = {"rngs": nnx.Rngs(0), "dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    norm, conv = RMSNorm(4, param_dtype=jnp.float32), CausalConvolution(4, 32, **options)
    x, weights = jnp.asarray(random(1, 2, 2, 3, 4), jnp.bfloat16), random(1, 2, 2, 3, 32, seed=1)

    def gradients():
        graph, state = nnx.split((norm, conv))

        def loss(state, x):
            y, _ = vae_layers._convolve_activated(*nnx.merge(graph, state), x, x, False)
            return jnp.sum(y.astype(jnp.float32) * weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)

    expected = gradients()
    with_kernels(conv)
    jax.tree.map(np.testing.assert_array_equal, gradients(), expected)

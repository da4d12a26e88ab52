"""The autoencoder's TPU kernels, run step by step on a CPU, against the layers that XLA makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from avd_jax.models import vae_kernels, vae_layers
from avd_jax.models.vae_layers import CausalConvolution, Head, ResidualBlock, RMSNorm, Upsample

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


@pytest.mark.parametrize(("dtype", "kernels"), [(jnp.bfloat16, {"convolve": 2, "upsample": 1}), (jnp.float32, {})])
def test_which_layers_are_kernels_on_a_tpu(dtype, kernels):
    options = {"rngs": nnx.Rngs(0), "dtype": dtype, "param_dtype": dtype}
    block, enlarge = ResidualBlock(128, 128, **options), Upsample(128, temporal=True, **options)
    to_rgb = Head(RMSNorm(128, param_dtype=dtype), CausalConvolution(128, 3, **options))
    x = jax.ShapeDtypeStruct((1, 2, 4, 8, 128), dtype)
    past = jax.ShapeDtypeStruct((1, 2, 4, 8, 128), dtype)

    def both(x, past, first):
        y = block(x, (past, past), first)[0]
        return enlarge(y, past, first), to_rgb(y, past, first)

    traced = jax.jit(both).trace(x, past, jax.ShapeDtypeStruct((), bool))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert {
        name: count for name in ("convolve", "upsample") if (count := text.count(f'kernel_name = "vae_{name}'))
    } == (kernels)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_gradients_are_those_of_the_layers(monkeypatch):
    options = {"rngs": nnx.Rngs(0), "dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    graph, state = nnx.split((RMSNorm(4, param_dtype=jnp.float32), CausalConvolution(4, 32, **options)))
    x = jnp.asarray(random(1, 2, 2, 3, 4), jnp.bfloat16)

    def loss(state, x):
        y, _ = vae_layers._convolve_activated(*nnx.merge(graph, state), x, x, False)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)
    monkeypatch.setattr(vae_layers, "has_kernels", lambda *dtypes: False)
    expected = jax.jit(jax.grad(lambda *args: loss(*args), argnums=(0, 1)))(state, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4), found, expected)

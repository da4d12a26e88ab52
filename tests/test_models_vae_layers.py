"""The autoencoder's layers: known answers in NumPy, and group by group against the whole clip at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from scipy.signal import correlate

from avd_jax.models import vae_layers
from avd_jax.models.vae_layers import (
    AttentionBlock,
    CausalConvolution,
    Convolution,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Upsample,
)

OPTIONS = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def random_frames(frames, channels, batch=2):
    return np.random.default_rng(0).normal(size=(batch, frames, 4, 6, channels)).astype(np.float32)


def random_layer(make):
    """Build a layer with no weight at its initial zero or one, which would hide that it is left out."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **OPTIONS)))
    rng = np.random.default_rng(1)
    layer = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state))
    return layer, jax.jit(lambda *inputs: layer(*inputs))


def correlate_clip(x, kernel, bias):
    """Correlate x [F H W I], already padded, with kernel [T R S I O], in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    outputs = [
        sum(correlate(x[..., i], kernel[..., i, o], mode="valid", method="direct") for i in range(x.shape[-1]))
        for o in range(kernel.shape[-1])
    ]
    return np.stack(outputs, axis=-1) + np.asarray(bias)


@pytest.mark.parametrize("path", ["_convolve_by_tap", "_convolve_3d"])
@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 1, 1), (1, 2, 2)], ids=str)
def test_both_ways_to_convolve(path, strides):
    x, kernel = random_frames(5, 3, batch=1), np.random.default_rng(1).normal(size=(3, 3, 3, 3, 2)).astype(np.float32)
    padding = ((0, 1), (1, 1))
    y = jax.jit(functools.partial(getattr(vae_layers, path), strides=strides, padding=padding))(x, kernel)
    padded = np.pad(x[0], ((0, 0), *padding, (0, 0)))
    expected = correlate_clip(padded, kernel, 0)[:: strides[0], :: strides[1], :: strides[2]]
    np.testing.assert_allclose(y[0], expected, rtol=1e-5, atol=1e-5)


def test_convolution_in_bf16():
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    conv = Convolution(3, 2, (3, 1, 1), rngs=nnx.Rngs(0), **options)
    x = random_frames(4, 3)
    y = conv(x)
    assert y.dtype == jnp.bfloat16
    expected = correlate_clip(x[0], conv.kernel[...], conv.bias[...])
    np.testing.assert_allclose(y[0].astype(jnp.float32), expected, atol=0.05)


@pytest.mark.parametrize("groups", [(1, 4), (1, 1, 3)], ids=str)
def test_causal_convolution_of_groups_is_that_of_the_clip(groups):
    conv, run = random_layer(functools.partial(CausalConvolution, 3, 2))
    x = random_frames(5, 3, batch=1)
    outputs, past = [], None
    for group in np.split(x, np.cumsum(groups)[:-1], axis=1):
        y, past = run(group, past)
        outputs.append(y[0])
    padded = np.pad(x[0], ((2, 0), (1, 1), (1, 1), (0, 0)))
    expected = correlate_clip(padded, conv.kernel[...], conv.bias[...])
    np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(past, x[:, -2:])


def test_norm():
    norm = RMSNorm(8, param_dtype=jnp.float32)
    norm.scale[...] = jnp.arange(8.0)
    run = jax.jit(lambda x: norm(x))
    x = random_frames(1, 8)
    x[0, 0, 0, 0] = 0
    y = run(x)
    root_mean_square = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    expected = np.divide(x, root_mean_square, out=np.zeros_like(x), where=root_mean_square > 0) * np.arange(8)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    assert run(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(norm(x) ** 3)))(x)).all()


def test_attention_is_among_the_pixels_of_a_frame():
    block, run = random_layer(functools.partial(AttentionBlock, 4))
    x = random_frames(3, 4)
    frame = x[1, 2].reshape(24, 4)
    normalised = frame / np.sqrt(np.mean(frame**2, axis=-1, keepdims=True)) * block.norm.scale[...]
    query, key, value = np.split(normalised @ block.to_qkv.kernel[...] + block.to_qkv.bias[...], 3, axis=-1)
    scores = np.exp(query @ key.T / 2)  # sqrt(4 channels)
    attended = scores / scores.sum(axis=-1, keepdims=True) @ value
    expected = frame + attended @ block.proj.kernel[...] + block.proj.bias[...]
    np.testing.assert_allclose(run(x)[1, 2].reshape(24, 4), expected, rtol=1e-4, atol=1e-5)


def test_attention_in_parts_of_a_frame_is_that_of_the_frame(monkeypatch):
    block, run = random_layer(functools.partial(AttentionBlock, 4))
    x = random_frames(2, 4)
    whole = run(x)
    monkeypatch.setattr(vae_layers, "SCORES_BYTES", 4 * 4 * 24 * 12)  # two of four rows, of 2 x 2 frames
    parts = jax.jit(lambda x: block(x))
    assert parts.lower(x).as_text().count("stablehlo.while") == 1
    np.testing.assert_allclose(parts(x), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("out_channels", [3, 5])
def test_residual_block(out_channels):
    block, run = random_layer(functools.partial(ResidualBlock, 3, out_channels))
    x = random_frames(3, 3)
    first, past = run(x[:, :1], None)
    assert first.shape == (2, 1, 4, 6, out_channels)
    together, _ = run(x[:, 1:], past)
    second, past = run(x[:, 1:2], past)
    third, _ = run(x[:, 2:], past)
    np.testing.assert_allclose(np.concatenate([second, third], axis=1), together, rtol=1e-4, atol=1e-5)
    # With the last convolution silent only its bias and the shortcut are left.
    block.conv2.kernel[...] = jnp.zeros_like(block.conv2.kernel[...])
    skip = x if block.shortcut is None else x @ block.shortcut.kernel[...] + block.shortcut.bias[...]
    left = jax.jit(lambda x: block(x, None)[0])(x[:, :1])
    np.testing.assert_allclose(left, (skip + block.conv2.bias[...])[:, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temporal", [False, True])
def test_downsample(temporal):
    layer, run = random_layer(functools.partial(Downsample, 3, temporal=temporal))
    x = random_frames(5, 3)
    first, past = run(x[:, :1], None)
    rest, _ = run(x[:, 1:], past)
    padded = np.pad(x[0], ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = correlate_clip(padded, layer.conv.kernel[...], layer.conv.bias[...])[:, ::2, ::2]
    np.testing.assert_allclose(first[0], expected[:1], rtol=1e-5, atol=1e-5)  # skips the time convolution
    if temporal:
        expected = correlate_clip(expected, layer.time_conv.kernel[...], layer.time_conv.bias[...])[::2]
    else:
        expected = expected[1:]
    np.testing.assert_allclose(rest[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temporal", [False, True])
def test_upsample(temporal):
    layer, run = random_layer(functools.partial(Upsample, 4, temporal=temporal))
    x = random_frames(4, 4)
    first, past = run(x[:, :1], None)
    second, past = run(x[:, 1:2], past)
    rest, _ = run(x[:, 2:], past)
    assert first.shape == (2, 1, 8, 12, 2)
    frames = x[0]
    if temporal:
        conv = layer.time_conv
        seen = np.concatenate([np.zeros_like(frames[:2]), frames[1:]])  # zeros where the first frame would stand
        doubled = correlate_clip(seen, conv.kernel[...], conv.bias[...])
        frames = np.concatenate([frames[:1], rearrange(doubled, "f h w (two c) -> (f two) h w c", two=2)])
    enlarged = np.pad(frames.repeat(2, axis=1).repeat(2, axis=2), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = correlate_clip(enlarged, layer.conv.kernel[...], layer.conv.bias[...])
    np.testing.assert_allclose(np.concatenate([first, second, rest], axis=1)[0], expected, rtol=1e-4, atol=1e-5)

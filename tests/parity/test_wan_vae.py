"""The autoencoder and its layers against diffusers' AutoencoderKLWan, live."""

import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as theirs
from einops import rearrange
from flax import nnx

from avd_jax import convert
from avd_jax.convert import engine, vae_rules
from avd_jax.models.vae_layers import AttentionBlock, Downsample, ResidualBlock, RMSNorm, Upsample

OPTIONS = {"rngs": nnx.Rngs(0), "dtype": jnp.float32, "param_dtype": jnp.float32}


def channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(rearrange(np.asarray(array), "b f h w c -> b c f h w")))


def channels_last(tensor):
    return rearrange(tensor.detach().numpy(), "b c f h w -> b f h w c")


def relative_error(ours, expected):
    return np.abs(np.asarray(ours) - expected).max() / np.sqrt(np.mean(expected**2))


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return module.eval()


def set_weights(layer, source):
    if isinstance(layer, RMSNorm):
        layer.scale[...] = jnp.asarray(source.gamma.detach().numpy().reshape(-1))
        return
    kernel = source.weight.detach().numpy()
    kernel = kernel.transpose(*range(2, kernel.ndim), 1, 0)
    layer.kernel[...] = jnp.asarray(kernel.reshape(layer.kernel.shape))
    layer.bias[...] = jnp.asarray(source.bias.detach().numpy())


def random_groups(channels, groups=(1, 4, 4)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, frames, 6, 10, channels), np.float32) for frames in groups]


def assert_same_by_group(ours, source, groups, slots):
    """Compare group by group, each side with its own cache; `slots` is how many caches diffusers' layer has."""
    cache, past = [None] * slots, None
    for group in groups:
        y, past = ours(jnp.asarray(group), past)
        with torch.no_grad():
            expected = source(channels_first(group), feat_cache=cache, feat_idx=[0])
        assert relative_error(y, channels_last(expected)) < 1e-5


@pytest.mark.parametrize("out_channels", [12, 20])
def test_residual_block(out_channels):
    source = randomise(theirs.WanResidualBlock(12, out_channels))
    ours = ResidualBlock(12, out_channels, **OPTIONS)
    for name in ("norm1", "conv1", "norm2", "conv2"):
        set_weights(getattr(ours, name), getattr(source, name))
    if out_channels != 12:
        set_weights(ours.shortcut, source.conv_shortcut)
    assert_same_by_group(ours, source, random_groups(12), slots=2)
    assert_same_by_group(ours, source, random_groups(12, (1, 1, 1, 1)), slots=2)


def test_attention_block():
    source = randomise(theirs.WanAttentionBlock(12))
    ours = AttentionBlock(12, **OPTIONS)
    for name in ("norm", "to_qkv", "proj"):
        set_weights(getattr(ours, name), getattr(source, name))
    (x,) = random_groups(12, (3,))
    with torch.no_grad():
        expected = channels_last(source(channels_first(x)))
    assert relative_error(ours(jnp.asarray(x)), expected) < 1e-5


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize(("layer", "mode"), [(Downsample, "downsample"), (Upsample, "upsample")])
def test_resampling(layer, mode, temporal):
    source = randomise(theirs.WanResample(12, f"{mode}{'3d' if temporal else '2d'}"))
    ours = layer(12, temporal=temporal, **OPTIONS)
    set_weights(ours.conv, source.resample[1])
    if temporal:
        set_weights(ours.time_conv, source.time_conv)
    assert_same_by_group(ours, source, random_groups(12), slots=1)
    if layer is Upsample:
        assert_same_by_group(ours, source, random_groups(12, (1, 1, 1, 1)), slots=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    source = randomise(AutoencoderKLWan(base_dim=16))
    source.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return convert.load_vae(folder), source


def reference_encode(source, video):
    mean, std = np.array(source.config.latents_mean), np.array(source.config.latents_std)
    with torch.no_grad():
        return (channels_last(source.encode(channels_first(video)).latent_dist.mode()) - mean) / std


def reference_decode(source, latents):
    mean, std = np.array(source.config.latents_mean), np.array(source.config.latents_std)
    raw = channels_first((latents * std + mean).astype(np.float32))
    with torch.no_grad(), mock.patch("torch.clamp", lambda frames, **_: frames):
        return channels_last(source.decode(raw).sample)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"),
    [(1, 1, 16, 16), (2, 5, 24, 16), (1, 9, 32, 48), (1, 13, 16, 40)],
)
def test_autoencoder(pair, batch, frames, height, width):
    ours, source = pair
    rng = np.random.default_rng(frames)
    video = rng.uniform(-1, 1, (batch, frames, height, width, 3)).astype(np.float32)
    assert relative_error(ours.encode(video), reference_encode(source, video)) < 5e-5
    latents = rng.standard_normal((batch, 1 + (frames - 1) // 4, height // 8, width // 8, 16), np.float32)
    assert relative_error(ours.decode(latents), reference_decode(source, latents)) < 5e-5


def test_diffusers_reads_what_we_write(pair):
    ours, source = pair
    config = vae_rules.config_to_diffusers(ours.config)
    made = AutoencoderKLWan.from_config(config)
    assert dict(made.config).items() >= {k: v for k, v in config.items() if not k.startswith("_")}.items()
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in source.state_dict().items()}
    leaves = convert.flat_state(nnx.split(ours)[1])
    arrays = ((path, np.asarray(leaf)) for path, leaf in leaves.items())
    exported = dict(engine.tensors_to_torch(vae_rules.diffusers_rules(ours.config), arrays))
    assert exported.keys() == source.state_dict().keys()
    for key, tensor in source.state_dict().items():
        np.testing.assert_array_equal(exported[key], tensor, err_msg=key)

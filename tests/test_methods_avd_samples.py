"""What only prepares or shows a run is not kept on the devices: umT5, the VAE's encoder, the VAE between samples."""

import gc
import math

import jax
import numpy as np
import pytest
from generation_cases import UMT5_SIZES, VAE, write_weights
from training_cases import make_config

from avd_jax.convert.architectures import UMT5, WAN_VAE
from avd_jax.training import run, samples


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def size_of(architecture, config):
    """Bytes of a network in float32."""
    return 4 * sum(math.prod(leaf.shape) for leaf in architecture.leaves(config).values())


def bytes_on_devices():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_encoders_are_released_before_the_first_step(weights, tmp_path):
    config = make_config(init_from=str(weights))
    config.data.shapes_world.update(clips=1, prompts=1, frames=5, height=32, width=32)
    encoders = sum(size_of(*parts) for parts in ((WAN_VAE, VAE), (UMT5, UMT5_SIZES)))
    before = bytes_on_devices()
    latents, prompts = run._data_folders(config, tmp_path)
    assert (latents / "dataset_info.json").exists()
    assert (prompts / "dataset_info.json").exists()
    assert bytes_on_devices() - before < 0.05 * encoders


def test_the_vae_is_on_the_devices_only_while_it_decodes(weights):
    vae = size_of(WAN_VAE, VAE)
    before = bytes_on_devices()
    decode = samples._decoder(str(weights))
    assert bytes_on_devices() - before < 0.05 * vae
    shapes = [video.shape for video in decode(np.zeros((1, 2, 4, 4, VAE.z_dim), np.float32))]
    assert shapes == [(3, 8, 8, 3)]
    assert bytes_on_devices() - before < 0.05 * vae

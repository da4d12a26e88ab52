"""What only shows a run is not kept on the devices: the VAE between samples."""

import gc
import math

import jax
import numpy as np
import pytest
from generation_cases import VAE, write_weights
from ml_collections import config_dict

from avd_jax.convert.architectures import WAN_VAE
from avd_jax.methods import samples
from avd_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def size_of(architecture, config):
    """Bytes of a network in float32."""
    return 4 * sum(math.prod(leaf.shape) for leaf in architecture.leaves(config).values())


def bytes_on_devices():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def decoder(weights, **mesh):
    config = config_dict.ConfigDict({"init_from": str(weights), "sample": {"vae": "", "vae_gib": 8.0}})
    return samples._decoder(config, make_mesh(**mesh))


def test_each_sample_is_decoded_by_itself_on_a_device_of_the_mesh(weights):
    latents = np.random.default_rng(0).normal(size=(2, 2, 4, 4, VAE.z_dim)).astype(np.float32)
    mesh = make_mesh(data=2, fsdp=2, seq=2, devices=jax.devices()[::-1])
    assert samples.own_device(mesh, 0).devices.tolist() == [mesh.devices.flat[0]]
    together = decoder(weights, data=8)(latents)
    for video, one in zip(together, latents, strict=True):
        np.testing.assert_array_equal(video, decoder(weights, devices=jax.devices()[:1])(one[None])[0])


def test_the_vae_is_on_the_devices_only_while_it_decodes(weights):
    vae = size_of(WAN_VAE, VAE)
    before = bytes_on_devices()
    decode = decoder(weights)
    assert bytes_on_devices() - before < 0.05 * vae
    shapes = [video.shape for video in decode(np.zeros((1, 2, 4, 4, VAE.z_dim), np.float32))]
    assert shapes == [(3, 8, 8, 3)]
    assert bytes_on_devices() - before < 0.05 * vae

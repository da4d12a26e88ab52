"""What only shows a run is not kept on the devices: the VAE between samples."""

import gc
import math

import jax
import numpy as np
import pytest
from generation_cases import VAE, write_weights

from avd_jax.convert.architectures import WAN_VAE
from avd_jax.methods.avd import samples


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def size_of(architecture, config):
    """Bytes of a network in float32."""
    return 4 * sum(math.prod(leaf.shape) for leaf in architecture.leaves(config).values())


def bytes_on_devices():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_the_vae_is_on_the_devices_only_while_it_decodes(weights):
    vae = size_of(WAN_VAE, VAE)
    before = bytes_on_devices()
    decode = samples._decoder(str(weights))
    assert bytes_on_devices() - before < 0.05 * vae
    shapes = [video.shape for video in decode(np.zeros((1, 2, 4, 4, VAE.z_dim), np.float32))]
    assert shapes == [(3, 8, 8, 3)]
    assert bytes_on_devices() - before < 0.05 * vae

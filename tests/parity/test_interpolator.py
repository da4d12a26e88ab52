"""The frame interpolator against PyTorch: the widths of the authors' code, an export that PyTorch loads."""

import jax
import numpy as np
import pytest
import torch
from convert_cases import write_all
from einops import rearrange
from flax import nnx
from interpolator_torch import UNet, double, randomise
from safetensors.torch import load_file

from avd_jax import convert
from avd_jax.convert.interpolator_rules import PREFIX
from avd_jax.convert.shipping import write_interpolator
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig


def to_torch(array):
    return torch.from_numpy(rearrange(np.array(array), "b f h w c -> b c f h w"))


@pytest.mark.parametrize(
    ("widths", "shape"),
    [
        ((32, 64, 128), (2, 4, 12, 16, 16)),
        ((32, 64, 128), (1, 1, 8, 4, 16)),
        ((512, 1024, 2048), (1, 2, 4, 8, 16)),
    ],
)
@torch.no_grad()
def test_it_is_pytorchs(tmp_path, widths, shape):
    torch.manual_seed(0)
    unet = randomise(UNet(shape[-1], widths))
    write_all(tmp_path, {f"{PREFIX}{key}": tensor.numpy() for key, tensor in unet.state_dict().items()})
    ours = convert.load_interpolator(tmp_path / "diffusion_pytorch_model.safetensors")
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = double(unet, to_torch(latents)).numpy()
    actual = to_torch(ours(latents)).numpy()
    assert np.abs(actual - expected).max() <= 1e-5 * np.sqrt(np.mean(np.square(expected)))
    assert ours.config.widths == widths


@torch.no_grad()
def test_pytorch_loads_what_is_exported(tmp_path):
    ours = Interpolator(InterpolatorConfig(widths=(8, 16, 24)), nnx.Rngs(1))
    write_interpolator(ours, tmp_path)
    tensors = load_file(tmp_path / "interpolator" / "diffusion_pytorch_model.safetensors")
    unet = UNet(16, (8, 16, 24)).eval()
    unet.load_state_dict(tensors)  # strict
    latents = np.asarray(jax.random.normal(jax.random.key(0), (1, 3, 8, 8, 16)))
    np.testing.assert_allclose(to_torch(ours(latents)), double(unet, to_torch(latents)), atol=1e-5)

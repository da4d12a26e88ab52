"""Files that PyTorch wrote: Wan's .pth files of VAE and text encoder, AVD's checkpoints, and what is refused."""

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import convert_cases as cases

from avd_jax import convert
from avd_jax.convert.architectures import UMT5, WAN_VAE
from avd_jax.convert.interpolator_rules import PREFIX
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_vae import WanVAEConfig

T5 = UMT5Config(vocab_size=16, dim=8, ffn_dim=12, num_heads=2, head_dim=4, num_layers=2)


def as_torch(tensors, dtype=torch.float32):
    return {key: torch.from_numpy(value.copy()).to(dtype) for key, value in tensors.items()}


def test_wans_vae_and_text_encoder(tmp_path):
    vae = WanVAEConfig(base_dim=4)
    vae_tensors = cases.random_tensors(WAN_VAE.native_rules(vae), WAN_VAE, vae)
    t5_tensors = cases.random_tensors(UMT5.native_rules(T5), UMT5, T5)
    torch.save(as_torch(vae_tensors), tmp_path / "Wan2.1_VAE.pth")
    torch.save(as_torch(t5_tensors, torch.bfloat16), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    cases.write_all(tmp_path / "same", vae_tensors, stem="Wan2.1_VAE")
    expected = cases.leaves_of(convert.load_vae(tmp_path / "same"))
    for path in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        for name, leaf in cases.leaves_of(convert.load_vae(path)).items():
            np.testing.assert_array_equal(leaf, expected[name])
    t5 = cases.leaves_of(convert.load_umt5(tmp_path))
    np.testing.assert_array_equal(
        t5["norm.scale"], t5_tensors["norm.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@pytest.fixture
def avd(tmp_path):
    native = cases.read_all(cases.NATIVE / cases.WEIGHTS)
    generator = {f"model.{key}": value for key, value in as_torch(native, torch.bfloat16).items()}
    with np.load(cases.FIXTURES / "interpolator_golden.npz") as file:
        interpolator = as_torch({key: file[key] for key in file.files if key.startswith(PREFIX)})
    critic = {key: value + 1 for key, value in generator.items()}
    torch.save({"generator": generator | interpolator, "critic": critic, "step": 500}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_bytes((cases.NATIVE / "config.json").read_bytes())
    return tmp_path


def test_avd_checkpoint(avd):
    expected = cases.leaves_of(convert.load_dit(cases.NATIVE))["head.head.kernel"].astype(ml_dtypes.bfloat16)
    for path in (avd, avd / "model.pt"):
        for key, value in (("generator", expected), ("critic", expected + np.array(1, ml_dtypes.bfloat16))):
            loaded = cases.leaves_of(convert.load_dit(path, key=key))["head.head.kernel"]
            np.testing.assert_array_equal(loaded, value.astype(np.float32))
    with pytest.raises(UserError, match="holds no 'generater', but generator, critic"):
        convert.load_dit(avd, key="generater")
    found, missing = convert.find_components(avd / "model.pt")
    assert list(found) == ["transformer", "interpolator"]
    assert "vae" in missing


class Code:
    def __reduce__(self):
        return os.mkdir, ("this folder must not appear",)


def test_code_is_not_run(tmp_path, monkeypatch):
    """What is no tensor is passed over, whatever it would do."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2), "payload": Code()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: the key .* is missing; it holds no Wan transformer"):
        convert.load_dit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(avd, share):
    file = avd / "model.pt"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(UserError, match=r"model.pt: truncated, or no PyTorch file") as caught:
        convert.load_dit(avd)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"step": 3}, {}])
def test_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: holds .* state dict"):
        convert.load_dit(tmp_path)

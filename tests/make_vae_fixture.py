"""Make the golden file of the video autoencoder; run in an environment with the `parity` extra.

    python tests/make_vae_fixture.py

`vae_golden.npz` holds a narrow random AutoencoderKLWan of diffusers (weights in float16, computed in float32), a clip,
its normalised latents, the frames decoded from them without the clipping that diffusers ends with, and, for Wan's own
layout, the native key of every weight according to diffusers' converter.
"""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from einops import rearrange

from avd_jax.convert.vae_rules import config_from_diffusers, native_rules

FIXTURES = Path(__file__).parent / "fixtures"


def random_vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.half())
    return vae


def native_keys(vae):
    """Return diffusers' key -> Wan's key; the candidates are ours, diffusers' converter says what each one is."""
    candidates = [rule.source for rule in native_rules(config_from_diffusers(dict(vae.config)))]
    keys = convert_wan_vae_to_diffusers({key: key for key in candidates})
    assert keys.keys() == vae.state_dict().keys()
    return keys


@torch.no_grad()
def main():
    vae = random_vae()
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    video = (torch.rand(1, 3, 9, 16, 24) * 2 - 1).half().float()
    raw = vae.encode(video).latent_dist.mode()
    with mock.patch("torch.clamp", lambda frames, **_: frames):
        decoded = vae.decode(raw).sample
    arrays = {"video": video.half(), "latents": (raw - mean) / std, "decoded": decoded}
    arrays = {name: rearrange(array.numpy(), "b c f h w -> b f h w c") for name, array in arrays.items()}
    weights = {f"weights/{key}": tensor.half().numpy() for key, tensor in vae.state_dict().items()}
    config = {key: value for key, value in dict(vae.config).items() if key != "_use_default_values"}
    config = {"_class_name": "AutoencoderKLWan", **config}
    np.savez_compressed(
        FIXTURES / "vae_golden.npz",
        config_json=json.dumps(config),
        native_keys=json.dumps(native_keys(vae)),
        **arrays,
        **weights,
    )


if __name__ == "__main__":
    main()

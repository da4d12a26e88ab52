"""Tiny random weights in our own layout; helpers of the test_generation_* and test_scripts_generate files."""

import shutil
from pathlib import Path

import numpy as np

from avd_jax import convert
from avd_jax.convert.architectures import INTERPOLATOR, UMT5, WAN_DIT, WAN_VAE
from avd_jax.models.interpolator import InterpolatorConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.models.wan_vae import WanVAEConfig

FIXTURES = Path(__file__).parent / "fixtures"
DIT = WanDiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4, freq_dim=16, text_dim=8, text_len=64
)
# Two levels compile much faster than Wan's four. Its strides are 2, so that sizes are multiples of 4, frames 2n + 1.
VAE = WanVAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 1),
    num_res_blocks=1,
    temporal_downsample=(True,),
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)
UMT5_SIZES = UMT5Config(vocab_size=1024, dim=8, ffn_dim=16, num_heads=1, head_dim=8, num_layers=1)
STUDENT = {"timesteps": [1000.0, 750.0, 400.0], "num_steps": 3, "shift": 5.0, "guidance_scale": 5.0}
STUDENT |= {"frames": 5, "height": 32, "width": 48, "fps": 8.0}


class InMemory:
    """Random weights of a network, made without running it; `avd_jax.convert.weights.Weights` says what is what."""

    def __init__(self, architecture, config, seed=0):
        self.architecture, self.config, self.leaves = architecture, config, architecture.leaves(config)
        self.files = ()
        rng = np.random.default_rng(seed)
        self._values = {
            path: (0.2 * rng.standard_normal(leaf.shape) + path.endswith(("scale", "var"))).astype(np.float32)
            for path, leaf in self.leaves.items()
        }

    def array(self, path, dtype=None):
        return self._values[path].astype((dtype[path] if isinstance(dtype, dict) else dtype) or np.float32)

    def arrays(self, dtype=None, paths=None):
        for path in paths or self.leaves:
            yield path, self.array(path, dtype)


def write_dit(folder: Path, *, config=DIT, seed=0, student=None) -> Path:
    """Write a transformer as converted weights or, with student settings, as a student."""
    convert.save_orbax(InMemory(WAN_DIT, config, seed), folder / "transformer", student=student)
    return folder


def write_interpolator(folder: Path) -> Path:
    """Write an interpolator as converted weights."""
    convert.save_orbax(InMemory(INTERPOLATOR, InterpolatorConfig(DIT.in_dim, (8, 8, 8))), folder / "interpolator")
    return folder


def write_weights(folder: Path) -> Path:
    """Write all parts that a video needs."""
    write_dit(folder)
    convert.save_orbax(InMemory(WAN_VAE, VAE), folder / "vae")
    convert.save_orbax(InMemory(UMT5, UMT5_SIZES), folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    shutil.copy(FIXTURES / "tokenizer.json", folder / "tokenizer")
    return folder

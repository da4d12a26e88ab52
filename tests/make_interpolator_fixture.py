"""Make the golden file of the frame interpolator; run in an environment with the `parity` extra.

    python tests/make_interpolator_fixture.py

`interpolator_golden.npz` holds a narrow random U-Net with BatchNorm under the keys of an AVD checkpoint, two clips and
what PyTorch makes of them. The network is `tests/parity/interpolator_torch.py`, whose keys and order of the skip
connections follow from the checkpoints of the authors' code.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from interpolator_torch import UNet, double, randomise

from avd_jax.convert.interpolator_rules import PREFIX

FIXTURES = Path(__file__).parent / "fixtures"


@torch.no_grad()
def main():
    torch.manual_seed(0)
    unet = randomise(UNet(channels=4, widths=(8, 12, 16)))
    latents = torch.randn(2, 4, 3, 8, 12)
    arrays = {"latents": latents, "interpolated": double(unet, latents)}
    arrays = {name: rearrange(array.numpy(), "b c f h w -> b f h w c") for name, array in arrays.items()}
    weights = {f"{PREFIX}{key}": tensor.numpy() for key, tensor in unet.state_dict().items()}
    np.savez_compressed(FIXTURES / "interpolator_golden.npz", **arrays, **weights)


if __name__ == "__main__":
    main()

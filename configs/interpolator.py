"""The frame interpolator of Wan2.1's latents, with the paper's values.

    python scripts/train_interpolator.py --config configs/interpolator.py --config.data.latents=/data/latents \
        --config.sample.vae=/weights/Wan2.1-T2V-1.3B --workdir /runs/interpolator --out /runs/wan13b

Data: the latents set of the distillation, 21 latent frames a clip (81 of video), of which every second is left out and
made again. `--config.init_from=model.pt` starts from the interpolator of an AVD checkpoint. Hardware: any; a batch of
32 clips has 32 x 10 pairs of 60x104 latents, a hundredth of the work of one forward pass of the 1.3B model. Expected
result: held_out.md in the workdir, whose last column must be 25 % at least.
"""

from avd_jax.fields import config_from
from avd_jax.methods.interpolator import FIELDS


def get_config():
    """Return the paper's settings: AdamW 1e-5, 10,000 updates, batches of 32, which are the defaults."""
    return config_from(FIELDS)

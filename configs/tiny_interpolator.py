"""The frame interpolator of weights/tiny, trained on the built-in world of shapes.

    python scripts/encode.py --shapes_world --weights weights/tiny --clips 3000 --batch_size 8 \
        --out runs/tiny_interpolator/data
    python scripts/train_interpolator.py --config configs/tiny_interpolator.py --workdir runs/tiny_interpolator \
        --out weights/tiny

It needs the VAE, tokenizer and text encoder of weights/tiny. Expected result: held_out.md in the workdir, whose last
column was 92 % after 3,000 updates; that takes a quarter of an hour on one core of a CPU.
"""

from avd_jax.fields import config_from
from avd_jax.methods.interpolator import FIELDS


def get_config():
    """Return settings for a small world: a higher rate, fewer and smaller updates."""
    config = config_from(FIELDS)
    config.data.latents = "runs/tiny_interpolator/data/latents"
    config.sample.vae = "weights/tiny"
    config.num_steps = 3000
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.checkpoint_every = 500
    return config

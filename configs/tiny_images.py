"""The tiny teacher's first lessons: single pictures of the built-in world, a fifth of a clip's tokens each.

    python scripts/encode.py --shapes_world --weights weights/tiny --clips 24000 --frames 1 --batch_size 8 \
        --out runs/tiny_images/data
    python scripts/pretrain.py --config configs/tiny_images.py --workdir runs/tiny_images --out runs/tiny_images/weights
    python scripts/pretrain.py --config configs/tiny_images.py --config.init_from=runs/tiny_images/weights \
        --config.seed=1 --config.num_steps=6000 --workdir runs/tiny_images2 --out runs/tiny_images2/weights

What a shape, a colour, a size looks like is learnt here five times as fast as from clips; the third command continues
with a new fall of the learning rate, and configs/tiny_pretrain.py adds time. 6 minutes to encode the pictures on a
two-core CPU, then 29 and 35.
"""

from avd_jax.fields import config_from
from avd_jax.methods.flow_matching import FIELDS


def get_config():
    """Return the config."""
    config = config_from(FIELDS)
    config.data.latents = "runs/tiny_images/data/latents"
    config.model.text_len = 50
    config.batch_size = 40
    config.num_steps = 4000
    config.remat = "block"  # a CPU computes a block again sooner than it fetches what it kept: 0.25 s a step, not 0.34
    config.optimizer.name = "muon"  # after 240 steps on clips its loss was 0.40, AdamW's 0.55
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 100
    return config

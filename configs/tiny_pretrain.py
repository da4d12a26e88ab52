"""The tiny teacher of weights/tiny, trained from scratch by flow matching on the built-in world of shapes.

    python scripts/pretrain.py --config configs/tiny_pretrain.py --workdir runs/tiny_pretrain --out weights/tiny

It needs the VAE, tokenizer and text encoder of weights/tiny (configs/tiny_vae.py, scripts/make_tiny_text_encoder.py).
About 50 minutes on a two-core CPU, 5 of them to encode the clips; the card in weights/tiny has the figures.
"""

from avd_jax.training.fields import config_from
from avd_jax.training.pretraining import FIELDS


def get_config():
    """Return the config."""
    config = config_from(FIELDS)
    config.data.weights = "weights/tiny"
    config.data.shapes_world.clips = 6000
    config.model.text_len = 50
    config.batch_size = 8
    config.num_steps = 6000
    config.optimizer.name = "muon"  # after 240 steps its loss was 0.40, AdamW's 0.55
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 100
    return config

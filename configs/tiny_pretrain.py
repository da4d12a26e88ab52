"""The tiny teacher of weights/tiny, trained by flow matching on clips of the built-in world of shapes.

    python scripts/encode.py --shapes_world --weights weights/tiny --clips 6000 --batch_size 8 \
        --out runs/tiny_pretrain/data
    python scripts/pretrain.py --config configs/tiny_pretrain.py --workdir runs/tiny_pretrain \
        --out runs/tiny_pretrain/weights

It continues from what configs/tiny_images.py has learnt from single pictures. Both need the VAE, tokenizer and text
encoder of weights/tiny (configs/tiny_vae.py, scripts/make_tiny_text_encoder.py). About 45 minutes on a two-core CPU, 5
of them to encode the clips. Two more runs of this config, each with a new fall of the learning rate, made the weights
that are shipped: the card in weights/tiny has the commands in order, and the figures.
"""

import runpy
from pathlib import Path


def get_config():
    """Return the settings of configs/tiny_images.py for clips."""
    config = runpy.run_path(str(Path(__file__).with_name("tiny_images.py")))["get_config"]()
    config.init_from = "runs/tiny_images2/weights"
    config.data.latents = "runs/tiny_pretrain/data/latents"
    config.batch_size = 8
    config.num_steps = 5000
    return config

"""Distil the small built-in world as adapters of rank 32 over the teacher's weights, on a laptop's CPU.

    python scripts/encode.py --shapes_world --weights weights/tiny --clips 128 --prompt_count 256 --out runs/tiny/data
    python scripts/train.py --config configs/tiny_lora.py --workdir runs/tiny_lora
    python scripts/evaluate.py --checkpoint runs/tiny_lora --weights weights/tiny --count 48 --batch_size 8 \
        --out runs/tiny_lora

Everything but the adapters and their rates is as in configs/tiny.py. docs/lora.md explains them and has figures.
"""

import runpy
from pathlib import Path


def get_config():
    """Return the settings of configs/tiny.py, for adapters."""
    config = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]()
    config.lora.rank = 32
    # At these widths a step of this size moves the product B A about as far as 1e-4 moves whole weights.
    config.optimizer.learning_rate = 3e-4
    config.optimizer.fake_score_learning_rate = 3e-4
    return config

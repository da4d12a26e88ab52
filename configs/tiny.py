"""Distil the small built-in world: the whole path on a laptop's CPU, from nothing but this repository.

    python scripts/encode.py --shapes_world --weights weights/tiny --clips 128 --prompt_count 256 --out runs/tiny/data
    python scripts/train.py --config configs/tiny.py --workdir runs/tiny

The teacher is weights/tiny, whose model card says how it was trained and how good it is; the data are procedural clips
of moving objects, which the first command draws and encodes. runs/tiny/samples/ shows the student's videos, 4 steps,
beside the teacher's, 50x2, and metrics.jsonl how far both are from real clips. So short a run moves the student little.

It also serves to try the path with weights and data of your own: set `init_from`, `data.latents` and `data.prompts`.
"""

from avd_jax.methods.avd.config import default_config


def get_config():
    """Return settings for a model a thousand times smaller than Wan's: higher rates, fewer steps, no bfloat16."""
    config = default_config()
    config.init_from = "weights/tiny"
    config.data.latents = "runs/tiny/data/latents"
    config.data.prompts = "runs/tiny/data/prompts"
    config.batch_size = 4
    config.guidance_scale = 3.0  # what this teacher looks best with
    config.score.shift = 3.0
    config.sample.teacher_shift = 3.0
    config.num_steps = 60
    config.optimizer.learning_rate = 1e-4
    config.optimizer.fake_score_learning_rate = 1e-4
    config.compute_dtype = "float32"  # CPUs only emulate bfloat16
    config.teacher_dtype = "float32"
    config.checkpoint_every = 30
    config.sample_every = 30
    return config

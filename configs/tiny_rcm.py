"""Distil the small built-in world by rCM: one student that serves 1, 2 and 4 steps, on a laptop's CPU.

    python scripts/encode.py --shapes_world --weights weights/tiny --clips 128 --prompt_count 256 --out runs/tiny/data
    python scripts/train.py --config configs/tiny_rcm.py --workdir runs/tiny_rcm
    python scripts/evaluate.py --checkpoint runs/tiny_rcm --weights weights/tiny --student_steps 2 --count 48 \
        --batch_size 8 --out runs/tiny_rcm

Teacher and data are those of configs/tiny.py; docs/rcm.md explains the method, docs/small_world.md has figures.
"""

from avd_jax.methods.rcm.config import default_config


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
    config.consistency.warmup = 20
    config.optimizer.learning_rate = 1e-4
    config.optimizer.fake_score_learning_rate = 1e-4
    config.optimizer.warmup_steps = 5
    config.compute_dtype = "float32"  # CPUs only emulate bfloat16
    config.teacher_dtype = "float32"
    config.checkpoint_every = 20
    config.sample_every = 30
    return config

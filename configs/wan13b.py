"""Distil Wan2.1-T2V-1.3B into a 4-step student with the paper's values (AVD, CVPR 2026).

    python scripts/train.py --config configs/wan13b.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan13b

Data: videos encoded at 81 frames, 480x832, 16 fps (latents 21x60x104x16), and a set of prompts that holds none you
evaluate on. Hardware: parameters, moments and EMA of the two trained networks take 34 GB in float32 and the frozen
teacher 3 GB in bfloat16; they are sharded over all devices. Expected result: the paper reports, for this model and 4
steps, VBench instance preservation 92.39 and dynamic degree 99.72 (teacher, 50x2 steps: 92.39 and 85.56).
"""

from avd_jax.methods.avd.config import default_config


def get_config():
    """Return the paper's settings; the defaults are the paper's, so only what is local to a run is set."""
    config = default_config()
    config.model = "1.3B"
    config.batch_size = 16
    config.num_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters, and as many devices as the batch has examples
    config.mesh.seq = -1  # the rest share the tokens of each example
    config.attention.fused_backward = False  # the fused kernel's partial sums do not leave room on a 16 GiB device
    config.attention.backward_blocks = (512, 2048, 512)
    config.checkpoint_every = 100
    config.sample_every = 250
    return config

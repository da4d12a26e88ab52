"""Distil Wan2.1-T2V-14B by rCM into a student for 1, 2 and 4 steps, with the values of NVlabs/rcm.

    python scripts/train.py --config configs/wan14b_rcm.py --config.init_from=/weights/Wan2.1-T2V-14B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan14b_rcm

Data: as configs/wan13b_rcm.py. Hardware: the two trained networks with one moment each take 229 GB in float32, the
generator's running mean 57 GB, and the teacher 29 GB in bfloat16, sharded over all devices. Expected result: as
configs/wan13b_rcm.py.
"""

from avd_jax.methods.rcm.config import default_config


def get_config():
    """Return the authors' settings where they differ from those of the 1.3B model; sizes come from `init_from`."""
    config = default_config()
    config.model = "14B"
    config.student.timesteps = (995.0, 933.8, 852.9, 609.0)
    config.consistency.mean = 1.5
    config.consistency.warmup = 0
    config.fake_score_updates = 9
    config.optimizer.learning_rate = 1e-6
    config.optimizer.fake_score_learning_rate = 1e-7
    config.batch_size = 8
    config.num_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters, and as many devices as the batch has examples
    config.mesh.seq = -1  # the rest share the tokens of each example
    config.checkpoint_every = 100
    config.checkpoint.keep = 1  # one is 286 GB
    config.sample_every = 250
    return config

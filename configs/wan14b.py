"""Distil Wan2.1-T2V-14B into a 4-step student with the paper's values.

    python scripts/train.py --config configs/wan14b.py --config.init_from=/weights/Wan2.1-T2V-14B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan14b

Data as for configs/wan13b.py; the 1.3B and the 14B model share VAE and text encoder, and so the encoded sets. Hardware:
the two trained networks with their moments take 343 GB in float32 and the teacher 29 GB in bfloat16, sharded over all
devices. Expected result: we know of no figures of the paper for this size; compare with the teacher's videos that
the run writes beside the student's.
"""

from avd_jax.methods.avd.config import default_config


def get_config():
    """Return the paper's settings; sizes come from `init_from`."""
    config = default_config()
    config.model = "14B"
    config.batch_size = 8
    config.num_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters, and as many devices as the batch has examples
    config.mesh.seq = -1  # the rest share the tokens of each example
    config.checkpoint_every = 100
    config.checkpoint.keep = 1  # one is 343 GB
    config.sample_every = 250
    return config

"""Distil Wan2.1-T2V-14B on one node of 8 x H100 (80 GB), with the paper's values.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python scripts/train.py --config configs/wan14b_h100.py \
        --config.init_from=/weights/Wan2.1-T2V-14B --config.data.latents=/data/latents \
        --config.data.prompts=/data/prompts --workdir /runs/wan14b

Data as for configs/wan13b.py. Hardware: JAX takes three quarters of a GPU's memory if the variable does not say
otherwise, and that is too little. The host holds the moments, 213 GiB, and while a checkpoint is written a copy of the
state, 320 GiB. docs/pods.md says what each setting saves and costs. Expected result: as configs/wan14b.py.
"""

from avd_jax.methods.avd.config import default_config


def get_config():
    """Return the paper's settings, and those that make them fit."""
    config = default_config()
    config.model = "14B"
    config.batch_size = 8
    config.num_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters, and as many devices as the batch has examples: all 8
    config.mesh.seq = -1  # on more nodes the rest share the tokens of each example
    config.optimizer.memory = "host"  # moments are two thirds of the state, and idle while there are activations
    config.checkpoint_every = 100
    config.checkpoint.keep = 1  # one is 343 GB
    config.sample_every = 250
    return config

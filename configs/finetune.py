"""Fine-tune a Wan2.1 text-to-video model on your own videos by flow matching, before it is distilled, say.

    python scripts/pretrain.py --config configs/finetune.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --workdir /runs/finetune --out /runs/finetune/weights

Data: the latents set that a distillation takes too (scripts/encode.py --videos). Hardware: parameters, moments and the
running mean take 23 GB in float32 for the 1.3B model, shared over all devices, of which batch_size must be a multiple.
Expected result: /runs/finetune/weights/transformer in diffusers' layout, for `init_from` of scripts/train.py or
`--weights` of scripts/generate.py.
"""

from avd_jax.fields import config_from
from avd_jax.methods.flow_matching import FIELDS


def get_config():
    """Return settings that change a trained model a little: a low rate, and noise as Wan's own sampler has it."""
    config = config_from(FIELDS)
    config.batch_size = 16
    config.num_steps = 2000
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 100
    config.timestep.shift = 5.0
    config.compute_dtype = "bfloat16"
    config.remat = "block"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config

"""Distil Wan2.1-T2V-14B into a 4-step student as adapters (LoRA), on v5e:4x4 or a node of 8 GPUs.

    python scripts/train.py --config configs/wan14b_lora.py --config.init_from=/weights/Wan2.1-T2V-14B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan14b_lora

Generator, fake_score and teacher share one bfloat16 copy of the weights, 29 GB; what is trained of each of the two is
307 million numbers beside it. Data as for configs/wan13b.py. Hardware: docs/pods.md has what each takes, and, with
`--config.model=1.3B --config.batch_size=1 --config.accumulation_steps=1`, of one card with 24 GB. The rates are ten
times the paper's, as adapters want them, and have not been tuned at this size. Expected result: unknown. docs/lora.md
compares adapters with whole weights in the small world.
"""

from avd_jax.methods.avd.config import default_config


def get_config():
    """Return the paper's settings, for adapters."""
    config = default_config()
    config.model = "14B"
    config.lora.rank = 64
    config.lora.alpha = 64.0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.fake_score_learning_rate = 2e-5
    config.batch_size = 8
    config.accumulation_steps = 2  # so that four devices share the tokens of each example, not two
    config.num_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters, and as many devices as the batch has examples
    config.mesh.seq = -1  # the rest share the tokens of each example
    config.attention.fused_backward = False  # the fused kernel's partial sums do not leave room on a 16 GiB device
    config.attention.backward_blocks = (512, 2048, 512)
    config.checkpoint_every = 100
    config.sample_every = 250
    return config

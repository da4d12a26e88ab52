"""Distil a Wan2.1 model into a few-step student.

    python scripts/train.py --config configs/tiny.py --workdir runs/tiny
    python scripts/train.py --config configs/wan13b.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan13b

The same command goes on from the last checkpoint of the workdir. On several hosts it is started on each: docs/pods.md.
"""

from absl import flags

from avd_jax import command_line
from avd_jax.training.config import FIELDS
from avd_jax.training.loop import train

PROFILE = flags.DEFINE_bool("profile", False, "write a trace of a few steps to WORKDIR/profile, for XProf")

if __name__ == "__main__":
    command_line.run_training(lambda config, workdir: train(config, workdir, profile=PROFILE.value), FIELDS)

"""Distil a Wan2.1 model into a few-step student, or train by any other method that the config names.

    python scripts/train.py --config configs/tiny.py --workdir runs/tiny
    python scripts/train.py --config configs/wan13b.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan13b

The same command resumes from the last checkpoint of the workdir. On several hosts it is started on each: docs/pods.md.
`--explain` prints every field of the config.
"""

from absl import flags

from avd_jax import command_line
from avd_jax.training.trainer import train

PROFILE = flags.DEFINE_bool("profile", False, "write a trace of a few steps to WORKDIR/profile, for XProf")

if __name__ == "__main__":
    command_line.run_training(
        lambda recipe, config, workdir: train(recipe, config, workdir, profile=PROFILE.value).status
    )

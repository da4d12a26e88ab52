"""Train a small VAE from scratch on the built-in world of shapes, and write it in diffusers' layout.

    python scripts/train_vae.py --config configs/tiny_vae.py --workdir runs/tiny_vae --out weights/tiny

The same command goes on from the last checkpoint of the workdir. `--explain` prints every field of the config.
"""

from pathlib import Path

from absl import flags

from avd_jax import command_line
from avd_jax.training.shipping import write_vae
from avd_jax.training.vae_training import FIELDS, train_vae, trained_vae

OUT = flags.DEFINE_string("out", None, "the folder that gets vae/, once the run is complete")


def train(config, workdir: Path) -> int:
    """Train and write the result."""
    status, state = train_vae(config, workdir)
    if status == 0:
        write_vae(trained_vae(config, state.ema), Path(OUT.value))
        print(f"wrote {OUT.value}/vae")
    return status


if __name__ == "__main__":
    command_line.run_training(train, FIELDS, required=(OUT,))

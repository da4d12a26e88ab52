"""Train a small VAE from scratch on the built-in world of shapes, and write it in diffusers' layout.

    python scripts/train_vae.py --config configs/tiny_vae.py --workdir runs/tiny_vae --out weights/tiny

The same command resumes from the last checkpoint of the workdir. `--explain` prints every field of the config.
"""

from pathlib import Path

from avd_jax import command_line
from avd_jax.convert.shipping import write_vae
from avd_jax.methods.vae.method import trained_vae
from avd_jax.paths import any_path
from avd_jax.training.trainer import train

OUT = command_line.path_flag("out", None, "the folder that gets vae/, once the run is complete")


def train_vae(recipe, config, workdir: Path) -> int:
    """Train and write the result."""
    run = train(recipe, config, workdir)
    if run.status == 0:
        write_vae(trained_vae(config, run.state.networks["vae"].latest), any_path(OUT.value))
        print(f"wrote {OUT.value}/vae")
    return run.status


if __name__ == "__main__":
    command_line.run_training(train_vae, method="vae", required=(OUT,))

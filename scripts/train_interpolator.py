"""Train the frame interpolator, by which a student makes its first steps at half the frame rate.

    python scripts/train_interpolator.py --config configs/interpolator.py --config.data.latents=/data/latents \
        --workdir /runs/interpolator --out /runs/wan13b

The same command resumes from the last checkpoint of the workdir. `--explain` prints every field of the config.
"""

from pathlib import Path

from avd_jax import command_line
from avd_jax.convert.shipping import write_interpolator
from avd_jax.methods.interpolator.method import trained_interpolator
from avd_jax.paths import any_path
from avd_jax.training.trainer import train

OUT = command_line.path_flag(
    "out", None, "folder that gets interpolator/, once the run is complete: a student's run or export, or weights"
)


def train_interpolator(recipe, config, workdir: Path) -> int:
    """Train and write the result."""
    run = train(recipe, config, workdir)
    if run.status == 0 and OUT.value:
        params = run.state.networks["interpolator"].latest
        write_interpolator(trained_interpolator(run.method, params), any_path(OUT.value))
        print(f"wrote {OUT.value}/interpolator")
    return run.status


if __name__ == "__main__":
    command_line.run_training(train_interpolator, method="interpolator")

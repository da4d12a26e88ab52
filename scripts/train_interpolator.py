"""Train the frame interpolator, by which a student makes its first steps at half the frame rate.

    python scripts/train_interpolator.py --config configs/interpolator.py --config.data.latents=/data/latents \
        --workdir /runs/interpolator --out /runs/wan13b

The same command goes on from the last checkpoint of the workdir. `--explain` prints every field of the config.
"""

from pathlib import Path

from absl import flags

from avd_jax import command_line
from avd_jax.training.interpolation import FIELDS, train_interpolator, trained_interpolator
from avd_jax.training.shipping import write_interpolator

OUT = flags.DEFINE_string(
    "out", None, "folder that gets interpolator/, once the run is complete: a student's run or export, or weights"
)


def train(config, workdir: Path) -> int:
    """Train and write the result."""
    status, state, sizes = train_interpolator(config, workdir)
    if status == 0 and OUT.value:
        write_interpolator(trained_interpolator(sizes, state.ema), Path(OUT.value))
        print(f"wrote {OUT.value}/interpolator")
    return status


if __name__ == "__main__":
    command_line.run_training(train, FIELDS)

"""Train a small VAE from scratch on the built-in world of shapes, and write it in diffusers' layout.

    python scripts/train_vae.py --config configs/tiny_vae.py --workdir runs/tiny_vae --out weights/tiny

The same command goes on from the last checkpoint of the workdir. `--explain` prints every field of the config.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.training.fields import describe, flags_parser
from avd_jax.training.shipping import write_vae
from avd_jax.training.vae_training import FIELDS, train_vae, trained_vae

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: config, checkpoints, metrics")
OUT = flags.DEFINE_string("out", None, "folder that gets vae/, once the run is complete")
EXPLAIN = flags.DEFINE_bool("explain", False, "print every field of the config with its help, and stop")


def main() -> int:
    """Train and write the result."""
    if EXPLAIN.value:
        print(describe(CONFIG.value, FIELDS))
        return 0
    for flag in (WORKDIR, OUT):
        if not flag.value:
            raise UserError(
                f"--{flag.name} is missing: name the folder {'of the run' if flag is WORKDIR else 'to write'}"
            )
    status, state = train_vae(CONFIG.value, pathlib.Path(WORKDIR.value))
    if status == 0:
        write_vae(trained_vae(CONFIG.value, state.ema), pathlib.Path(OUT.value))
        print(f"wrote {OUT.value}/vae")
    return status


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, parse_flags=flags_parser(FIELDS))

"""Distil a Wan2.1 model into a few-step student.

    python scripts/train.py --config configs/tiny.py --workdir runs/tiny
    python scripts/train.py --config configs/wan13b.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --config.data.prompts=/data/prompts --workdir /runs/wan13b

The same command goes on from the last checkpoint of the workdir.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.training.config import FIELDS
from avd_jax.training.fields import describe, flags_parser
from avd_jax.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: config, checkpoints, metrics, samples")
EXPLAIN = flags.DEFINE_bool("explain", False, "print every field of the config with its help, and stop")


def main() -> int:
    """Train, or explain the config."""
    if EXPLAIN.value:
        print(describe(CONFIG.value, FIELDS))
        return 0
    if not WORKDIR.value:
        raise UserError("--workdir is missing: name the folder of the run")
    return train(CONFIG.value, pathlib.Path(WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, parse_flags=flags_parser(FIELDS))

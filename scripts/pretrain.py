"""Train a Wan2.1 transformer from scratch, or fine-tune one, by flow matching on encoded videos.

    python scripts/pretrain.py --config configs/tiny_pretrain.py --workdir runs/tiny_pretrain --out weights/tiny
    python scripts/pretrain.py --config configs/tiny_pretrain.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --config.optimizer.learning_rate=1e-5 --workdir runs/finetune

The same command goes on from the last checkpoint of the workdir. A run, like any other, is also read by
scripts/export.py and scripts/generate.py. `--explain` prints every field of the config.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.training.fields import describe, flags_parser
from avd_jax.training.pretraining import FIELDS, pretrain, trained_dit
from avd_jax.training.shipping import write_dit

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: config, checkpoints, metrics, encoded data")
OUT = flags.DEFINE_string("out", None, "folder that gets transformer/, the mean weights, once the run is complete")
EXPLAIN = flags.DEFINE_bool("explain", False, "print every field of the config with its help, and stop")


def main() -> int:
    """Train and write the result."""
    if EXPLAIN.value:
        print(describe(CONFIG.value, FIELDS))
        return 0
    if not WORKDIR.value:
        raise UserError("--workdir is missing: name the folder of the run")
    status, state, model = pretrain(CONFIG.value, pathlib.Path(WORKDIR.value))
    if status == 0 and OUT.value:
        write_dit(trained_dit(model, state.ema), pathlib.Path(OUT.value))
        print(f"wrote {OUT.value}/transformer")
    return status


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, parse_flags=flags_parser(FIELDS))

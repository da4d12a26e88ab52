"""What one training cycle costs, counted from the programs of a config, without weights, data or devices of its kind.

    python benchmarks/cycle_cost.py --config configs/wan13b.py
    python benchmarks/cycle_cost.py --config configs/wan13b.py --config.half_rate.steps=2

The unit is one forward pass of the transformer on one example. Traced for a CPU, whose attention is XLA's; a fused
kernel computes the scores again in its backward pass.
"""

import jax
from absl import flags
from ml_collections import config_flags

from avd_jax import command_line, methods
from avd_jax.fields import flags_parser
from avd_jax.training.assembly import Assembly
from avd_jax.training.cost import cycle_cost

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
VIDEO = {"frames": 81, "height": 480, "width": 832}


def main() -> None:
    """Count and print."""
    recipe = methods.get(CONFIG.value.get("method", ""))
    recipe.validate_values(CONFIG.value)
    method = recipe.build(CONFIG.value, devices=jax.devices()[:1], video=VIDEO)
    print(cycle_cost(Assembly(method)).as_text())


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, parse_flags=flags_parser(methods.fields_of_file))

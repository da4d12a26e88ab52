"""Compile a run's programs for a TPU slice that is not there: do they fit its memory, and what do they cost.

    python scripts/aot_compile.py --config configs/wan13b.py --topology v5e:4x4
    python scripts/aot_compile.py --config configs/wan14b.py --topology v5e:8x8 --json --dump_hlo /tmp/hlo
    python scripts/aot_compile.py --config configs/wan13b.py --topology v5e:4x8 --plan

Runs on any CPU with `pip install "jax[tpu]"`; needs neither weights nor data. docs/pods.md explains the figures.
"""

import json
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from avd_jax import command_line
from avd_jax.capacity.compiling import Report
from avd_jax.capacity.planning import candidates, recommend
from avd_jax.errors import UserError, closest
from avd_jax.parallel.topology import tpu_devices
from avd_jax.training.aot import PROGRAMS, Plan, make_plan
from avd_jax.training.config import FIELDS, check_values
from avd_jax.training.fields import flags_parser

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
TOPOLOGY = flags.DEFINE_string("topology", "", "the TPU slice, such as v5e:4x4 or v5p:2x2x4")
SLICES = flags.DEFINE_integer("slices", 1, "so many such slices", lower_bound=1)
PROGRAM = flags.DEFINE_list("programs", list(PROGRAMS[:4]), f"of {', '.join(PROGRAMS)}")
FRAMES = flags.DEFINE_integer("frames", 81, "of a video, where config.data.latents is empty")
HEIGHT = flags.DEFINE_integer("height", 480, "likewise, in pixels")
WIDTH = flags.DEFINE_integer("width", 832, "likewise, in pixels")
PLAN = flags.DEFINE_bool("plan", False, "try meshes and batch sizes with the generator's step, and recommend one")
JSON = flags.DEFINE_bool("json", False, "print one JSON object a program on a line of its own, and nothing else")
DUMP_HLO = flags.DEFINE_string("dump_hlo", "", "folder for the compiled HLO text, <program>.hlo")


def main() -> int:
    """Compile and report."""
    config = CONFIG.value
    check_values(config)
    devices = tpu_devices(TOPOLOGY.value, slices=SLICES.value)
    build = partial(make_plan, devices=devices, frames=FRAMES.value, height=HEIGHT.value, width=WIDTH.value)
    if PLAN.value:
        plans = candidates(config, devices, build)
        reports = [report_on(plan, "generator_step") for plan in plans]
        recommended = recommend(reports)
        print(json.dumps({"recommended": recommended}) if JSON.value else f"recommended: {recommended}", flush=True)
        return 0
    for name in PROGRAM.value:
        if name not in PROGRAMS:
            raise UserError(f"--programs {name}: there is no such program{closest(name, PROGRAMS)}")
    plan = build(config)
    for name in PROGRAM.value:
        report_on(plan, name)
    return 0


def report_on(plan: Plan, name: str) -> Report:
    """Compile one program, print what there is to say and keep its text if asked to."""
    report, hlo = plan.compile(name, topology=TOPOLOGY.value)
    print(json.dumps(report.as_dict()) if JSON.value else report.as_text(), flush=True)
    if DUMP_HLO.value and hlo:
        folder = Path(DUMP_HLO.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.hlo").write_text(hlo)
    return report


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, required=(TOPOLOGY,), parse_flags=flags_parser(FIELDS))

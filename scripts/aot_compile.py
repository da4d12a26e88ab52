"""Compile a run's programs for TPUs or GPUs that are not there: does the run fit, and what does it cost.

    python scripts/aot_compile.py --config configs/wan13b.py --topology v5e:4x4
    python scripts/aot_compile.py --config configs/wan14b.py --topology v5e:8x8 --json --dump_hlo /tmp/hlo
    python scripts/aot_compile.py --config configs/wan14b_h100.py --topology h100:8
    python scripts/aot_compile.py --config configs/wan13b.py --topology v5e:4x8 --plan

Runs on any CPU with `pip install "jax[tpu]"`, for GPUs with `pip install -e ".[cuda-compiler]"`; needs neither weights
nor data. docs/pods.md explains the figures.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from avd_jax import command_line, methods
from avd_jax.capacity.compiling import Report, compile_program
from avd_jax.capacity.planning import candidates, recommend
from avd_jax.fields import flags_parser
from avd_jax.parallel.topology import topology_devices
from avd_jax.training.assembly import Assembly
from avd_jax.training.cost import whole_run

CONFIG = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
TOPOLOGY = flags.DEFINE_string("topology", "", "TPU slice or hosts x GPUs: v5e:4x4, v5p:2x2x4, h100:8, h100:2x8")
SLICES = flags.DEFINE_integer("slices", 1, "so many such TPU slices", lower_bound=1)
PROGRAM = flags.DEFINE_list(
    "programs",
    [],
    "some of the run's programs, or 'forward', one pass of the transformer; by default all that the run needs, and a "
    "verdict on the whole run",
)
FRAMES = flags.DEFINE_integer("frames", 81, "of a video, if config.data.latents is empty")
HEIGHT = flags.DEFINE_integer("height", 480, "likewise, in pixels")
WIDTH = flags.DEFINE_integer("width", 832, "likewise, in pixels")
PLAN = flags.DEFINE_bool("plan", False, "try meshes and batch sizes with the main network's step, and recommend one")
JSON = flags.DEFINE_bool(
    "json", False, "print one JSON object a program and one of the verdict, a line each, and nothing else"
)
DUMP_HLO = command_line.disk_flag("dump_hlo", "", "folder for the compiled HLO text, <program>.hlo")


def main() -> int:
    """Compile and report."""
    recipe = methods.get(CONFIG.value.get("method", ""))
    recipe.validate_values(CONFIG.value)
    devices = topology_devices(TOPOLOGY.value, slices=SLICES.value)
    video = {"frames": FRAMES.value, "height": HEIGHT.value, "width": WIDTH.value}

    def build(config) -> Assembly:
        return Assembly(recipe.build(config, devices=devices, video=video))

    if PLAN.value:
        assemblies = candidates(CONFIG.value, devices, build)
        reports = [report_on(assembly, assembly.program_names()[0]) for assembly in assemblies]
        recommended = recommend(reports)
        print(json.dumps({"recommended": recommended}) if JSON.value else f"recommended: {recommended}", flush=True)
        return 0
    assembly = build(CONFIG.value)
    programs = {name: assembly.program(name) for name in PROGRAM.value}  # a misspelt one is named before any compiles
    if programs:
        for name in programs:
            report_on(assembly, name)
        return 0
    verdict = whole_run(assembly, {name: report_on(assembly, name) for name in assembly.run_programs()}, TOPOLOGY.value)
    print(json.dumps(verdict.as_dict()) if JSON.value else verdict.as_text(), flush=True)
    return 0


def report_on(assembly: Assembly, name: str) -> Report:
    """Compile one program, print what there is to say and keep its text if asked to."""
    report, hlo = compile_program(
        assembly.program(name), mesh=assembly.mesh, batch_size=assembly.rows.batch_size, topology=TOPOLOGY.value
    )
    print(json.dumps(report.as_dict()) if JSON.value else report.as_text(), flush=True)
    if DUMP_HLO.value and hlo:
        folder = Path(DUMP_HLO.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.hlo").write_text(hlo)
    return report


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main, required=(TOPOLOGY,), parse_flags=flags_parser(methods.fields_of_file))

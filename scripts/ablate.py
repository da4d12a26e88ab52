"""The ablation of the paper in the small world: Table 2, the clips of Fig. 12, the k of Fig. 13, the style of Fig. 6.

  python scripts/ablate.py --config configs/tiny_ablation.py --workdir runs/ablation
  python scripts/ablate.py --config configs/tiny_ablation.py --workdir runs/ablation --cells "teacher*,*_seed0"
  python scripts/ablate.py --config configs/tiny_ablation.py --workdir runs/ablation --report_only

Open `report.html` in the workdir; it is written anew after every cell. The same command resumes where an earlier one
stopped. avd_jax/experiments/cells.py says what the cells are.
"""

from functools import partial
from pathlib import Path

from absl import flags

from avd_jax import command_line
from avd_jax.experiments.ablation import run_ablation
from avd_jax.experiments.ablation_report import write_report
from avd_jax.experiments.cells import FIELDS

CELLS = flags.DEFINE_list("cells", ["*"], "Patterns of the names of the cells to run, separated by commas.")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Run nothing; write the report of what there is.")


def ablate(config, workdir: Path) -> int:
    """Run the ablation as the flags say."""
    run = partial(run_ablation, config, workdir, only=CELLS.value, run=not REPORT_ONLY.value)
    status = run(report=write_report)
    if not status:
        print(workdir / "report.html")
    return status


if __name__ == "__main__":
    command_line.run_configured(ablate, fields_of=lambda config: FIELDS, fields_of_file=lambda path: FIELDS)

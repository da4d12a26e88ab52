"""Export a transformer to the layout of Wan's own code or of diffusers.

  python scripts/export.py --checkpoint=runs/avd --layout=diffusers --dst=out/student

--checkpoint is a training run (its latest checkpoint), one of its checkpoints, or weights in any other known layout.
Beside the weights lie config.json, a model card, and avd_student.json with the timesteps that a student needs.
"""

import jax.numpy as jnp
from absl import flags

from avd_jax import command_line, convert
from avd_jax.convert.hub import push
from avd_jax.convert.networks import DEFAULT
from avd_jax.errors import UserError
from avd_jax.paths import any_path, hub_name

CHECKPOINT = command_line.weights_flag("checkpoint", "Training run or checkpoint, or weights in any known layout.")
LAYOUT = flags.DEFINE_enum("layout", None, convert.LAYOUTS, "Wan's own layout, or diffusers'.")
DST = command_line.path_flag("dst", None, "Folder for the export.")
PUSH = flags.DEFINE_string("push", "", "Then publish --dst, its card too: hf://ORG/NAME or hf://ORG/NAME@BRANCH.")
DTYPE = flags.DEFINE_enum("dtype", "keep", ["keep", "float32", "bfloat16"], "Stored dtype; keep: the checkpoint's.")
WHICH = command_line.define_which()
INSIDE = flags.DEFINE_bool(
    "interpolator_inside", False, "With native: the interpolator in the same file, as AVD has it."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier export in --dst.")


def main() -> None:
    """Open, check and write."""
    if INSIDE.value and LAYOUT.value != "native":
        raise UserError("--interpolator_inside: only goes with --layout native; leave it out")
    if PUSH.value and hub_name(PUSH.value) is None:
        raise UserError(f"--push={PUSH.value}: write hf://ORG/NAME or hf://ORG/NAME@BRANCH")
    student = convert.export_dit(
        CHECKPOINT.value,
        any_path(DST.value),
        layout=LAYOUT.value,
        dtype=None if DTYPE.value == "keep" else jnp.dtype(DTYPE.value),
        key=WHICH.value or DEFAULT,
        overwrite=OVERWRITE.value,
        interpolator_inside=INSIDE.value,
    )
    kind = f"a student of {len(student['timesteps'])} steps" if student else "weights of no student"
    print(f"{DST.value}: {kind} in {LAYOUT.value} layout; README.md there says how to load it")
    if PUSH.value:
        print(f"published: {push(DST.value, PUSH.value)}")


if __name__ == "__main__":
    command_line.run(main, required=(CHECKPOINT, LAYOUT, DST))

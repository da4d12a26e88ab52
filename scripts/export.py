"""Export a transformer to the layout of Wan's own code, of diffusers or of ComfyUI, or a student as a LoRA.

  python scripts/export.py --checkpoint=runs/avd --layout=diffusers --dst=out/student
  python scripts/export.py --checkpoint=runs/avd --layout=comfyui --dtype=fp8 --dst=out/student
  python scripts/export.py --checkpoint=runs/avd --layout=lora --rank=64 --dst=out/student

--checkpoint is a training run (its latest checkpoint), one of its checkpoints, or weights in any other known layout.
Beside the weights lie config.json, a model card, and avd_student.json with the timesteps that a student needs. A LoRA
is the leading part of the difference from --teacher, matrix by matrix; how much each rank leaves out is printed.
"""

import jax.numpy as jnp
from absl import flags

from avd_jax import command_line, convert
from avd_jax.convert.adapter_keys import STYLES
from avd_jax.convert.extraction import FULL
from avd_jax.convert.hub import check_push, push
from avd_jax.convert.networks import DEFAULT
from avd_jax.errors import UserError
from avd_jax.paths import any_path

DTYPES = ["keep", "float32", "bfloat16", "float16", "fp8"]

CHECKPOINT = command_line.weights_flag("checkpoint", "Training run or checkpoint, or weights in any known layout.")
LAYOUT = flags.DEFINE_enum("layout", None, convert.LAYOUTS, "Wan's own layout, diffusers', ComfyUI's one file; a LoRA.")
DST = command_line.path_flag("dst", None, "Folder for the export.")
PUSH = flags.DEFINE_string("push", "", "Then publish --dst, its card too: hf://ORG/NAME or hf://ORG/NAME@BRANCH.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Stored dtype. Default: keep, the checkpoint's; bfloat16 with comfyui and lora."
)
WHICH = command_line.define_which()
LORA = command_line.define_lora()
INSIDE = flags.DEFINE_bool(
    "interpolator_inside", False, "With native: the interpolator in the same file, as AVD has it."
)
RANK = flags.DEFINE_string("rank", "64", "With lora: rank of its pairs, or full.")
STYLE = flags.DEFINE_enum("lora_style", STYLES[0], STYLES, "With lora: whose keys it has.")
TEACHER = command_line.weights_flag("teacher", "With lora: what the student started from. Default: as its run says.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier export in --dst.")

BELONGS = ((INSIDE, "native"), (RANK, "lora"), (STYLE, "lora"), (TEACHER, "lora"))


def main() -> None:
    """Open, check and write."""
    layout, dtype = LAYOUT.value, DTYPE.value
    for flag, own in BELONGS:
        if flag.present and flag.value and layout != own:
            raise UserError(f"--{flag.name}: only goes with --layout {own}; leave it out")
    if dtype == "fp8" and layout != "comfyui":
        raise UserError("--dtype fp8: only goes with --layout comfyui, whose reader knows its scales; give another")
    if dtype == "keep" and layout in ("comfyui", "lora"):
        raise UserError(f"--dtype keep: does not go with --layout {layout}; give another, or leave it out")
    if PUSH.value:
        check_push(DST.value, PUSH.value)
    shared = {"key": WHICH.value or DEFAULT, "lora": LORA.value or "", "overwrite": OVERWRITE.value}
    if layout == "lora":
        more = {"rank": rank(), "style": STYLE.value, "teacher": TEACHER.value or "", "dtype": dtype or "bfloat16"}
        student, errors = convert.export_lora(CHECKPOINT.value, any_path(DST.value), **shared, **more)
        for name, (error, size) in errors.items():
            print(f"rank {name}: leaves out {error:.4f} of the difference from the teacher, {size / 1e6:,.1f} MB")
    else:
        more = {"layout": layout, "interpolator_inside": INSIDE.value}
        if dtype not in (None, "keep"):
            more["dtype"] = dtype if layout == "comfyui" else jnp.dtype(dtype)
        student = convert.export_dit(CHECKPOINT.value, any_path(DST.value), **shared, **more)
    kind = f"a student of {len(student['timesteps'])} steps" if student else "weights of no student"
    print(f"{DST.value}: {kind} in {layout} layout; README.md there says how to load it")
    if PUSH.value:
        print(f"published: {push(DST.value, PUSH.value)}")


def rank() -> int:
    """Return the rank that is asked for."""
    if RANK.value == "full":
        return FULL
    if not RANK.value.isdecimal() or int(RANK.value) < 1:
        raise UserError(f"--rank {RANK.value}: give a whole number from 1 on, or full")
    return int(RANK.value)


if __name__ == "__main__":
    command_line.run(main, required=(CHECKPOINT, LAYOUT, DST))

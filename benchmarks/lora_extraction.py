"""What it takes to write a student of Wan2.1-1.3B as a LoRA: random weights at full size, memory and time by rank.

    python benchmarks/lora_extraction.py --folder /tmp/lora

The first call makes FOLDER/teacher and FOLDER/student in Wan's own layout, 2.8 GB each in bfloat16. Then
scripts/export.py runs as a user would type it, in a process of its own, and its peak of anonymous memory is printed
(see full_size.py).
The student is the teacher with random numbers added, so its errors say nothing of a trained one's.

Measured with --layers 2 --ranks 64 and OPENBLAS_NUM_THREADS=1, on 2 cores that other programs kept busy nine times
over: 0.4 GB, 81 s.
"""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags
from full_size import FOLDER, measure, native_shapes, random_blocks

from avd_jax import command_line
from avd_jax.convert import dit_rules
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.safetensors_io import write_safetensors
from avd_jax.models.wan_dit import WAN_1_3B

LAYERS = flags.DEFINE_integer("layers", WAN_1_3B.num_layers, "Blocks; the time goes with them, the memory does not.")
RANKS = flags.DEFINE_list("ranks", ["32", "64"], "Ranks to write, separated by commas.")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def main() -> int:
    """Make what is missing, write each rank, print the table; return 1 if an export failed."""
    folder, failed = Path(FOLDER.value), 0
    for name, change in (("teacher", 0.0), ("student", 0.02)):
        if not (folder / name / "config.json").is_file():
            make_weights(folder / name, change)
    print("| rank | peak, GB | seconds | status |\n| --- | --- | --- | --- |", flush=True)
    for rank in RANKS.value:
        arguments = ["--layout=lora", f"--rank={rank}", f"--teacher={folder / 'teacher'}", "--overwrite"]
        command = ["scripts/export.py", f"--checkpoint={folder / 'student'}", f"--dst={folder / 'lora'}", *arguments]
        row = measure(command, folder, folder / f"rank{rank}.log")
        print(f"| {rank} | {row['peak_gb']:.1f} | {row['seconds']:.0f} | {row['status']} |", flush=True)
        failed = failed or row["status"]
    return int(bool(failed))


def make_weights(folder: Path, change: float) -> None:
    """Write random weights, and a `change` of them added, as a share."""
    config = dataclasses.replace(WAN_1_3B, num_layers=LAYERS.value)
    shapes = native_shapes(WAN_DIT, config)
    leaves = {key: jax.ShapeDtypeStruct(shape, BFLOAT16) for key, (shape, _) in shapes.items()}

    def tensors():
        for i, (key, (shape, fill)) in enumerate(shapes.items()):
            values = np.concatenate(list(random_blocks(shape, fill)))
            if change:
                values += change * np.roll(values, 7919 * (i + 1)) + change * 1e-3
            yield key, values.reshape(shape).astype(BFLOAT16)

    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, leaves, tensors(), stem="diffusion_pytorch_model", max_shard_bytes=10**10)
    (folder / "config.json").write_text(json.dumps(dit_rules.config_to_native(config), indent=2))


if __name__ == "__main__":
    command_line.run(main, required=(FOLDER,))

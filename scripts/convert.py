"""Convert weights in any known layout to our own, which loads sharded and fast.

  python scripts/convert.py --src=Wan2.1-T2V-1.3B --dst=runs/wan

--src is Wan's folder, a diffusers folder, a single file, or a training checkpoint. --dst gets transformer/, vae/,
text_encoder/ (each an Orbax checkpoint with its config.json) and tokenizer/, for whatever --src holds.
"""

import jax.numpy as jnp
import numpy as np
from absl import flags

from avd_jax import command_line, convert
from avd_jax.convert.networks import DEFAULT
from avd_jax.convert.video_size import video_size, write_video_size
from avd_jax.paths import any_path

SRC = command_line.weights_flag("src", "Weights to convert, in any known layout.")
DST = command_line.path_flag("dst", None, "Folder for the converted weights.")
DTYPE = flags.DEFINE_enum("dtype", "keep", ["keep", "float32", "bfloat16"], "Stored dtype; keep: the source's.")
COMPONENTS = flags.DEFINE_list("components", None, "Of transformer, vae, text_encoder, tokenizer; default: all found.")
WHICH = command_line.define_which()
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace components that --dst has from an earlier conversion.")


def main() -> None:
    """Find and check all components first, then write them one by one."""
    found, missing = convert.find_components(SRC.value, COMPONENTS.value, WHICH.value or DEFAULT)
    for component in found:
        convert.check_writable(any_path(DST.value) / component, overwrite=OVERWRITE.value)
    dtype = None if DTYPE.value == "keep" else jnp.dtype(DTYPE.value)
    for component, source in found.items():
        folder = any_path(DST.value) / component
        if component == "tokenizer":
            convert.save_tokenizer(source, folder, overwrite=OVERWRITE.value)
            print(f"{component}: {source.vocab_size:,} tokens -> {folder}", flush=True)
            continue
        student = convert.student_settings(SRC.value) if component == "transformer" else None
        convert.save_orbax(source, folder, dtype=dtype, student=student, overwrite=OVERWRITE.value)
        size = sum(int(np.prod(leaf.shape)) for leaf in source.leaves.values())
        dtypes = sorted({str(np.dtype(dtype or leaf.dtype)) for leaf in source.leaves.values()})
        print(f"{component}: {size:,} parameters, {' and '.join(dtypes)} -> {folder}", flush=True)
    if size := video_size(SRC.value):
        write_video_size(DST.value, size)
    for component in missing:
        print(f"{component}: not found in {SRC.value}")


if __name__ == "__main__":
    command_line.run(main, required=(SRC, DST))

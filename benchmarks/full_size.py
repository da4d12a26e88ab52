"""What a small machine needs for Wan2.1-1.3B at full size: random weights in Wan's own layout, and a rehearsal on them.

    python benchmarks/full_size.py --folder /tmp/full_size
    python benchmarks/full_size.py --folder /tmp/full_size --only prompts,teacher --json full_size.json

The first call makes FOLDER/wan, 17.6 GB: the transformer in float32, Wan2.1_VAE.pth, umT5-XXL in bfloat16 and the small
world's tokenizer, streamed within 0.5 GB of memory. Then each command runs as a user would type it, in a process of its
own, and its peak of anonymous memory is printed: RssAnon of /proc, every 20 ms, which leaves cached files out. Linux
only; the machine needs as much memory as the largest row and 20 GB of disk. Videos have 5 frames of 128x128.

Measured on 16 cores, of which another program used some; before is what the same command took once:

| command | peak, GB | seconds | before: peak, GB |
| --- | --- | --- | --- |
| prompts | 13.8 | 48 | 24 |
| videos | 13.9 | 54 | |
| teacher | 13.9 | 66 | killed at 24 |
| teacher_again, whose prompt is kept | 7.4 | 31 | |
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags

from avd_jax import command_line
from avd_jax.convert import dit_rules
from avd_jax.convert.architectures import UMT5, WAN_DIT, WAN_VAE, Architecture
from avd_jax.convert.engine import source_shapes
from avd_jax.convert.files import is_matrix
from avd_jax.convert.safetensors_io import write_safetensors
from avd_jax.data.video import write_video
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_dit import WAN_1_3B
from avd_jax.models.wan_vae import WanVAEConfig

FOLDER = command_line.path_flag("folder", None, "For weights and results; both are kept.")
JSON = command_line.path_flag("json", None, "Write the table to this file too.")
ONLY = flags.DEFINE_list("only", None, "Which commands to run, separated by commas. Default: all.")

ROOT = Path(__file__).parents[1]
DISK_BYTES = 20 * 10**9
BLOCK = 1 << 22  # random numbers at a time
SIZE = ["--frames=5", "--height=128", "--width=128"]
STORAGES = {"float32": b"FloatStorage", "bfloat16": b"BFloat16Storage"}


def main() -> int:
    """Make what is missing, run the commands, print the table; return 1 if a command failed."""
    folder = Path(FOLDER.value)
    commands = rehearsal(folder)
    chosen = ONLY.value or list(commands)
    if unknown := [name for name in chosen if name not in commands]:
        raise UserError(f"--only {unknown[0]}: is none of {', '.join(commands)}")
    make_weights(folder / "wan")
    make_inputs(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    print("| command | peak, GB | seconds | status |\n| --- | --- | --- | --- |", flush=True)
    rows = []
    for name in chosen:
        row = {"command": name} | measure(commands[name], folder, folder / f"{name}.log")
        rows.append(row)
        print(f"| {name} | {row['peak_gb']:.1f} | {row['seconds']:.0f} | {row['status']} |", flush=True)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["status"] for row in rows))


def rehearsal(folder: Path) -> dict[str, list[str]]:
    """Return name -> arguments of each command. The first one that generates fills the cache of prompts."""
    weights, out = f"--weights={folder / 'wan'}", folder / "out"
    encode, generate = ("scripts/encode.py", weights), ("scripts/generate.py", weights)
    text = ["--text_batch_size=1"]  # a batch of 8 takes 0.1 GB more, and as much longer
    teacher = [*generate, *SIZE, "--solver=unipc", "--steps=2", f"--out={out / 'videos'}", "--prompt=A panda"]
    return {
        "prompts": [*encode, *text, f"--prompts={folder / 'prompts.txt'}", f"--out={out / 'prompts'}"],
        "videos": [*encode, *text, f"--videos={folder / 'videos'}", *SIZE, f"--out={out / 'latents'}"],
        "teacher": teacher,
        "teacher_again": [*teacher, "--seed=1"],
        "teacher_bfloat16": [*teacher, "--dtype=bfloat16"],
    }


def measure(arguments: list[str], folder: Path, log: Path) -> dict:
    """Run a script to its end; return its peak of anonymous memory in GB, its seconds and its status."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment["XDG_CACHE_HOME"] = str(folder / "out" / "cache")
    start, peak = time.monotonic(), 0
    with log.open("wb") as output:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)  # none: it has just ended
            time.sleep(0.02)
    return {"peak_gb": peak * 1024 / 1e9, "seconds": time.monotonic() - start, "status": process.returncode}


def make_inputs(folder: Path) -> None:
    """Write a prompt, and a video with its caption."""
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("A panda plays the guitar.\n")
    write_video(folder / "videos" / "a.mp4", np.random.default_rng(0).uniform(-1, 1, (8, 128, 128, 3)), fps=16)
    (folder / "videos" / "a.txt").write_text("Noise.")


def make_weights(folder: Path) -> None:
    """Write random weights in Wan's layout, unless they are there."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < DISK_BYTES:
        raise UserError(f"--folder {folder.parent}: the weights need {DISK_BYTES / 1e9:.0f} GB of free disk")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(ROOT / "weights" / "tiny" / "tokenizer" / "tokenizer.json", partial / "google" / "umt5-xxl")
    (partial / "config.json").write_text(json.dumps(dit_rules.config_to_native(WAN_1_3B), indent=2))
    shapes = native_shapes(WAN_DIT, WAN_1_3B)
    leaves = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, (shape, _) in shapes.items()}
    tensors = ((key, np.concatenate(list(random_blocks(*shapes[key]))).reshape(shapes[key][0])) for key in shapes)
    write_safetensors(partial, leaves, tensors, stem="diffusion_pytorch_model", max_shard_bytes=10**10)
    write_pth(partial / "Wan2.1_VAE.pth", native_shapes(WAN_VAE, WanVAEConfig()), np.float32)
    umt5 = partial / "models_t5_umt5-xxl-enc-bf16.pth"
    write_pth(umt5, native_shapes(UMT5, UMT5Config()), ml_dtypes.bfloat16)
    os.rename(partial, folder)


def native_shapes(architecture: Architecture, config) -> dict[str, tuple[tuple[int, ...], float | str]]:
    """Return Wan's key -> shape, and how it is filled: the deviation of normal numbers, "ones" or "zeros"."""
    rules, found = architecture.native_rules(config), {}
    for path, leaf in architecture.leaves(config).items():
        for key, shape in source_shapes(rules, {path: leaf}):
            if is_matrix(shape):
                found[key] = shape, shape[0] ** -0.5 if "embedding.embedding" in path else np.prod(shape[1:]) ** -0.5
                if ".attn.q." in path:  # umT5 does not scale its queries
                    found[key] = shape, found[key][1] / 8
            else:
                found[key] = shape, "ones" if path.endswith(("scale", "gamma")) else "zeros"
    return found


def random_blocks(shape: tuple[int, ...], fill: float | str) -> Iterator[np.ndarray]:
    """Yield the values of a tensor one after the other, float32; the same pool of numbers serves all."""
    count, rng = int(np.prod(shape)), np.random.default_rng(int(np.prod(shape)))
    if isinstance(fill, str):
        yield np.full(count, fill == "ones", np.float32)
        return
    pool = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * np.float32(fill)
    for first in range(0, count, BLOCK):
        yield np.roll(pool, rng.integers(BLOCK))[: count - first]


def write_pth(path: Path, shapes: dict, dtype) -> None:
    """Write a state dict as torch.save does, one block of values at a time."""
    size = np.dtype(dtype).itemsize
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", pickled({key: shape for key, (shape, _) in shapes.items()}, dtype))
        for i, (shape, fill) in enumerate(shapes.values()):
            large = int(np.prod(shape)) * size >= zipfile.ZIP64_LIMIT
            with archive.open(f"archive/data/{i}", "w", force_zip64=large) as file:
                for block in random_blocks(shape, fill):
                    file.write(block.astype(dtype).tobytes())


def pickled(shapes: dict[str, tuple[int, ...]], dtype) -> bytes:
    """Return the pickle that describes contiguous tensors, each in a storage of its own (torch/serialization.py)."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little")  # LONG1 of 8 bytes

    def numbers(values) -> bytes:
        return b"(" + b"".join(number(int(value)) for value in values) + b"t"

    parts = [b"\x80\x02}("]
    for i, (key, shape) in enumerate(shapes.items()):
        strides = [np.prod(shape[axis + 1 :], dtype=np.int64) for axis in range(len(shape))]
        storage = b"ctorch\n" + STORAGES[np.dtype(dtype).name] + b"\n"
        about = b"(" + text("storage") + storage + text(str(i)) + text("cpu") + number(int(np.prod(shape))) + b"tQ"
        hooks = b"ccollections\nOrderedDict\n)R"
        view = number(0) + numbers(shape) + numbers(strides) + b"\x89" + hooks
        parts.append(text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + about + view + b"tR")
    return b"".join(parts) + b"u."


if __name__ == "__main__":
    command_line.run(main, required=(FOLDER,))

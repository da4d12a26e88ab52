"""The tiny transformer of tests/fixtures in the layouts that users have; helpers of the test_convert_* files."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from avd_jax import convert
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.engine import source_shapes
from avd_jax.convert.safetensors_io import SafetensorsFile, write_safetensors

FIXTURES = Path(__file__).parent / "fixtures"
NATIVE = FIXTURES / "dit_native"
DIFFUSERS = FIXTURES / "dit_diffusers"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STUDENT = {"timesteps": [1000.0, 900.0, 757.0, 522.0], "shift": 5.0, "guidance_scale": 5.0, "num_steps": 4}


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a .safetensors file."""
    file = SafetensorsFile(path)
    return {key: file.read(key) for key in file.leaves}


def write_all(
    folder: Path, tensors: dict[str, np.ndarray], *, stem: str = "diffusion_pytorch_model", shard_bytes=10**9
):
    """Write tensors as .safetensors, in shards if they are larger than `shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in tensors.items()}
    write_safetensors(folder, leaves, tensors.items(), stem=stem, max_shard_bytes=shard_bytes)


def copy(folder: Path, target: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(folder, target))


def sharded_copy(target: Path) -> Path:
    """Return the native fixture in several shards with an index."""
    write_all(target, read_all(NATIVE / WEIGHTS), shard_bytes=40_000)
    shutil.copy(NATIVE / "config.json", target)
    return target


def training_run(workdir: Path, steps=(10, 20), *, ema: bool = False, old: bool = False) -> Path:
    """Write checkpoints as training does, or did; the weights of step n are the fixture's times n / 20."""
    dit = convert.load_dit(NATIVE)
    params = nnx.to_pure_dict(nnx.state(dit, nnx.Param))
    meta = {"architecture": WAN_DIT.record(dit.config), "student": STUDENT}
    if not old:
        meta["main"] = "generator"
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        for step in steps:
            items = {
                "generator": ocp.args.StandardSave(jax.tree.map(lambda leaf, step=step: leaf * (step / 20), params)),
                "fake_score": ocp.args.StandardSave(jax.tree.map(lambda leaf: leaf + 1, params)),
                "progress": ocp.args.StandardSave({"step": np.int32(step)}),
                "meta": ocp.args.JsonSave(meta | {"step": step}),
            }
            if ema:
                name = "ema" if old else "generator_ema"
                items[name] = ocp.args.StandardSave(jax.tree.map(lambda leaf: leaf + 2, params))
            manager.save(step, args=ocp.args.Composite(**items))
            manager.wait_until_finished()
    (workdir / "config.json").write_text(json.dumps({"optimizer": {"learning_rate": 2e-6}}))
    return workdir


def random_tensors(rules, architecture, config) -> dict[str, np.ndarray]:
    """Return random tensors under the keys of a table."""
    rng = np.random.default_rng(0)
    shapes = source_shapes(rules, architecture.leaves(config))
    return {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes}


def leaves_of(module) -> dict[str, np.ndarray]:
    """Return dotted path -> array of a loaded module."""
    return {path: np.asarray(leaf) for path, leaf in convert.flat_state(nnx.state(module)).items()}


def spiece_model(*, end: str = "</s>") -> bytes:
    """Return a SentencePiece model: a protocol buffer of the pieces <pad> </s> <unk> _a _ab _b, each of its kind."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value]) if number < 16 else bytes([number << 3 & 127 | 128, number >> 4, value])
        return bytes([number << 3 | 2, len(value)]) + value

    pieces = [("<pad>", 0.0, 3), (end, 0.0, 3), ("<unk>", 0.0, 2), ("\u2581a", -2.0, 1), ("\u2581ab", -3.0, 1)]
    model = b""
    for text, score, kind in [*pieces, ("\u2581b", -4.0, 1)]:
        scored = bytes([2 << 3 | 5]) + np.float32(score).tobytes()
        model += field(1, field(1, text.encode()) + scored + field(3, kind))
    return model + field(2, field(3, 1) + field(40, 2))

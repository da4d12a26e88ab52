"""scripts/convert.py as a user runs it."""

import json
import os
from pathlib import Path

import convert_cases as cases
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import processes

from avd_jax import convert
from avd_jax.convert import umt5_rules, vae_rules
from avd_jax.convert.architectures import UMT5, WAN_VAE
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_vae import WanVAEConfig

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [str(ROOT / "scripts" / "convert.py"), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return processes.run(command, env=environment)


def diffusers_folder(folder):
    """A diffusers folder of all four components, the text encoder in bfloat16."""
    cases.copy(cases.DIFFUSERS, folder)
    vae = WanVAEConfig(base_dim=4)
    t5 = UMT5Config(vocab_size=8, dim=8, ffn_dim=8, num_heads=1, head_dim=8, num_layers=1)
    tensors = cases.random_tensors(vae_rules.diffusers_rules(vae), WAN_VAE, vae)
    cases.write_all(folder / "vae", tensors)
    (folder / "vae" / "config.json").write_text(json.dumps(vae_rules.config_to_diffusers(vae)))
    tensors = cases.random_tensors(umt5_rules.diffusers_rules(t5), UMT5, t5)
    cases.write_all(
        folder / "text_encoder", {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}, stem="model"
    )
    (folder / "text_encoder" / "config.json").write_text(json.dumps(umt5_rules.config_to_diffusers(t5)))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes((cases.FIXTURES / "tokenizer.json").read_bytes())
    return folder


def test_converts_everything_that_is_there_and_keeps_its_dtype(tmp_path):
    source, ours = diffusers_folder(tmp_path / "hub"), tmp_path / "runs" / "wan"
    done = run("--src", source, "--dst", ours)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in ours.iterdir()) == ["text_encoder", "tokenizer", "transformer", "vae"]
    assert "text_encoder: 568 parameters, bfloat16" in done.stdout
    assert "not found" not in done.stdout
    for load in (convert.load_dit, convert.load_vae, convert.load_umt5):
        expected = cases.leaves_of(load(source))
        for path, leaf in cases.leaves_of(load(ours)).items():
            np.testing.assert_array_equal(leaf, expected[path])
    assert convert.load_tokenizer(ours).serialized == convert.load_tokenizer(source).serialized
    names = [
        json.loads((ours / part / "config.json").read_text())["avd_jax"]["name"] for part in ("transformer", "vae")
    ]
    assert names == ["wan_dit", "wan_vae"]
    with ocp.PyTreeCheckpointer() as checkpointer:  # an ordinary Orbax checkpoint, also for others
        tree = checkpointer.restore(ours / "text_encoder")
    assert tree["norm"]["scale"].dtype == ml_dtypes.bfloat16

    again = run("--src", source, "--dst", ours)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == (
        f"error: {ours}/transformer: already exists; pass --overwrite to replace it, or choose another folder\n"
    )


def test_components_dtype_and_overwrite(tmp_path):
    ours = tmp_path / "wan"
    assert run("--src", cases.NATIVE, "--dst", ours).returncode == 0
    done = run("--src", cases.NATIVE, "--dst", ours, "--components=transformer", "--dtype=bfloat16", "--overwrite")
    assert done.stdout == f"transformer: 21,000 parameters, bfloat16 -> {ours}/transformer\n", done.stderr
    expected = cases.leaves_of(convert.load_dit(cases.NATIVE))
    for path, leaf in cases.leaves_of(convert.load_dit(ours)).items():
        np.testing.assert_array_equal(leaf, expected[path].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_wrong_source_or_flag_is_one_line(tmp_path):
    done = run("--src", tmp_path, "--dst", tmp_path / "ours")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path}: nothing to convert here")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ours").exists()
    assert run("--src", tmp_path).stderr == "error: --dst is missing: Folder for the converted weights.\n"

"""Files that are no whole, plain weights: broken downloads, holes, GGUF; and where zeros are right."""

import os
import shutil
from pathlib import Path

import convert_cases as cases
import ml_dtypes
import numpy as np
import processes
import pytest
from pth_cases import write_pth

from avd_jax import convert
from avd_jax.convert import files, vae_rules
from avd_jax.convert.architectures import INTERPOLATOR, WAN_DIT, WAN_VAE
from avd_jax.convert.files import Stored
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError
from avd_jax.models.interpolator import InterpolatorConfig
from avd_jax.models.wan_vae import WanVAEConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    return cases.copy(cases.NATIVE, tmp_path / "wan")


@pytest.mark.parametrize("mark", files.UNFINISHED)
@pytest.mark.parametrize("name", [cases.WEIGHTS, "model.pth"])
def test_what_a_downloader_keeps_beside_a_file(mark, name, folder):
    if name.endswith(".pth"):
        write_pth(folder / name, cases.read_all(folder / cases.WEIGHTS))
    note = folder / (name + mark)
    note.touch()
    for path in (folder / name, note) + ((folder,) if name == cases.WEIGHTS else ()):
        with pytest.raises(UserError, match=r"the download is incomplete|a download that has not finished"):
            convert.load_dit(path)
    note.unlink()
    convert.load_dit(folder / name)


def test_a_download_of_something_else_is_no_matter(folder):
    (folder / "Wan2.1_VAE.pth.aria2").touch()
    convert.load_dit(folder)


def test_one_shard_of_several_and_a_broken_link(tmp_path):
    folder = cases.sharded_copy(tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    (folder / f"{shards[1].name}.part").touch()
    with pytest.raises(UserError, match=rf"{shards[1].name}: the download is incomplete"):
        convert.load_dit(folder)
    (folder / f"{shards[1].name}.part").unlink()
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".json") and path.name != "config.json":
            path.unlink()
    (folder / cases.WEIGHTS).symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(UserError, match="the download is incomplete: it links to a file that is not there"):
        convert.load_dit(folder)


def zero_from(path, share):
    """Put zeros from a share of the file on, as in a download whose space was allocated first."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(int(size * share))
        file.write(bytes(size - file.tell()))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_zeros_at_the_end_are_refused_before_anything_is_read(share, folder):
    zero_from(folder / cases.WEIGHTS, share)
    for load in (convert.dit_config, convert.load_dit, convert.find_components):
        with pytest.raises(UserError, match=r"the download is incomplete: .* is zero"):
            load(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_matrix_of_zeros_is_refused_while_it_is_read_and_nothing_stays(suffix, folder, tmp_path):
    tensors = cases.read_all(folder / cases.WEIGHTS)
    key = "blocks.1.ffn.0.weight"
    tensors[key] = np.zeros_like(tensors[key])
    tensors["head.head.bias"] = np.zeros_like(tensors["head.head.bias"])  # a vector may be zero
    path = folder / f"weights{suffix}"
    if suffix == ".pth":
        write_pth(path, tensors)
    else:
        cases.write_all(folder, tensors, stem="weights")
    message = rf"weights{suffix}: the download is incomplete: {key} is zero where a trained model's is not"
    with pytest.raises(UserError, match=message):
        convert.load_dit(path)
    with pytest.raises(UserError, match=message):
        convert.export_dit(path, tmp_path / "out" / "native", layout="native")
    with pytest.raises(UserError, match=message):
        convert.save_orbax(open_weights(path, WAN_DIT), tmp_path / "out" / "ours")
    assert not list((tmp_path / "out").iterdir())
    tensors[key] += 1
    tensors["head.head.weight"][:] = 0  # as Wan's own code begins
    cases.write_all(folder, tensors, stem="new")
    convert.load_dit(folder / "new.safetensors")


def stored(array, folder):
    cases.write_all(folder, {"a": array}, stem="a")
    return Stored(files.open_file(folder / "a.safetensors"), "a")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_hole_within_a_matrix(dtype, tmp_path):
    mebibyte = (1 << 20) // np.dtype(dtype).itemsize
    array = np.ones((5, mebibyte), dtype)
    array[1, 1:] = array[2, :5] = 0  # less than a whole one
    np.testing.assert_array_equal(stored(array, tmp_path).read(), array.astype(stored(array, tmp_path).leaf.dtype))
    array[1] = 0
    with pytest.raises(UserError, match="the download is incomplete: a is zero"):
        stored(array, tmp_path).read()
    with pytest.raises(UserError, match="the download is incomplete: a is zero"):
        stored(array, tmp_path).read((1, 3))
    found = stored(array, tmp_path).read((2, 4))
    np.testing.assert_array_equal(found[2:4], array[2:4].astype(found.dtype))
    assert not found[:2].any()
    assert not found[4:].any()
    assert not stored(array, tmp_path).ends_in_zeros()
    assert stored(array, tmp_path).read(may_be_zero=True).shape == array.shape


def test_models_before_their_training_may_be_zero(tmp_path):
    sizes = InterpolatorConfig(channels=4, widths=(8, 12, 16))
    tensors = cases.random_tensors(INTERPOLATOR.native_rules(sizes), INTERPOLATOR, sizes)
    tensors["out_conv.weight"][:] = tensors["out_conv.bias"][:] = 0
    cases.write_all(tmp_path / "interpolator", tensors)
    convert.load_interpolator(tmp_path / "interpolator" / cases.WEIGHTS)
    sizes = WanVAEConfig(base_dim=4)
    tensors = cases.random_tensors(vae_rules.native_rules(sizes), WAN_VAE, sizes)
    for key in ("encoder.middle.0.residual.6.weight", "decoder.middle.1.proj.weight"):
        tensors[key][:] = 0
    cases.write_all(tmp_path, tensors, stem="Wan2.1_VAE")
    convert.load_vae(tmp_path)


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors", "a.bin"])
def test_gguf_by_name_or_content(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    for load in (convert.load_dit, convert.load_umt5, convert.find_components):
        with pytest.raises(UserError, match=rf"{name}: is a GGUF file, .*get the bf16 or fp16 \.safetensors"):
            load(tmp_path / name)
    if name == "a.gguf":
        with pytest.raises(UserError, match=r"a\.gguf: is a GGUF file"):
            convert.load_dit(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "is a LoRA"),
        ("pytorch_lora_weights.safetensors", "is a LoRA"),
        ("transformer/wan-Q4_0.gguf", "is a GGUF file"),
        ("transformer/diffusion_pytorch_model.safetensors.part", "a download that has not finished"),
        (".cache/huggingface/download/transformer/x.0123.incomplete", "the download is incomplete: there is"),
    ],
)
def test_folders_that_hold_something_else(name, message, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    for load in (convert.load_dit, convert.find_components):
        with pytest.raises(UserError, match=message):
            load(tmp_path)
    with pytest.raises(UserError, match="no text_encoder here"):  # it may lie in another place
        convert.load_umt5(tmp_path)
    (tmp_path / "umt5-xxl-Q5.gguf").touch()
    with pytest.raises(UserError, match=r"umt5-xxl-Q5\.gguf: is a GGUF file"):
        convert.load_umt5(tmp_path)


@pytest.mark.parametrize("arguments", ["export --layout native --checkpoint", "convert --src"])
def test_a_script_refuses_in_one_line_and_writes_nothing(arguments, folder, tmp_path):
    zero_from(folder / cases.WEIGHTS, 0.5)
    script, *rest = arguments.split()
    command = [
        str(ROOT / "scripts" / f"{script}.py"),
        *rest,
        str(folder),
        "--dst",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = processes.run(command, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: {folder / cases.WEIGHTS}: the download is incomplete")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(folder)

"""Folders as they are downloaded and kept: variants, .bin, the hub's cache, ComfyUI's folders; and Wan2.2's."""

import json
import re
import shutil

import convert_cases as cases
import numpy as np
import pytest
from pth_cases import write_pth

from avd_jax import convert
from avd_jax.convert import umt5_rules, vae_rules
from avd_jax.convert.architectures import UMT5, WAN_VAE
from avd_jax.data.tokenizer import Tokenizer
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_vae import WanVAEConfig

STEM = "diffusion_pytorch_model"
PART = f"transformer/{STEM}.safetensors"
TINY_VAE = WanVAEConfig(base_dim=4)
TINY_T5 = UMT5Config(vocab_size=32, dim=8, ffn_dim=12, num_heads=2, head_dim=4, num_layers=2)


@pytest.fixture(scope="module")
def tensors():
    return cases.read_all(cases.DIFFUSERS / "transformer" / cases.WEIGHTS)


@pytest.fixture(scope="module")
def expected():
    return cases.leaves_of(convert.load_dit(cases.NATIVE))


def same(path, expected, load=convert.load_dit):
    leaves = cases.leaves_of(load(path))
    assert leaves.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(leaves[name], leaf, err_msg=name)


def write(folder, names, tensors):
    """Write tensors to the files of the given names, and an index if one of them is one."""
    parts = [name for name in names if not name.endswith(".json")]
    weight_map = {key: parts[i % len(parts)] for i, key in enumerate(tensors)}
    for part in parts:
        inside = {key: tensors[key] for key in tensors if weight_map[key] == part}
        if part.endswith(".bin"):
            write_pth(folder / part, inside)
        else:
            cases.write_all(folder, inside, stem=part.removesuffix(".safetensors"))
    for name in set(names) - set(parts):
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FOLDERS = [
    [f"{STEM}.fp16.safetensors"],
    [f"{STEM}.bf16.safetensors"],
    [f"{STEM}.bin"],
    [f"{STEM}.fp16.bin"],
    ["model.safetensors"],
    ["pytorch_model.bin"],
    [f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"],
    [f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors"],
    [*(f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)), f"{STEM}.safetensors.index.fp16.json"],
    [*(f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)), f"{STEM}.safetensors.index.fp16.json"],
    [*(f"{STEM}-0000{i}-of-00003.bin" for i in (1, 2, 3)), f"{STEM}.bin.index.json"],
    [f"{STEM}-0000{i}-of-00003.bin" for i in (1, 2, 3)],
]


@pytest.mark.parametrize("names", FOLDERS, ids=lambda names: names[-1])
def test_names_that_savers_give(names, tensors, expected, tmp_path):
    folder = tmp_path / "transformer"
    write(folder, names, tensors)
    shutil.copy(cases.DIFFUSERS / "transformer" / "config.json", folder)
    for path in (tmp_path, folder):
        same(path, expected)
    if len(names) > 2:
        (folder / names[1]).unlink()
        with pytest.raises(UserError, match=rf"{re.escape(names[1])}: this shard is .*missing"):
            convert.load_dit(tmp_path)


def test_the_plain_name_goes_before_variants_and_safetensors_before_bin(tensors, expected, tmp_path):
    folder = tmp_path / "transformer"
    other = {key: array + 1 for key, array in tensors.items()}
    for names in ([f"{STEM}.fp16.safetensors"], [f"{STEM}.bin"], [f"{STEM}.non_ema.safetensors"]):
        write(folder, names, other)
    write(folder, [f"{STEM}.safetensors"], tensors)
    shutil.copy(cases.DIFFUSERS / "transformer" / "config.json", folder)
    same(tmp_path, expected)


def hub(tmp_path, *names, main=None):
    model = tmp_path / "models--Wan-AI--Wan2.1"
    for i, name in enumerate(names):
        cases.copy(cases.DIFFUSERS, model / "snapshots" / name)
        edited = {key: array * (i + 1) for key, array in cases.read_all(cases.DIFFUSERS / PART).items()}
        cases.write_all(model / "snapshots" / name / "transformer", edited)
    (model / "blobs").mkdir(parents=True)
    if main:
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(main)
    return model


def test_the_hubs_cache_gives_the_snapshot_that_main_names(expected, tmp_path):
    model = hub(tmp_path, "aaaa", "bbbb", main="bbbb")
    for path in (model, model / "snapshots"):
        same(path, {name: leaf * 2 for name, leaf in expected.items()})
    (model / "refs" / "main").unlink()
    with pytest.raises(UserError, match="refs/main names no snapshot, and there are aaaa, bbbb"):
        convert.load_dit(model)
    shutil.rmtree(model / "snapshots" / "bbbb")
    same(model, expected)
    (model / "refs" / "main").write_text("cccc\n")
    with pytest.raises(UserError, match=r"the download is incomplete: .*cccc is not there"):
        convert.load_dit(model)
    (model / "refs" / "main").write_text("aaaa\n")
    with pytest.raises(UserError, match=r"did you mean '.*models--Wan-AI--Wan2\.1'"):
        convert.load_dit(tmp_path)


def comfy(folder, tensors):
    cases.write_all(folder / "diffusion_models", cases.read_all(cases.NATIVE / cases.WEIGHTS), stem="wan2.1_t2v_fp32")
    vae = cases.random_tensors(vae_rules.native_rules(TINY_VAE), WAN_VAE, TINY_VAE)
    cases.write_all(folder / "vae", vae, stem="wan_2.1_vae")
    t5 = cases.random_tensors(umt5_rules.diffusers_rules(TINY_T5), UMT5, TINY_T5)
    t5["spiece_model"] = np.frombuffer(cases.spiece_model(), np.uint8)
    cases.write_all(folder / "text_encoders", t5, stem="umt5_xxl")
    clip = {"text_model.embeddings.token_embedding.weight": np.ones((3, 4), np.float32)}
    cases.write_all(folder / "text_encoders", clip, stem="clip_l")
    return vae, t5


def test_comfyuis_folders(tensors, tmp_path):
    vae, t5 = comfy(tmp_path, tensors)
    # A file without config.json has heads of 64 at least, which the fixture's are not: it says so, by its name.
    with pytest.raises(UserError, match=r"wan2\.1_t2v_fp32\.safetensors: the number of heads cannot be told"):
        convert.load_dit(tmp_path)
    shutil.copy(cases.NATIVE / "config.json", tmp_path / "diffusion_models")
    same(tmp_path, cases.leaves_of(convert.load_dit(cases.NATIVE)))
    np.testing.assert_array_equal(cases.leaves_of(convert.load_vae(tmp_path))["conv1.bias"], vae["conv1.bias"])
    embedding = cases.leaves_of(convert.load_umt5(tmp_path))["token_embedding.embedding"]
    np.testing.assert_array_equal(embedding, t5["shared.weight"])
    ids = convert.load_tokenizer(tmp_path)(["ab a", "b"])[0]
    np.testing.assert_array_equal(ids[:, :4], [[4, 3, 1, 0], [5, 1, 0, 0]])
    file = tmp_path / "text_encoders" / "umt5_xxl.safetensors"
    np.testing.assert_array_equal(convert.load_tokenizer(file)(["ab a", "b"])[0], ids)
    with pytest.raises(UserError, match="no tokenizer"):
        convert.load_tokenizer(tmp_path / "vae" / "wan_2.1_vae.safetensors")
    expert = tmp_path / "expert" / "unet"
    shutil.copytree(tmp_path / "diffusion_models", expert)
    (expert / "wan2.1_t2v_fp32.safetensors").rename(expert / "wan2.2_t2v_low_noise.safetensors")
    with pytest.raises(UserError, match=r"wan2\.2_t2v_low_noise\.safetensors: is of Wan2\.2 A14B"):
        convert.load_dit(tmp_path / "expert")
    cases.write_all(tmp_path / "text_encoders", t5, stem="umt5_other")
    with pytest.raises(UserError, match=r"several files hold a umT5 .*: umt5_other\.safetensors, umt5_xxl"):
        convert.load_umt5(tmp_path)


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path):
    (tmp_path / "spiece.model").write_bytes(cases.spiece_model())
    tokenizer = convert.load_tokenizer(tmp_path)
    ids = tokenizer(["ab a"])[0]
    np.testing.assert_array_equal(ids[0, :4], [4, 3, 1, 0])
    tokenizer.save(tmp_path / "out")
    np.testing.assert_array_equal(Tokenizer.from_path(tmp_path / "out")(["ab a"])[0], ids)
    for damaged in (b"\x00", b"not one", cases.spiece_model()[:40], b"", cases.spiece_model(end="<eos>")):
        (tmp_path / "spiece.model").write_bytes(damaged)
        with pytest.raises(UserError, match=r"spiece\.model: no(t umT5's tokenizer| SentencePiece model)"):
            convert.load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("config", [True, False])
def test_the_tied_embedding_of_umt5_under_another_key(key, config, tmp_path):
    tensors = cases.random_tensors(umt5_rules.diffusers_rules(TINY_T5), UMT5, TINY_T5)
    part = tmp_path / "text_encoder"
    cases.write_all(part, tensors, stem="model")
    if config:
        (part / "config.json").write_text(json.dumps(umt5_rules.config_to_diffusers(TINY_T5)))
    path = part if config else part / "model.safetensors"
    expected = cases.leaves_of(convert.load_umt5(path))
    tensors[key] = tensors.pop("shared.weight")
    cases.write_all(part, tensors, stem="model")
    same(path, expected, convert.load_umt5)
    tensors["shared.weight"], tensors[key] = tensors[key], tensors[key] + 1  # the first is what counts
    whole = tensors | {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((8, 8), np.float32)}
    whole |= {"lm_head.weight": np.ones((32, 8), np.float32), "decoder.final_layer_norm.weight": np.ones(8, np.float32)}
    cases.write_all(part, whole, stem="model")
    same(path, expected, convert.load_umt5)


def wan22(folder, kind):
    if kind == "native":
        for name in ("high_noise_model", "low_noise_model"):
            cases.copy(cases.NATIVE, folder / name)
        return [folder, folder / "high_noise_model", folder / "low_noise_model" / cases.WEIGHTS]
    if kind == "file":
        path = folder / "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
        folder.mkdir()
        shutil.copy(cases.NATIVE / cases.WEIGHTS, path)
        shutil.copy(cases.NATIVE / "config.json", folder)
        return [path]
    cases.copy(cases.DIFFUSERS, folder)
    entries = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    if kind == "diffusers":
        cases.copy(folder / "transformer", folder / "transformer_2")
        entries["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    if kind == "second not downloaded":
        entries |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    if kind == "without index":
        cases.copy(folder / "transformer", folder / "transformer_2")
        (folder / "model_index.json").unlink(missing_ok=True)
    else:
        (folder / "model_index.json").write_text(json.dumps(entries))
    return [folder, folder / "transformer", folder / "transformer" / cases.WEIGHTS]


@pytest.mark.parametrize("kind", ["diffusers", "second not downloaded", "without index", "native", "file"])
def test_both_experts_of_wan22_are_refused(kind, tmp_path):
    loaders = (convert.load_dit, convert.find_components, convert.open_interpolator_of)
    loaders += (convert.load_vae, convert.load_umt5, convert.load_tokenizer)
    for path in wan22(tmp_path / "model", kind):
        for load in loaders:
            with pytest.raises(UserError, match=r"is of Wan2\.2 A14B, which has two experts.*Wan2\.1 is what"):
                load(path)


def test_wan21_as_a_newer_diffusers_saves_it(expected, tmp_path):
    folder = cases.copy(cases.DIFFUSERS, tmp_path / "model")
    entries = {"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None}
    (folder / "model_index.json").write_text(json.dumps(entries))
    same(folder, expected)
    same(folder / "transformer", expected)

"""The wanted network among a file's tensors: whatever wraps its keys, beside others, beside what is no tensor."""

import argparse
import random
import shutil

import convert_cases as cases
import ml_dtypes
import numpy as np
import pytest
from pth_cases import write_pth

from avd_jax import convert, errors
from avd_jax.convert import umt5_rules, vae_rules
from avd_jax.convert.architectures import INTERPOLATOR, UMT5, WAN_DIT, WAN_VAE
from avd_jax.convert.interpolator_rules import PREFIX
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError
from avd_jax.models.interpolator import InterpolatorConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.wan_vae import WanVAEConfig

TINY_VAE = WanVAEConfig(base_dim=4)
TINY_T5 = UMT5Config(vocab_size=32, dim=8, ffn_dim=12, num_heads=2, head_dim=4, num_layers=2)
TINY_INTERPOLATOR = InterpolatorConfig(channels=4, widths=(8, 12, 16))


@pytest.fixture(scope="module")
def native():
    return cases.read_all(cases.NATIVE / cases.WEIGHTS)


@pytest.fixture(scope="module")
def expected():
    return cases.leaves_of(convert.load_dit(cases.NATIVE))


def file_of(tensors, folder):
    """Write a single file beside the fixture's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    cases.write_all(folder, tensors)
    shutil.copy(cases.NATIVE / "config.json", folder)
    return folder / cases.WEIGHTS


def pth_of(content, folder):
    path = write_pth(folder / "model.pth", content)
    shutil.copy(cases.NATIVE / "config.json", folder)
    return path


def same(leaves, expected, factor=1.0):
    assert leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(leaves[path], leaf * factor, err_msg=path)


PREFIXES = [
    *("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.", "net.", "model.", "pipe.dit."),
    *("diffusion_model.", "model.diffusion_model.", "module._orig_mod.model._fsdp_wrapped_module.", "student.wrapped."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_whatever_stands_before_all_keys(prefix, native, expected, tmp_path):
    path = file_of({prefix + key: array for key, array in native.items()}, tmp_path)
    same(cases.leaves_of(convert.load_dit(path)), expected)
    path = pth_of({"generator": {prefix + key: array for key, array in native.items()}}, tmp_path)
    same(cases.leaves_of(convert.load_dit(path)), expected)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"])
def test_a_wrapper_once_a_block(wrapper, native, expected, tmp_path):
    wrapped = {}
    for key, array in native.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            parts[2:2] = [wrapper, "_checkpoint_wrapped_module"]
        wrapped[".".join(["model", wrapper, *parts])] = array
    same(cases.leaves_of(convert.load_dit(file_of(wrapped, tmp_path))), expected)


def test_diffusers_keys_behind_a_prefix(expected, tmp_path):
    tensors = cases.read_all(cases.DIFFUSERS / "transformer" / cases.WEIGHTS)
    path = file_of({f"module.transformer.{key}": array for key, array in tensors.items()}, tmp_path)
    same(cases.leaves_of(convert.load_dit(path)), expected)


def doubled(tensors, factor):
    return {key: array * np.float32(factor) for key, array in tensors.items()}


GROUPS = {
    "nested": lambda ema, critic: {"generator_ema": ema, "critic": critic},
    "behind a prefix": lambda ema, critic: {
        "generator_ema": {f"model.{key}": array for key, array in ema.items()},
        "critic": {f"model.{key}": array for key, array in critic.items()},
    },
    "nested deeper": lambda ema, critic: {"state_dict": {"generator_ema": ema, "critic": critic}, "epoch": 3},
    "flat": lambda ema, critic: (
        {f"generator_ema.{key}": array for key, array in ema.items()}
        | {f"critic.{key}": array for key, array in critic.items()}
    ),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_several_networks_are_chosen_by_name(groups, native, expected, tmp_path):
    content = GROUPS[groups](doubled(native, 2), doubled(native, 4))
    paths = [pth_of(content, tmp_path / "pth")]
    if groups == "flat":
        paths.append(file_of(content, tmp_path / "safetensors"))
    for path in paths:
        same(cases.leaves_of(convert.load_dit(path, key="generator_ema")), expected, 2)
        same(cases.leaves_of(convert.load_dit(path, key="critic")), expected, 4)
        for key in ("generator", "crtic"):
            with pytest.raises(UserError) as caught:
                convert.load_dit(path, key=key)
            assert all(part in str(caught.value) for part in (str(path), "generator_ema", "critic", "--which"))


@pytest.mark.parametrize(
    "group", ["generator_ema", "generator", "critic", "model", "state_dict", "module", "net", "ema"]
)
def test_the_only_network_needs_no_name(group, native, expected, tmp_path):
    path = pth_of({group: native, "optimizer": {"state": {0: {"exp_avg": native["head.head.weight"]}}}}, tmp_path)
    same(cases.leaves_of(convert.load_dit(path)), expected)
    same(cases.leaves_of(convert.load_dit(path, key=group)), expected)
    with pytest.raises(UserError, match="holds no 'other'"):
        convert.load_dit(path, key="other")


def test_the_generator_goes_before_its_critic(native, expected, tmp_path):
    path = pth_of({"critic": doubled(native, 4), "generator": native}, tmp_path)
    same(cases.leaves_of(convert.load_dit(path)), expected)
    same(cases.leaves_of(convert.load_dit(path, key="critic")), expected, 4)


def test_the_interpolator_is_that_of_the_chosen_student(native, tmp_path):
    own = cases.random_tensors(INTERPOLATOR.native_rules(TINY_INTERPOLATOR), INTERPOLATOR, TINY_INTERPOLATOR)
    groups = {}
    for name, factor in (("generator_ema", 2), ("critic", 4)):
        student = {f"model.{key}": array for key, array in native.items()}
        groups[name] = student | {PREFIX + key: array for key, array in doubled(own, factor).items()}
    path = pth_of(groups, tmp_path)
    for name, factor in (("generator_ema", 2), ("critic", 4)):
        kernel = convert.open_interpolator_of(path, key=name).array("out_conv.kernel")
        np.testing.assert_array_equal(kernel.T.reshape(-1), own["out_conv.weight"].reshape(-1) * factor)


def test_all_parts_in_one_file(native, expected, tmp_path):
    """As ComfyUI's checkpoints are: each part behind a prefix of its own."""
    vae = cases.random_tensors(vae_rules.native_rules(TINY_VAE), WAN_VAE, TINY_VAE)
    t5 = cases.random_tensors(umt5_rules.diffusers_rules(TINY_T5), UMT5, TINY_T5)
    tensors = {f"model.diffusion_model.{key}": array for key, array in native.items()}
    tensors |= {f"vae.{key}": array for key, array in vae.items()}
    tensors |= {f"text_encoders.umt5xxl.transformer.{key}": array for key, array in t5.items()}
    tensors["text_encoders.umt5xxl.logit_scale"] = np.float32(1).reshape(())
    path = file_of(tensors, tmp_path)
    same(cases.leaves_of(convert.load_dit(path)), expected)
    np.testing.assert_array_equal(cases.leaves_of(convert.load_vae(path))["conv1.bias"], vae["conv1.bias"])
    with pytest.raises(UserError, match=r"holds a .*, not a frame interpolator"):
        convert.load_interpolator(path)


class Evil:
    """Pickles as a call that leaves evidence."""

    def __init__(self, evidence):
        self.evidence = evidence

    def __reduce__(self):
        return shutil.rmtree, (str(self.evidence),)


def test_tensors_are_loaded_past_whatever_lies_beside_them(native, expected, tmp_path):
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    strays = {
        "loss": np.float64(0.25),
        "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(name="a")),
        "rng": np.arange(9, dtype=np.uint8),
        "python_rng": random.getstate(),
        "numpy_rng": np.random.default_rng(0),
        "optimizer": {"state": {0: {"exp_avg": native["head.head.weight"], "step": 3}}, "param_groups": [{"lr": 1.0}]},
        "history": [1, {2, 3}, complex(1, 2)],
        "path": tmp_path,
        "evil": Evil(evidence),
    }
    for name, content in (("group", {"generator": native} | strays), ("bare", native | strays)):
        same(cases.leaves_of(convert.load_dit(pth_of(content, tmp_path / name))), expected)
    assert evidence.is_dir()


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_plain_float8_is_the_rounded_values(dtype, native, tmp_path):
    rounded = {key: array.astype(dtype) if array.ndim == 2 else array for key, array in native.items()}
    plain = file_of({key: array.astype(np.float32) for key, array in rounded.items()}, tmp_path / "plain")
    expected = cases.leaves_of(convert.load_dit(plain))
    same(cases.leaves_of(convert.load_dit(file_of(rounded, tmp_path / "float8"))), expected)
    same(cases.leaves_of(convert.load_dit(pth_of(rounded, tmp_path / "pth"))), expected)
    convert.export_dit(tmp_path / "float8", tmp_path / "out", layout="native")
    for key, array in cases.read_all(tmp_path / "out" / cases.WEIGHTS).items():
        np.testing.assert_array_equal(array.astype(np.float32), rounded[key].astype(np.float32))


def scaled(tensors, scale_key, shape):
    """Return tensors as ComfyUI stores them, and what they stand for."""
    stored, meant = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, {}
    for i, (key, array) in enumerate(tensors.items()):
        if array.ndim != 2 or not key.endswith(".weight"):
            stored[key] = meant[key] = array
            continue
        scale = np.full({"scalar": (), "one": (1,), "row": array.shape[:1]}[shape], 1 / (i + 3), np.float32)
        scale = scale * np.linspace(1, 2, scale.size, dtype=np.float32).reshape(scale.shape)
        stored[key] = array.astype(ml_dtypes.float8_e4m3fn)
        stored[key.removesuffix("weight") + scale_key] = scale
        stored[key.removesuffix("weight") + "scale_input"] = np.ones(1, np.float32)
        meant[key] = stored[key].astype(np.float32) * (scale[:, None] if shape == "row" else scale.reshape(()))
    return stored, meant


@pytest.mark.parametrize("shape", ["scalar", "one", "row"])
@pytest.mark.parametrize("scale_key", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_multiplied_out(scale_key, shape, native, tmp_path):
    stored, meant = scaled(native, scale_key, shape)
    expected = cases.leaves_of(convert.load_dit(file_of(meant, tmp_path / "meant")))
    same(cases.leaves_of(convert.load_dit(file_of(stored, tmp_path / "stored"))), expected)
    prefixed = {f"model.diffusion_model.{key}": array for key, array in stored.items()}
    same(cases.leaves_of(convert.load_dit(file_of(prefixed, tmp_path / "prefixed"))), expected)
    t5 = cases.random_tensors(umt5_rules.diffusers_rules(TINY_T5), UMT5, TINY_T5)
    stored, meant = scaled(t5, scale_key, shape)
    names = {}
    for name, tensors in (("stored", stored), ("meant", meant)):
        cases.write_all(tmp_path / name, tensors, stem="umt5")
        names[name] = cases.leaves_of(convert.load_umt5(tmp_path / name / "umt5.safetensors"))
    same(names["stored"], names["meant"])


def test_a_scale_a_block_is_refused(native, tmp_path):
    stored, _ = scaled(native, "scale_weight", "scalar")
    stored["head.head.scale_weight"] = np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match=r"head\.head\.scale_weight has shape \(2, 3\)"):
        convert.load_dit(file_of(stored, tmp_path))


def test_whole_numbers_are_refused_as_quantised(native, tmp_path):
    quantised = native | {"head.head.weight": np.ones(native["head.head.weight"].shape, np.int8)}
    with pytest.raises(UserError, match=r"is quantised .*head\.head\.weight is int8"):
        convert.load_dit(file_of(quantised, tmp_path))


LORA_KEYS = [
    ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "diffusion_model.blocks.0.self_attn.q.lora_up.weight"),
    ("blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"),
    ("transformer.blocks.0.attn1.to_q.lora_A.default.weight", "transformer.blocks.0.attn1.to_q.lora_B.default.weight"),
    ("base_model.model.blocks.0.self_attn.q.lora_A.weight", "base_model.model.blocks.0.self_attn.q.lora_B.weight"),
    ("blocks.0.attn1.to_q.lora.down.weight", "blocks.0.attn1.to_q.lora.up.weight"),
    ("blocks.0.attn1.processor.to_q_lora.down.weight", "blocks.0.attn1.processor.to_q_lora.up.weight"),
    ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.alpha"),
    ("lycoris_blocks_0_self_attn_q.lokr_w1", "lycoris_blocks_0_self_attn_q.lokr_w2_a"),
    ("blocks.0.self_attn.q.hada_w1_a", "blocks.0.self_attn.q.hada_w1_b"),
    ("blocks.0.self_attn.q.oft_blocks", "blocks.0.self_attn.q.alpha"),
    ("diffusion_model.blocks.0.self_attn.q.diff", "diffusion_model.blocks.0.self_attn.q.diff_b"),
]


@pytest.mark.parametrize("keys", LORA_KEYS, ids=lambda keys: keys[0])
def test_a_lora_in_every_spelling(keys, native, tmp_path):
    adapter = {key: np.ones((4, 4), np.float32) for key in keys}
    for path in (
        file_of(adapter, tmp_path / "a"),
        pth_of(adapter, tmp_path / "b"),
        file_of(native | adapter, tmp_path / "with its base"),
    ):
        for load in (convert.load_dit, convert.load_umt5, convert.find_components):
            with pytest.raises(UserError) as caught:
                load(path)
            assert str(caught.value).startswith(f"{path}: is a LoRA (")
            assert "give its base model here, and the LoRA as --lora" in str(caught.value)


def causal(folder, native, how):
    if how == "config":
        path = file_of(native, folder)
        config = cases.NATIVE / "config.json"
        (folder / "config.json").write_text(config.read_text().replace("WanModel", "CausalWanModel"))
        return path
    if how == "settings":
        return pth_of({"generator": native, "config": {"num_frame_per_block": 3}}, folder)
    if how == "arguments":
        return pth_of({"generator": native, "args": argparse.Namespace(generator_name="causal_wan")}, folder)
    return file_of(native, folder / "Self-Forcing")


@pytest.mark.parametrize("how", ["config", "settings", "arguments", "name"])
def test_a_causal_student_is_noted_in_one_line(how, native, expected, tmp_path, capsys):
    path = causal(tmp_path / "a", native, how)
    for _ in range(2):
        same(cases.leaves_of(convert.load_dit(path)), expected)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"note: {path}: looks like a causal student")
    assert said.out == ""


def test_other_weights_are_not_noted(native, tmp_path, capsys):
    open_weights(file_of(native, tmp_path / "causvid_bidirectional"), WAN_DIT)
    open_weights(cases.NATIVE, WAN_DIT)
    assert capsys.readouterr().err == ""
    assert errors.note("once") is errors.note("once") is None

"""CLIP and DINO from every form of file, and what other files are told."""

import json

import convert_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
from pth_cases import write_pth

from avd_jax import convert
from avd_jax.convert.architectures import CLIP_VIT, DINO_VIT
from avd_jax.convert.engine import resolve, tensors_to_torch
from avd_jax.convert.pth import PthFile
from avd_jax.errors import UserError
from avd_jax.models.vit import ViTConfig

CLIP = ViTConfig(image_size=16, patch_size=8, dim=64, num_layers=2, num_heads=1, mlp_dim=24, projection_dim=12)
DINO = ViTConfig(
    image_size=16, patch_size=8, dim=64, num_layers=2, num_heads=1, mlp_dim=24, projection_dim=0, clip=False,
    activation="gelu", eps=1e-6,
)  # fmt: skip
CONFIGS = {CLIP_VIT: CLIP, DINO_VIT: DINO}
TEXT = {"text_model.encoder.layers.0.layer_norm1.bias": np.ones(8, np.float32), "logit_scale": np.float32(1)}
CLIP_JSON = {
    "model_type": "clip",
    "projection_dim": 12,
    "vision_config": {
        "image_size": 16, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
        "intermediate_size": 24,
    },
}  # fmt: skip


def table(architecture, form):
    return (architecture.native_rules if form == "native" else architecture.diffusers_rules)(CONFIGS[architecture])


def tensors(architecture, form="native"):
    """Return the same random model under either set of keys."""
    rng = np.random.default_rng(0)
    shapes = architecture.leaves(CONFIGS[architecture]).items()
    leaves = {path: rng.standard_normal(leaf.shape, dtype=np.float32) for path, leaf in shapes}
    return leaves, dict(tensors_to_torch(table(architecture, form), leaves.items()))


def same(module, leaves):
    loaded = cases.leaves_of(module)
    assert loaded.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def huggingface_clip(folder, entries=CLIP_JSON):
    leaves, keys = tensors(CLIP_VIT, "huggingface")
    cases.write_all(folder, keys | TEXT, stem="model")
    (folder / "config.json").write_text(json.dumps(entries))
    return leaves


def test_clip_of_transformers(tmp_path):
    leaves = huggingface_clip(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        module = convert.load_vit(path)
        assert module.config == CLIP
        same(module, leaves)


def test_the_activation_is_the_configs(tmp_path):
    huggingface_clip(tmp_path, CLIP_JSON | {"vision_config": CLIP_JSON["vision_config"] | {"hidden_act": "gelu"}})
    assert convert.load_vit(tmp_path).config.activation == "gelu"
    (tmp_path / "config.json").unlink()
    assert convert.load_vit(tmp_path).config == CLIP


@pytest.mark.parametrize("architecture", CONFIGS, ids=lambda architecture: architecture.name)
@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_both_sets_of_keys_in_a_pth(architecture, form, tmp_path):
    leaves, keys = tensors(architecture, form)
    module = convert.load_vit(write_pth(tmp_path / "weights.pth", keys))
    assert module.config == CONFIGS[architecture]
    same(module, leaves)


def test_queries_keys_and_values_are_parts_of_one_matrix():
    _, native = tensors(DINO_VIT)
    leaves, apart = tensors(DINO_VIT, "huggingface")
    rows = [apart[f"encoder.layer.1.attention.attention.{name}.weight"] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(np.concatenate(rows), native["blocks.1.attn.qkv.weight"])
    np.testing.assert_array_equal(leaves["blocks.attn.qkv.kernel"][1, 2, :, 0], rows[2].T)


def test_a_torchscript_archive_is_read_without_its_code():
    path = cases.FIXTURES / "clip_script.pt"
    module = convert.load_vit(path, jnp.float16)
    assert (module.config.dim, module.config.num_layers, module.config.projection_dim) == (64, 1, 8)
    file = PthFile(path).state_dict()
    assert "transformer.resblocks.0.attn.in_proj_weight" in file.leaves, "the text tower"
    weight = file.read("visual.transformer.resblocks.0.mlp.c_fc.weight")
    np.testing.assert_array_equal(cases.leaves_of(module)["blocks.mlp.fc1.kernel"][0], weight.T)
    assert np.std(weight) > 0.05


def test_dinos_whole_checkpoint_gives_its_teacher(tmp_path):
    leaves, keys = tensors(DINO_VIT)
    states = {
        "student": {f"module.backbone.{key}": value + 1 for key, value in keys.items()},
        "teacher": {f"backbone.{key}": value for key, value in keys.items()} | {"head.last_layer.weight": np.ones(3)},
    }
    same(convert.load_vit(write_pth(tmp_path / "full.pth", states)), leaves)


def without(keys, name):
    return {key: value for key, value in keys.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys | {"blocks.0.ls1.gamma": np.ones(64, np.float32)}, "holds a DINOv2, not CLIP's or DINO's"),
        (lambda keys: keys | {"classifier.weight": np.ones((5, 64), np.float32)}, "holds a ViT trained to name"),
        (lambda keys: keys | {"head.weight": np.ones((5, 64), np.float32)}, "not known: head.weight"),
        (lambda keys: without(keys, "blocks.1.attn.qkv.bias"), "missing: blocks.1.attn.qkv.bias"),
        (lambda keys: without(keys, "pos_embed"), "no 'pos_embed' in it"),
        (lambda keys: {"some.weight": np.ones((5, 64), np.float32)}, "holds other weights, not CLIP's or DINO's"),
        (lambda keys: {f"visual.layer1.{i}.weight": np.ones(3, np.float32) for i in range(9)}, "a CLIP with a ResNet"),
        (lambda keys: {key: value[..., :60] if value.shape[-1] == 64 else value for key, value in keys.items()}, "."),
    ],
)
def test_other_weights(change, message, tmp_path):
    _, keys = tensors(DINO_VIT)
    path = write_pth(tmp_path / "weights.pth", change(keys))
    with pytest.raises(UserError, match=message) as error:
        convert.load_vit(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_weights_of_a_video_model():
    with pytest.raises(UserError, match="holds a diffusion transformer, not CLIP's or DINO's"):
        convert.load_vit(cases.NATIVE)
    path = cases.FIXTURES / "clip_script.pt"
    with pytest.raises(UserError, match="holds a CLIP, not a diffusion transformer"):
        convert.load_dit(path)


def test_a_truncated_file(tmp_path):
    huggingface_clip(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        convert.load_vit(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        convert.load_vit(path)


def test_a_config_of_another_model(tmp_path):
    huggingface_clip(tmp_path, {"model_type": "siglip"})
    with pytest.raises(UserError, match=r"config\.json: model_type is 'siglip', expected 'clip'"):
        convert.load_vit(tmp_path)
    huggingface_clip(tmp_path, CLIP_JSON | {"vision_config": {"hidden_size": "wide"}})
    with pytest.raises(UserError, match=r"config\.json: the field 'hidden_size' is 'wide'"):
        convert.load_vit(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        convert.load_vit(tmp_path / "gone")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        convert.load_vit(tmp_path)


def test_open_clip_does_not_tell_its_activation(tmp_path):
    _, keys = tensors(CLIP_VIT)
    path = write_pth(tmp_path / "open_clip_pytorch_model.bin", keys)
    with pytest.raises(UserError, match="does not say which activation"):
        convert.load_vit(path)


def test_every_key_is_in_one_rule():
    for architecture in CONFIGS:
        leaves = architecture.leaves(CONFIGS[architecture])
        for form in ("native", "huggingface"):
            shapes = {key: value.shape for key, value in tensors(architecture, form)[1].items()}
            assert resolve(table(architecture, form), shapes, leaves, name="test").keys() == leaves.keys()

"""The vision transformers against transformers and against the originals' forms in PyTorch, live."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from vit_torch import Clip, Dino, randomise

from avd_jax import convert
from avd_jax.convert.architectures import CLIP_VIT, DINO_VIT
from avd_jax.convert.engine import source_shapes
from avd_jax.models import vit_images
from avd_jax.models.vit import CLIP_B_32, CLIP_L_14, DINO_B_16, VIT_MODELS

LAYERS = 2
CLIPS = {"L/14": CLIP_L_14, "B/32": CLIP_B_32}


def huggingface(config, layers=LAYERS, **options):
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.dim,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        **options,
    }


def original(config, layers=LAYERS):
    sizes = {"image_size": config.image_size, "patch_size": config.patch_size, "dim": config.dim, "layers": layers}
    sizes |= {"heads": config.num_heads, "mlp_dim": config.mlp_dim}
    return sizes | ({"out": config.projection_dim} if config.clip else {})


def images(height=224, width=224, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def error(path, pixels, expected):
    ours = convert.load_vit(path)(pixels.permute(0, 2, 3, 1).numpy())
    expected = expected.numpy()
    assert ours.shape == expected.shape
    return np.abs(np.asarray(ours) - expected).max() / np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("config", CLIPS.values(), ids=CLIPS.keys())
@torch.no_grad()
def test_clip_of_transformers(config, tmp_path):
    sizes = transformers.CLIPVisionConfig(**huggingface(config, projection_dim=config.projection_dim))
    model = randomise(transformers.CLIPVisionModelWithProjection(sizes))
    model.save_pretrained(tmp_path)
    loaded = convert.load_vit(tmp_path).config
    assert loaded == dataclasses.replace(config, num_layers=LAYERS)
    assert error(tmp_path, images(), model(images()).image_embeds) < 1e-4
    assert error(tmp_path / "model.safetensors", images(), model(images()).image_embeds) < 1e-4


@torch.no_grad()
def test_whole_clip_of_transformers_in_a_bin_file(tmp_path):
    vision = huggingface(CLIP_B_32, hidden_act="gelu")
    text = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 50}, projection_dim=512)
    model = randomise(transformers.CLIPModel(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    expected = model.visual_projection(model.vision_model(images()).pooler_output)
    assert convert.load_vit(tmp_path).config.activation == "gelu"
    assert error(tmp_path, images(), expected) < 1e-4


@torch.no_grad()
def test_dino_of_transformers(tmp_path):
    sizes = transformers.ViTConfig(**huggingface(DINO_B_16))
    model = randomise(transformers.ViTModel(sizes, add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    assert convert.load_vit(tmp_path).config == dataclasses.replace(DINO_B_16, num_layers=LAYERS, eps=1e-12)
    assert error(tmp_path, images(), model(images()).last_hidden_state[:, 0]) < 1e-4


@pytest.mark.parametrize("size", [(224, 224), (224, 398), (416, 224), (160, 96)], ids=str)
@torch.no_grad()
def test_dino_of_meta_at_any_size(size, tmp_path):
    model = randomise(Dino(**original(DINO_B_16)))
    torch.save(model.state_dict(), tmp_path / "dino_vitbase16_pretrain.pth")
    path = tmp_path / "dino_vitbase16_pretrain.pth"
    assert convert.load_vit(path).config == dataclasses.replace(DINO_B_16, num_layers=LAYERS)
    assert error(path, images(*size), model(images(*size))) < 1e-4


@torch.no_grad()
def test_dinos_whole_checkpoint_gives_its_teacher(tmp_path):
    sizes = original(dataclasses.replace(DINO_B_16, dim=64, num_heads=1, mlp_dim=32))
    student, teacher = randomise(Dino(**sizes), 1), randomise(Dino(**sizes), 2)
    states = {
        "student": {f"module.backbone.{key}": value for key, value in student.state_dict().items()},
        "teacher": {f"backbone.{key}": value for key, value in teacher.state_dict().items()},
        "epoch": 3,
    }
    torch.save(states, tmp_path / "checkpoint.pth")
    assert error(tmp_path / "checkpoint.pth", images(), teacher(images())) < 1e-4


@pytest.mark.parametrize("form", ["TorchScript", "state dict"])
@pytest.mark.parametrize("config", CLIPS.values(), ids=CLIPS.keys())
@torch.no_grad()
def test_clip_of_openai(config, form, tmp_path):
    model = randomise(Clip(**original(config)))
    path = tmp_path / "ViT.pt"
    if form == "TorchScript":
        torch.jit.trace(model, images(count=1)).half().save(str(path))  # as OpenAI's files are
        model.float()
    else:
        torch.save(model.state_dict(), path)
    assert convert.load_vit(path).config == dataclasses.replace(config, num_layers=LAYERS)
    assert error(path, images(), model(images())) < 1e-4


@pytest.mark.parametrize("name", VIT_MODELS)
def test_full_sizes(name):
    """Every key and shape of the whole models, of both spellings; nothing is allocated."""
    config = VIT_MODELS[name]
    architecture = CLIP_VIT if config.clip else DINO_VIT
    with torch.device("meta"):
        if config.clip:
            sizes = transformers.CLIPVisionConfig(
                **huggingface(config, config.num_layers, projection_dim=config.projection_dim)
            )
            theirs = transformers.CLIPVisionModelWithProjection(sizes)
            own = Clip(**original(config, config.num_layers)).visual
            own_prefix = "visual."
        else:
            sizes = transformers.ViTConfig(**huggingface(config, config.num_layers))
            theirs = transformers.ViTModel(sizes, add_pooling_layer=False)
            own, own_prefix = Dino(**original(config, config.num_layers)), ""
    leaves = architecture.leaves(config)
    native = dict(source_shapes(architecture.native_rules(config), leaves))
    assert native == {own_prefix + key: tuple(value.shape) for key, value in own.state_dict().items()}
    count = sum(np.prod(shape) for shape in dict(source_shapes(architecture.diffusers_rules(config), leaves)).values())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("size", [(720, 1280), (300, 224), (1024, 768), (224, 224), (90, 161)], ids=str)
def test_clips_preprocessing(size):
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = transformers.CLIPImageProcessor()(list(frames), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(vit_images.CLIP(frames).transpose(0, 3, 1, 2), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "mode"), [(vit_images.VBENCH_CLIP, "bicubic"), (vit_images.VBENCH_DINO, "bilinear")], ids=["CLIP", "DINO"]
)
@pytest.mark.parametrize(
    ("size", "scaled"), [((720, 1280), (224, 398)), ((640, 480), (298, 224)), ((99, 180), (224, 407))], ids=str
)
def test_vbenchs_preprocessing(ours, mode, size, scaled):
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    tensor = torch.tensor(frames).float().permute(0, 3, 1, 2)
    tensor = torch.nn.functional.interpolate(tensor, scaled, mode=mode, align_corners=False)  # as torchvision's Resize
    if ours.crop:
        top, left = (round((side - 224) / 2) for side in scaled)
        tensor = tensor[:, :, top : top + 224, left : left + 224]
    mean, std = (torch.tensor(value)[:, None, None] for value in (ours.mean, ours.std))
    expected = ((tensor / 255 - mean) / std).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours(frames), expected, atol=1e-4)

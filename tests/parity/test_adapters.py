"""LoRA files against diffusers and PEFT, live: ours in their pipeline, theirs in our loader."""

import diffusers
import numpy as np
import pytest
import torch
from test_wan_dit import inputs, relative_error, velocity_of

from avd_jax import convert
from avd_jax.convert.extraction import FULL

pytest.importorskip("peft")


def small_model(seed):
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, text_dim=24, ffn_dim=72, num_layers=2
    ).eval()


@pytest.fixture
def teacher(tmp_path):
    small_model(0).save_pretrained(tmp_path / "teacher" / "transformer")
    return tmp_path / "teacher"


def student_of(teacher, folder, *, linear_only=False):
    """Write a student whose parameters have changed, all of them or those of linear layers."""
    model = diffusers.WanTransformer3DModel.from_pretrained(teacher, subfolder="transformer")
    linear = {module for module in model.modules() if isinstance(module, torch.nn.Linear)}
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if module in linear or not linear_only:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "transformer")
    return model.eval()


def pipeline_of(teacher):
    transformer = diffusers.WanTransformer3DModel.from_pretrained(teacher, subfolder="transformer")
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def test_diffusers_loads_an_extracted_student_as_the_card_says(teacher, tmp_path):
    student = student_of(teacher, tmp_path / "student")
    convert.export_lora(
        tmp_path / "student", tmp_path / "lora", rank=FULL, style="diffusers", teacher=teacher, dtype=np.float32
    )
    card = (tmp_path / "lora" / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "lora"))
    pipeline = pipeline_of(teacher)
    exec(code, {"pipeline": pipeline})
    ours = convert.load_dit(teacher, lora=str(tmp_path / "lora"))(*inputs(1))
    assert relative_error(ours, velocity_of(pipeline.transformer, *inputs(1))) < 1e-4
    assert relative_error(ours, velocity_of(student, *inputs(1))) < 1e-4


@pytest.mark.parametrize("rank", [FULL, 8])
def test_diffusers_reads_the_file_for_comfyui_too(teacher, tmp_path, rank):
    """But for norms, modulation and the patch's convolution, which it passes over; so they do not change here."""
    student_of(teacher, tmp_path / "student", linear_only=True)
    convert.export_lora(
        tmp_path / "student", tmp_path / "lora", rank=rank, style="comfyui", teacher=teacher, dtype=np.float32
    )
    pipeline = pipeline_of(teacher)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=next((tmp_path / "lora").glob("*.safetensors")).name)
    ours = convert.load_dit(teacher, lora=str(tmp_path / "lora"))(*inputs(2))
    assert relative_error(ours, velocity_of(pipeline.transformer, *inputs(2))) < 1e-4
    unchanged = convert.load_dit(teacher)(*inputs(2))
    assert relative_error(unchanged, velocity_of(pipeline.transformer, *inputs(2))) > 1e-2


@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "to_out.0"], ["ffn.net.0.proj", "ffn.net.2", "proj_out"]])
def test_what_peft_trained_and_diffusers_saved(teacher, tmp_path, targets):
    """With an alpha that is not the rank, which diffusers writes into the file's metadata."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = pipeline_of(teacher)
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=targets))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    diffusers.WanPipeline.save_lora_weights(
        tmp_path / "saved",
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    ours = convert.load_dit(teacher, lora=str(tmp_path / "saved"))(*inputs(3))
    assert relative_error(ours, velocity_of(pipeline.transformer, *inputs(3))) < 1e-4
    assert relative_error(ours, convert.load_dit(teacher)(*inputs(3))) > 1e-2

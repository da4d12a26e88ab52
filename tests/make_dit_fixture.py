"""Make tests/fixtures/dit_*: a tiny random transformer, its velocity and gradients, from diffusers' implementation.

Needs the `parity` extra: python tests/make_dit_fixture.py
Writes dit_diffusers/transformer/ (as diffusers saves it), dit_native/ (the same tensors under Wan's keys, renamed by
the list here, not by the project's tables), and dit_golden.npz (arrays channels-last; gradients under Wan's keys).
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4, "freq_dim": 32}
TEXT_DIM, TEXT_LENGTHS = 16, (5, 8)

TO_WAN = (
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)


def wan_name(key: str) -> str:
    """Return Wan's name of one of diffusers' keys."""
    for pattern, name in TO_WAN:
        key = re.sub(pattern, name, key)
    return key


def main() -> None:
    """Write the fixtures."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=SIZES["num_heads"],
        attention_head_dim=SIZES["dim"] // SIZES["num_heads"],
        in_channels=SIZES["in_dim"],
        out_channels=SIZES["out_dim"],
        text_dim=TEXT_DIM,
        freq_dim=SIZES["freq_dim"],
        ffn_dim=SIZES["ffn_dim"],
        num_layers=SIZES["num_layers"],
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
            elif not name.endswith("scale_shift_table"):
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    model.save_pretrained(FIXTURES / "dit_diffusers" / "transformer")

    native = FIXTURES / "dit_native"
    native.mkdir(exist_ok=True)
    tensors = {wan_name(key): tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, native / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {"_class_name": "WanModel", "model_type": "t2v", "text_dim": TEXT_DIM, **SIZES}
    (native / "config.json").write_text(json.dumps(config | {"eps": 1e-6}, indent=2) + "\n")

    latents = torch.randn(2, SIZES["in_dim"], 3, 4, 6)
    timesteps = torch.tensor([757.0, 123.5])
    prompt_embeds = torch.zeros(2, 512, TEXT_DIM)  # Wan pads every text to 512 tokens, and attends to the padding
    for embeds, length in zip(prompt_embeds, TEXT_LENGTHS, strict=True):
        embeds[:length] = torch.randn(length, TEXT_DIM)
    velocity = model(latents, timesteps, prompt_embeds).sample
    velocity.square().mean().backward()
    np.savez(
        FIXTURES / "dit_golden.npz",
        latents=latents.movedim(1, -1).numpy(),
        timesteps=timesteps.numpy(),
        prompt_embeds=prompt_embeds[:, : max(TEXT_LENGTHS)].numpy(),
        velocity=velocity.detach().movedim(1, -1).numpy(),
        **{f"gradient:{wan_name(name)}": parameter.grad.numpy() for name, parameter in model.named_parameters()},
    )


if __name__ == "__main__":
    main()

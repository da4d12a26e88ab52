"""Make the golden files of the vision transformers; run in an environment with the `parity` extra.

    python tests/make_vit_fixture.py

`vit_golden.npz` holds a tiny random CLIPVisionModelWithProjection of transformers and a tiny DINO under the keys of its
authors' file, with pictures and what PyTorch makes of them, and a picture with what transformers' CLIPImageProcessor
makes of it. `clip_script.pt` is a TorchScript archive as OpenAI ships CLIP, in half precision.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from vit_torch import Clip, Dino, randomise

FIXTURES = Path(__file__).parent / "fixtures"


def channels_last(images):
    return images.permute(0, 2, 3, 1).numpy()


def weights(prefix, model):
    return {f"{prefix}/{key}": value.half().numpy() for key, value in model.state_dict().items()}


@torch.no_grad()
def main():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    clip = randomise(transformers.CLIPVisionModelWithProjection(config))
    dino = randomise(Dino(image_size=32, patch_size=8, dim=64, layers=2, heads=1, mlp_dim=24))
    small, square, wide = (torch.randn(2, 3, *size) for size in ((24, 24), (32, 32), (26, 44)))
    picture = np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    np.savez_compressed(
        FIXTURES / "vit_golden.npz",
        clip_config=json.dumps(config.to_dict(), default=str),
        clip_images=channels_last(small),
        clip_features=clip(small).image_embeds.numpy(),
        dino_square=channels_last(square),
        dino_square_features=dino(square).numpy(),
        dino_wide=channels_last(wide),
        dino_wide_features=dino(wide).numpy(),
        picture=picture,
        preprocessed=processor([picture], return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1),
        **weights("clip", clip),
        **weights("dino", dino),
    )
    script = randomise(Clip(image_size=16, patch_size=8, dim=64, layers=1, heads=1, mlp_dim=16, out=8))
    scripted = torch.jit.trace(script, torch.randn(1, 3, 16, 16)).half()
    scripted.save(str(FIXTURES / "clip_script.pt"))


if __name__ == "__main__":
    main()

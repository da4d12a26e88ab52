"""Tiny random models that score videos, in the files that users have."""

import dataclasses
from pathlib import Path

import numpy as np
from pth_cases import write_pth

from avd_jax.convert.aesthetic_head import LINEAR, AestheticHead
from avd_jax.convert.architectures import CLIP_VIT, DINO_VIT
from avd_jax.convert.engine import tensors_to_torch
from avd_jax.curation.features import CLIP_B, CLIP_L, DINO
from avd_jax.models.vit import ViTConfig

SIDE = 32
TINY_L = ViTConfig(
    image_size=SIDE, patch_size=8, dim=64, num_layers=1, num_heads=1, mlp_dim=16, projection_dim=12
)  # fmt: skip
TINY = {
    CLIP_L: TINY_L,
    CLIP_B: dataclasses.replace(TINY_L, patch_size=16, projection_dim=8),
    DINO: dataclasses.replace(TINY_L, projection_dim=0, clip=False, activation="gelu", eps=1e-6),
}
HEAD = AestheticHead(np.linspace(-1, 1, 12, dtype=np.float32), 5.0, LINEAR, "sa_0_4.pth")
_RAFT = Path(__file__).parent / "fixtures" / "raft_golden.npz"


def write_model(folder, name, config=None, seed=0):
    config = config or TINY[name]
    architecture = CLIP_VIT if config.clip else DINO_VIT
    rng = np.random.default_rng(seed)
    leaves = {
        path: (rng.standard_normal(leaf.shape) * 0.3).astype(np.float32)
        for path, leaf in architecture.leaves(config).items()
    }
    keys = dict(tensors_to_torch(architecture.native_rules(config), leaves.items()))
    return write_pth(folder / f"{name.replace('/', '-')}.pth", keys)


def write_head(folder):
    return write_pth(folder / "sa_0_4.pth", {"weight": HEAD.weight[None], "bias": np.full(1, HEAD.bias, np.float32)})


def write_raft(folder):
    golden = np.load(_RAFT)
    return write_pth(folder / "raft-things.pth", {key: golden[key] for key in golden if key.startswith("module.")})

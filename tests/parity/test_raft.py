"""RAFT against PyTorch, live."""

import jax
import numpy as np
import pytest
import torch
from raft_torch import Raft, padded, randomise

from avd_jax import convert
from avd_jax.models import raft
from avd_jax.models.raft import RAFTConfig

SIZES = {
    "widths": (16, 24, 32), "features": 32, "hidden": 24, "context": 20, "motion_widths": (32, 24, 20, 16),
    "motion": 28, "head": 36, "radius": 3,
}  # fmt: skip


def pictures(height, width, count=2):
    """Return pairs of which the second is the first moved, at a scale that the correlations see."""
    coarse = torch.rand(count, 3, height // 4 + 4, width // 4 + 4, generator=torch.Generator().manual_seed(4)) * 255
    fine = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(0, 255)
    return fine[:, :, :height, :width], fine[:, :, 3 : height + 3, 5 : width + 5]


def saved(model, path):
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, path)  # as the authors' files
    return path


def error(ours, theirs):
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize(("sizes", "steps"), [(SIZES, 20), ({}, 3)], ids=["small", "full"])
@torch.no_grad()
def test_flow(sizes, steps, tmp_path):
    model = randomise(Raft(**sizes))
    ours = convert.load_raft(saved(model, tmp_path / "raft-things.pth"))
    if not sizes:
        assert ours.config == RAFTConfig()
    first, second = pictures(128, 152)
    theirs = model(first, second, steps)
    moved = theirs.abs().mean()
    assert 0.3 < moved < 60, "else nothing is told of what is read between pixels, or beyond the edge"
    pair = [x.permute(0, 2, 3, 1).numpy() for x in (first, second)]
    assert error(jax.jit(lambda *pair: ours(*pair, steps))(*pair), theirs) < 1e-4


@torch.no_grad()
def test_each_encoder(tmp_path):
    model = randomise(Raft(**SIZES))
    ours = convert.load_raft(saved(model, tmp_path / "raft-things.pth"))
    first, _ = pictures(128, 136)
    for net in ("fnet", "cnet"):
        encoder = jax.jit(getattr(ours, net))
        assert error(encoder(first.permute(0, 2, 3, 1).numpy()), getattr(model, net)(first)) < 1e-5


@pytest.mark.parametrize("size", [(130, 131), (136, 135), (128, 136)], ids=str)
def test_padding(size):
    first, _ = pictures(*size)
    ours = raft.padded(first.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(ours, padded(first).permute(0, 2, 3, 1).numpy())

"""The networks of VBench's dimensions as functions of frames: what they are given, and in which parts."""

import numpy as np
import pytest
from flax import nnx

from avd_jax.evaluation.vbench import networks
from avd_jax.evaluation.vbench.measures import TooSmallError
from avd_jax.models import vit_images
from avd_jax.models.vit import CLIP_B_32, DINO_B_16


class Raft(nnx.Module):
    """Tells what it is given."""

    def __call__(self, first, second, steps):
        return (second - first)[..., :2] * steps


class Vit(nnx.Module):
    def __init__(self, config):
        self.config = config

    def __call__(self, images):
        return images.reshape(len(images), -1)


def test_flow_is_that_of_padded_frames():
    frames = np.random.default_rng(0).integers(0, 256, (2, 132, 121, 3), np.uint8)
    flow = networks.flow_of(Raft())(*frames)
    assert flow.shape == (136, 128, 2)
    first, second = frames.astype(np.float32)[..., :2]
    np.testing.assert_array_equal(flow[2:-2, 3:-4], (second - first) * 20)


@pytest.mark.parametrize("size", [(120, 300), (300, 64)])
def test_frames_that_raft_cannot_take(size):
    frame = np.zeros((*size, 3), np.uint8)
    with pytest.raises(TooSmallError, match=f"frames of {size[1]}x{size[0]} are too small for RAFT"):
        networks.flow_of(Raft())(frame, frame)


@pytest.mark.parametrize(
    ("config", "prepared"), [(CLIP_B_32, vit_images.VBENCH_CLIP), (DINO_B_16, vit_images.VBENCH_DINO)], ids=str
)
@pytest.mark.parametrize("count", [1, 5])
def test_features_are_those_of_vbenchs_pictures_in_any_number(config, prepared, count, monkeypatch):
    monkeypatch.setattr(networks, "BATCH", 2)
    frames = np.random.default_rng(0).integers(0, 256, (count, 60, 80, 3), np.uint8)
    features = networks.features_of(Vit(config))(frames)
    np.testing.assert_array_equal(features, prepared(frames).reshape(count, -1))

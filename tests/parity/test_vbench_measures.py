"""VBench's dimensions against PyTorch with random weights, in VBench's own steps: from a video's file to its row."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from raft_torch import Raft
from raft_torch import padded as padded_by_raft
from raft_torch import randomise as randomise_raft
from test_raft import SIZES
from torch.nn.functional import cosine_similarity, interpolate, linear, normalize
from vit_torch import Clip, Dino, randomise

from avd_jax import convert
from avd_jax.data.video import write_video
from avd_jax.evaluation.vbench import measures, networks
from avd_jax.models import vit_images

DIM = {"dim": 192, "layers": 2, "heads": 3, "mlp_dim": 256}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A picture that moves, and then others that have nothing in common with it."""
    rng = np.random.default_rng(0)
    picture = rng.uniform(-1, 1, (60, 60, 3)).repeat(4, 0).repeat(4, 1)
    frames = [picture[3 * i : 3 * i + 136, 5 * i : 5 * i + 184] for i in range(3)]
    frames += [rng.uniform(-1, 1, 3) * np.ones((136, 184, 3)) + 0.3 * picture[:136, :184] ** i for i in range(1, 6)]
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    write_video(path, np.stack(frames), fps=16)
    return path


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for ok, frame in iter(capture.read, (False, None)) if ok]
    return torch.tensor(np.stack(frames)).permute(0, 3, 1, 2).float()


def resized(frames, mode):
    short, scale = min(frames.shape[2:]), 224
    size = [int(scale * side / short) for side in frames.shape[2:]]
    return interpolate(frames, size, mode=mode, align_corners=False)


def cropped(frames):
    top, left = (round((side - 224) / 2) for side in frames.shape[2:])
    return frames[:, :, top : top + 224, left : left + 224]


def normalised(frames, mean, std):
    return (frames / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def consistency(features):
    features, total = normalize(features, dim=-1), 0.0
    for i in range(1, len(features)):
        previous, first = (max(0.0, cosine_similarity(features[j][None], features[i][None]).item()) for j in (i - 1, 0))
        total += (previous + first) / 2
    return total / (len(features) - 1)


@torch.no_grad()
def test_subject_consistency(path, tmp_path):
    model = randomise(Dino(image_size=224, patch_size=16, **DIM))
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    images = normalised(resized(frames_of(path), "bilinear"), vit_images.IMAGENET_MEAN, vit_images.IMAGENET_STD)
    expected = consistency(model(images))
    ours = measures.consistency(measures.read_clip(path), networks.features_of(convert.load_vit(tmp_path / "dino.pth")))
    assert 0.05 < expected < 0.98
    assert ours["video_results"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("patch", [32, 14], ids=["background_consistency", "aesthetic_quality"])
@torch.no_grad()
def test_with_clip(patch, path, tmp_path):
    model = randomise(Clip(image_size=224, patch_size=patch, out=48, **DIM))
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    images = normalised(cropped(resized(frames_of(path), "bicubic")), vit_images.CLIP_MEAN, vit_images.CLIP_STD)
    features, clip = model(images), measures.read_clip(path)
    ours = networks.features_of(convert.load_vit(tmp_path / "clip.pt"))
    if patch == 32:
        assert measures.consistency(clip, ours)["video_results"] == pytest.approx(consistency(features), abs=1e-4)
        return
    weight, bias = torch.linspace(-8, 8, 48), 5.0
    expected = (linear(normalize(features, dim=-1), weight[None], torch.tensor([bias])) / 10).mean().item()
    row = measures.aesthetic_quality(clip, ours, weight=weight.numpy(), bias=bias)
    assert abs(expected - 0.5) > 1e-2
    assert row["video_results"] == pytest.approx(expected, abs=1e-4)


def test_temporal_flickering(path):
    frames = frames_of(path).numpy()
    errors = [np.mean(cv2.absdiff(one, other)) for one, other in itertools.pairwise(frames)]
    expected = (255.0 - np.mean(errors).item()) / 255.0
    assert measures.flickering(measures.read_clip(path))["video_results"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.02], ids=["dynamic_degree", "static filter"])
@torch.no_grad()
def test_motion_of_a_pair(share, path, tmp_path):
    model = randomise_raft(Raft(**SIZES))
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "raft-things.pth")
    first, second = frames_of(path)[:2]
    flow = model(*(padded_by_raft(frame[None]) for frame in (first, second)))[0]
    lengths = torch.sqrt(flow[0] ** 2 + flow[1] ** 2).flatten().numpy()
    expected = np.mean(abs(np.sort(-lengths))[: int(lengths.size * share)])
    frames = measures.read_clip(path).frames
    ours = networks.flow_of(convert.load_raft(tmp_path / "raft-things.pth"))(*frames[:2])
    assert measures.longest(ours, share) == pytest.approx(expected, rel=1e-4)

"""Scores by vision models: the formulas by known answers, tiny models in a user's folder, and what is missing."""

import dataclasses

import jax
import numpy as np
import pytest
from pth_cases import write_pth
from vision_cases import HEAD, SIDE, TINY, TINY_L, write_head, write_model

from avd_jax.convert.aesthetic_head import LINEAR, AestheticHead
from avd_jax.curation import features
from avd_jax.curation.features import CLIP_B, CLIP_L, DINO
from avd_jax.data.video import write_video
from avd_jax.errors import UserError

FRAMES, FPS = 9, 8.0


@pytest.fixture(scope="module", autouse=True)
def small():
    """The models that are looked for are tiny, and so is what they see."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VIT_MODELS": TINY, "SIDE": SIDE, "LONGEST": 2 * SIDE}.items():
            patch.setattr(features, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name in TINY:
        write_model(folder, name)
    write_head(folder)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return features.load(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A clip that stays as it is but for its brightness, and one that jumps between unlike pictures."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (4, 6, 10, 3)).repeat(8, 1).repeat(8, 2)
    still = np.stack([pictures[0] * (1 - 0.02 * i) for i in range(12)])
    jumping = np.stack([pictures[i % 4] for i in range(12)])
    for name, video in (("still", still), ("jumping", jumping)):
        write_video(folder / f"{name}.mp4", video, fps=FPS)
    return folder


def score(models, path):
    return features.score(models, path, 0.0, FRAMES / FPS, FRAMES, FPS)


def test_consistency_by_its_formula():
    turned = np.array([[3, 0], [0, 2], [1, 1], [-5, 0]])
    # To the first: 0, 1/sqrt(2), -1; to the one before: 0, 1/sqrt(2), -1/sqrt(2). Negative ones count as 0.
    assert features.temporal_consistency(turned) == pytest.approx(np.sqrt(0.5) / 3)
    assert features.temporal_consistency(np.ones((5, 7))) == pytest.approx(1)
    with pytest.raises(ValueError, match="two frames"):
        features.temporal_consistency(turned[:1])


def test_aesthetics_by_its_formula():
    head = AestheticHead(np.array([2.0, 0.0], np.float32), 1.0, LINEAR, "head.pth")
    # Each embedding is of norm 1 first: 2 * 1 + 1, 2 * 0 + 1 and 2 * -0.6 + 1.
    assert features.aesthetic(np.array([[7, 0], [0, 3], [-6, 8]]), head) == pytest.approx((3 + 1 - 0.2) / 3)


def test_frames_are_the_middle_ones_of_equal_parts():
    np.testing.assert_array_equal(features.sampled(81), [5, 15, 25, 35, 45, 55, 65, 75])
    np.testing.assert_array_equal(features.sampled(8), range(8))
    assert features.sampled(3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_scores_of_a_clip(models, videos):
    assert models.missing == {}
    still, jumping = (score(models, videos / f"{name}.mp4") for name in ("still", "jumping"))
    assert still.keys() == {"temporal_consistency", "aesthetics", "embedding"}
    assert 0 <= jumping["temporal_consistency"]["value"] < still["temporal_consistency"]["value"] <= 1
    assert still["temporal_consistency"]["size"] == [48, 32], "the whole picture, in whole patches"
    assert len(still["temporal_consistency"]["values"]) == FRAMES - 1
    assert DINO in still["temporal_consistency"]["method"]
    assert "float32" in still["temporal_consistency"]["method"]
    assert still["aesthetics"]["size"] == still["embedding"]["size"] == [32, 32]
    assert f"{LINEAR} (sa_0_4.pth)" in still["aesthetics"]["method"]
    assert still["aesthetics"]["value"] == pytest.approx(np.mean(still["aesthetics"]["values"]), abs=1e-5)
    assert abs(still["aesthetics"]["value"] - HEAD.bias) <= np.linalg.norm(HEAD.weight)
    assert np.linalg.norm(still["embedding"]["value"]) == pytest.approx(1, abs=1e-4)
    assert still == score(models, videos / "still.mp4"), "the same each time"


def test_parts_of_a_clip_give_the_same_and_are_compiled_once(models, folder, videos, monkeypatch):
    whole = score(models, videos / "jumping.mp4")
    monkeypatch.setattr(features, "BATCH", 6)  # 9 frames in two equal parts, the last one filled up
    compiled, jit = [], jax.jit

    def counting(function):
        return jit(lambda *inputs: compiled.append(1) or function(*inputs))

    monkeypatch.setattr(features.jax, "jit", counting)
    again = features.load(folder)
    for _ in range(2):
        parts = score(again, videos / "jumping.mp4")
    for name in whole:
        np.testing.assert_allclose(parts[name]["value"], whole[name]["value"], atol=1e-5)
    assert len(compiled) == 2, "DINO and CLIP"


@pytest.mark.parametrize(
    ("names", "head", "consistency", "scores", "missing"),
    [
        ((), False, None, set(), {"temporal_consistency", "aesthetics"}),
        ((), True, None, set(), {"temporal_consistency", "aesthetics"}),
        ((DINO,), True, DINO, {"temporal_consistency"}, {"aesthetics"}),
        ((CLIP_B,), False, CLIP_B, {"temporal_consistency", "embedding"}, {"aesthetics"}),
        ((CLIP_L,), True, CLIP_L, {"temporal_consistency", "embedding", "aesthetics"}, set()),
    ],
)
def test_what_is_missing_is_said(names, head, consistency, scores, missing, videos, tmp_path):
    for name in names:
        write_model(tmp_path, name)
    if head:
        write_head(tmp_path)
    models = features.load(tmp_path)
    assert models.missing.keys() == missing
    assert all(str(tmp_path) in reason and "\n" not in reason for reason in models.missing.values())
    assert (models.consistency and models.consistency.name) == consistency
    assert score(models, videos / "still.mp4").keys() == scores


def test_models_of_another_kind_are_named_and_not_used(tmp_path):
    write_model(tmp_path, CLIP_L, dataclasses.replace(TINY_L, num_layers=2))
    write_pth(tmp_path / "head.pth", {"weight": np.ones((1, 5), np.float32), "bias": np.ones(1, np.float32)})
    write_pth(tmp_path / "other.pth", {"a.weight": np.ones((3, 3), np.float32)})
    reasons = features.load(tmp_path).missing
    assert "CLIP of width 64 with 2 layers" in reasons["temporal_consistency"]
    assert "an aesthetic head for 5 features" in reasons["aesthetics"]


def test_of_two_aesthetic_heads_one_is_taken(tmp_path):
    write_model(tmp_path, CLIP_L)
    write_head(tmp_path)
    write_pth(tmp_path / "sa_1.pth", {"weight": np.ones((1, 12), np.float32), "bias": np.ones(1, np.float32)})
    assert features.load(tmp_path).head.file == "sa_0_4.pth"


def test_models_in_folders_of_their_own(folder, tmp_path):
    for name, place in ((DINO, "dino/pytorch_model.bin"), (CLIP_L, "models--a--b/snapshots/1234/pytorch_model.bin")):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes((folder / f"{name.replace('/', '-')}.pth").read_bytes())
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "aesthetic_model" / "emb_reader").mkdir(parents=True)
    write_head(tmp_path / "aesthetic_model" / "emb_reader")
    models = features.load(tmp_path)
    assert (models.consistency.name, models.clip_l.name, models.missing) == (DINO, CLIP_L, {})


def test_a_damaged_file_matters_if_something_is_missing(folder, tmp_path):
    path = write_model(tmp_path, DINO)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"DINO ViT-B-16\.pth: truncated"):
        features.load(tmp_path)
    path.rename(tmp_path / "raft-things.pth")  # of another model, as VBench's users have them beside
    assert features.load(tmp_path).missing.keys() == {"temporal_consistency", "aesthetics"}
    for other in (CLIP_B, CLIP_L):
        write_model(tmp_path, other)
    write_head(tmp_path)
    (tmp_path / "dino.pth").write_bytes(b"")
    assert features.load(tmp_path).consistency.name == CLIP_B


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        features.load(tmp_path / "gone")


def test_a_clip_that_ends_too_early(models, videos):
    with pytest.raises(UserError, match="too short"):
        features.score(models, videos / "still.mp4", 1.0, 3.0, 16, FPS)

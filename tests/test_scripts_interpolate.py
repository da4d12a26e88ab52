"""scripts/interpolate.py: twice the frame rate for the same time, for videos and latents; errors are one line."""

import re

import numpy as np
import pytest
from generation_cases import VAE, write_dit, write_interpolator, write_weights

from avd_jax.data.video import duration, frame_rate_and_size, read_video, write_video
from avd_jax.errors import UserError
from avd_jax.generation.smoothing import Smoother, Source, sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_interpolator(write_dit(folder / "student"))
    video = np.random.default_rng(0).uniform(-1, 1, (6, 18, 24, 3))
    write_video(folder / "videos" / "a.mp4", video, fps=8)
    write_video(folder / "still" / "b.mp4", video[:1], fps=8)
    np.save(folder / "latents.npy", np.zeros((3, 8, 12, VAE.z_dim), np.float32))
    np.save(folder / "wrong.npy", np.zeros((8, 12, VAE.z_dim), np.float32))
    return folder


@pytest.fixture(scope="module")
def smoother(folder):
    return Smoother(weights=f"{folder}/wan", checkpoint=f"{folder}/student")


def test_a_video_and_latents_at_twice_the_rate(folder, smoother, tmp_path):
    (source,) = sources(folder / "videos", fps=None)
    smoother.double(source, tmp_path / "a.mp4")
    assert frame_rate_and_size(tmp_path / "a.mp4") == (16, 18, 24)
    assert duration(tmp_path / "a.mp4") == pytest.approx(9 / 16)  # of 6 frames 5 fit the VAE: 3 latents become 5
    smoother.double(Source(folder / "latents.npy", 8), tmp_path / "latents.mp4")
    assert duration(tmp_path / "latents.mp4") == pytest.approx(9 / 16)
    assert read_video(tmp_path / "latents.mp4", frames=9, fps=16, height=16, width=24).shape == (9, 16, 24, 3)


def test_bad_input(folder, smoother, tmp_path):
    (tmp_path / "text.npy").write_text("x")
    cases = (
        (lambda: sources(folder / "none", fps=None), "none: there is no such file or folder"),
        (lambda: sources(folder / "wan", fps=None), "holds no video (.avi"),
        (lambda: sources(folder / "latents.npy", fps=None), "--fps is missing: give the frame rate that the latents"),
        (lambda: sources(folder / "videos", fps=8.0), "--fps is for latents only"),
        (lambda: smoother.double(Source(folder / "still" / "b.mp4", 8), tmp_path / "o"), "is one latent frame long"),
        (lambda: smoother.double(Source(folder / "wrong.npy", 8), tmp_path / "o"), "give latents [F H W 4] of one"),
        (lambda: smoother.double(Source(tmp_path / "text.npy", 8), tmp_path / "o"), "cannot be read as an array"),
        (lambda: Smoother(weights=f"{folder}/wan", checkpoint=None), "wan: has no frame interpolator; make one with"),
    )
    for call, message in cases:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()

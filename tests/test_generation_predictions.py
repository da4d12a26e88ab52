"""Predictions at each step of sampling: that they are the samplers' own, in any number at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import STUDENT, write_dit, write_weights

from avd_jax.convert.weights import load_module
from avd_jax.diffusion.unipc import unipc_schedule
from avd_jax.errors import UserError
from avd_jax.generation import predictions
from avd_jax.generation.pipeline import StudentSampler, sample_keys
from avd_jax.generation.predictions import neighbour_similarities, steps_of
from avd_jax.generation.run import open_for
from avd_jax.generation.settings import Job, Options, resolve
from avd_jax.models.functional import denoiser
from avd_jax.parallel.mesh import make_mesh

JOBS = [Job("a red ball", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(predictions, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))


def opened(folder, **options):
    settings = resolve(Options(weights=str(folder / "wan"), **options), note=lambda text: None)
    return open_for(settings, [job.prompt for job in JOBS])


def test_similarity_by_its_formula():
    frames = jnp.array([[3.0, 0, 0, 0], [0, 5, 0, 0], [0, -1, 0, 0], [0, -1, 1, 0], [0, 0, 0, 0]])
    found = neighbour_similarities(frames.reshape(1, 5, 2, 1, 2))
    np.testing.assert_allclose(found, [[0, -1, np.sqrt(0.5), 0]], atol=1e-6)


def test_a_students_last_prediction_is_what_it_samples(folder, monkeypatch):
    embeds = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    monkeypatch.setattr(predictions, "_embeddings", lambda opened, jobs: {job.prompt: embeds for job in jobs})
    student = opened(folder, checkpoint=str(folder / "student"))
    steps = steps_of(student, JOBS, batch_size=2)
    assert [step.timestep for step in steps] == STUDENT["timesteps"]
    assert {step.similarities.shape for step in steps} == {(3, student.shape[0] - 1)}
    network, params = denoiser(load_module(student.parts.transformer, jnp.float32))
    sample = StudentSampler(network, student.shape, timesteps=STUDENT["timesteps"])
    latents = sample(params, sample_keys([0, 1, 2]), {"prompt_embeds": np.stack([embeds] * 3)})
    np.testing.assert_allclose(steps[-1].similarities, neighbour_similarities(latents), atol=1e-4)
    assert np.abs(steps[0].similarities - steps[-1].similarities).max() > 1e-3


def test_a_teachers_steps(folder):
    size = {"frames": 5, "height": 32, "width": 48}
    steps = steps_of(opened(folder, steps=4, shift=3.0, **size), JOBS[:1], batch_size=8)
    assert [step.timestep for step in steps] == unipc_schedule(4, 3.0)[0].tolist()
    assert all(np.isfinite(step.similarities).all() for step in steps)


def test_one_latent_frame_has_no_neighbour(folder):
    with pytest.raises(UserError, match="--frames 1: is one latent frame"):
        steps_of(opened(folder, frames=1, height=32, width=48), JOBS, batch_size=2)

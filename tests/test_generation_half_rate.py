"""Generation at half the frame rate: when it is the default, what it is told, and that it runs the two programs."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from generation_cases import STUDENT, write_dit, write_interpolator, write_weights

from avd_jax.errors import UserError
from avd_jax.generation.pipeline import HalfRateSampling, StudentSampler, sample_keys
from avd_jax.generation.run import generate, make_plan
from avd_jax.generation.settings import Job, Options, from_record_file, resolve
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.parallel.mesh import make_mesh

SHAPE = 5, 4, 4, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    write_interpolator(write_dit(folder / "fast", student=STUDENT, seed=1))
    return folder


def resolved(folder, checkpoint="fast", notes=None, **options):
    note = (notes if notes is not None else []).append
    return resolve(Options(weights=f"{folder}/wan", checkpoint=f"{folder}/{checkpoint}", **options), note=note)


@pytest.mark.parametrize(("positions", "stride"), [("consecutive", None), ("strided", 2)])
def test_each_rate_sees_its_own_frames_and_positions(positions, stride):
    seen = []

    def network(params, latents, timesteps, conditions, **options):
        seen.append((latents.shape[1], options.get("frame_stride")))
        return latents * params

    unet = Interpolator(InterpolatorConfig(4, (8, 8, 8)), nnx.Rngs(0))
    half_rate = HalfRateSampling(2, positions, unet)
    sample = StudentSampler(network, SHAPE, timesteps=[1000, 900, 757, 522], half_rate=half_rate)
    for seed in (0, 1):
        latents = sample(0.5, sample_keys([seed]), {"prompt_embeds": np.zeros((1, 2, 2), np.float32)})
    assert latents.shape == (1, *SHAPE)
    assert seen == [(3, stride), (5, None)]  # each traced once


def test_an_interpolator_with_the_student_is_used_unless_told_otherwise(folder):
    assert resolved(folder).half_rate_steps == 1  # of three
    assert resolved(folder).half_rate_positions == "strided"
    assert resolved(folder, half_rate_positions="consecutive").half_rate_positions == "consecutive"
    assert resolved(folder, half_rate_steps=2).half_rate_steps == 2
    off = resolved(folder, half_rate_steps=0)
    assert (off.half_rate_steps, off.half_rate_positions) == (0, None)
    assert resolved(folder, "student").half_rate_steps == 0
    assert resolved(folder, solver="unipc", steps=2).half_rate_steps == 0
    with_weights = resolve(Options(weights=f"{folder}/wan", checkpoint=f"{folder}/student", half_rate_steps=0))
    assert off.digest({}) == with_weights.digest({})


def test_a_length_without_a_half_rate_is_made_at_the_full_one_unless_asked(folder):
    notes = []
    assert resolved(folder, notes=notes, frames=7).half_rate_steps == 0  # 4 latent frames
    assert notes[0].startswith("all steps are at the full frame rate: half_rate_steps=1: 4 latent frames have no half")
    for frames in (7, 1):
        with pytest.raises(UserError, match=re.escape(f"--half_rate_steps=1: {frames // 2 + 1} latent frames have no")):
            resolved(folder, frames=frames, half_rate_steps=1)
    with pytest.raises(UserError, match="--half_rate_steps=4: the student has 3 steps; give 0 to 3"):
        resolved(folder, half_rate_steps=4)
    with pytest.raises(UserError, match=r"--half_rate_steps 1: .*/student has no frame interpolator; make one with"):
        resolved(folder, "student", half_rate_steps=1)


def test_how_the_student_was_trained_is_the_default(folder, tmp_path):
    recorded = STUDENT | {"half_rate_steps": 2, "half_rate_positions": "consecutive"}
    write_interpolator(write_dit(tmp_path, student=recorded))
    settings = resolve(Options(weights=f"{folder}/wan", checkpoint=str(tmp_path)))
    assert (settings.half_rate_steps, settings.half_rate_positions) == (2, "consecutive")


def test_videos_are_made_and_made_again(folder, tmp_path):
    settings, job = resolved(folder), Job("a", 0)
    plan = make_plan(settings, [job], tmp_path / "out")
    generate(plan, mesh=make_mesh(devices=jax.devices()[:1]), batch_size=1, command="")
    record = json.loads(plan.videos[job].with_suffix(".json").read_text())
    assert record["settings"]["half_rate_steps"] == 1
    assert record["fingerprints"].keys() == {"transformer", "vae", "text_encoder", "tokenizer", "interpolator"}
    assert plan.videos[job] != make_plan(resolved(folder, half_rate_steps=0), [job], tmp_path / "out").videos[job]

    path = str(plan.videos[job].with_suffix(".json"))
    again, _, fingerprints = from_record_file(path, weights=None, checkpoint=None)
    assert again == settings
    assert not make_plan(again, [job], tmp_path / "out", fingerprints=fingerprints).todo
    elsewhere, _, _ = from_record_file(path, weights=None, checkpoint=f"{folder}/student")
    with pytest.raises(UserError, match="has no frame interpolator; name the weights that made the video"):
        make_plan(elsewhere, [job], tmp_path / "out")

    del record["settings"]["half_rate_steps"], record["settings"]["half_rate_positions"]  # of before there were any
    Path(path).write_text(json.dumps(record))
    assert from_record_file(path, weights=None, checkpoint=None)[0].half_rate_steps == 0

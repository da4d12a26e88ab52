"""Models that stay loaded make the videos that a run of generation makes, and load only what has changed."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from generation_cases import STUDENT, write_dit, write_weights

from avd_jax.generation import run, sampling, warm
from avd_jax.generation.settings import Job, Options, resolve
from avd_jax.parallel.mesh import make_mesh

JOB = Job("a dog", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    for seed in (1, 2):
        write_dit(folder / f"student{seed}", student=STUDENT, seed=seed)
    return folder


def opened(folder, seed=1):
    options = Options(weights=str(folder / "wan"), checkpoint=str(folder / f"student{seed}"))
    return run.open_for(resolve(options), [JOB.prompt])


def test_warm_models(folder, tmp_path, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])  # sharing a video out is test_generation_sampling.py's matter
    loaded, load, steps, phases = [], warm.load_transformer, [], []
    monkeypatch.setattr(warm.WarmModels, "mesh", lambda self, opened: mesh)
    monkeypatch.setattr(warm, "load_transformer", lambda *args: loaded.append(1) or load(*args))
    for module in (warm, sampling):  # decoding is compiled for long, and tested elsewhere
        monkeypatch.setattr(module, "video_decoder", lambda *args, **options: lambda latents: latents)
    models = warm.WarmModels(prompt_cache=tmp_path)
    first = opened(folder)
    assert not models.has(first)
    pixels = models.make(first, JOB, on_step=lambda: steps.append(1), on_phase=phases.append)
    ((_, expected),) = run.sample(first, [JOB], mesh=mesh, size=1, prompt_cache=tmp_path)
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    assert len(steps) == first.settings.steps
    assert phases == ["reading the prompt", "reading the weights", "sampling", "decoding"]

    # Another seed, and other weights of the same sizes, are the same programs.
    programs = models._transformers["student", None].programs
    (program,) = programs.values()
    assert np.abs(models.make(first, replace(JOB, seed=4)) - pixels).max() > 0.01
    assert len(loaded) == 1
    known = program.step._cache_size()
    assert known == 1, "all steps are one program"
    second = opened(folder, seed=2)
    assert np.abs(models.make(second, JOB) - pixels).max() > 0.01
    assert (len(loaded), models.has(second), models.has(first)) == (2, True, False)
    assert (list(programs.values()), program.step._cache_size()) == ([program], known)
    models.leave()
    assert not models.has(second)


def test_memory_that_is_used_up_is_made_free_once(folder, monkeypatch):
    models, calls = warm.WarmModels(), []

    def make(*args):
        calls.append(dict(models._transformers))
        if len(calls) == 1:
            raise MemoryError
        return "a video"

    models._transformers = {"unipc": "the teacher"}
    monkeypatch.setattr(models, "_make", make)
    assert models.make(opened(folder), JOB) == "a video"
    assert calls == [{"unipc": "the teacher"}, {}]

"""Which devices share what, which network is on them when, and how steps are counted."""

import gc
import itertools
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from generation_cases import DIT, STUDENT, write_dit, write_weights

from avd_jax.errors import UserError
from avd_jax.generation import sampling
from avd_jax.generation.pipeline import latents_shape
from avd_jax.generation.prompt_cache import PromptCache
from avd_jax.generation.sampling import generation_mesh, sample_videos
from avd_jax.generation.settings import Job, Options, resolve
from avd_jax.generation.weights import open_parts
from avd_jax.parallel.mesh import make_mesh

JOBS = [Job("a red ball", seed) for seed in range(3)]
LAST_BITS = 1e-4  # of float32, on values of about 1


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    return resolve(Options(weights=str(folder / "wan"), checkpoint=str(folder / "student")))


def sampled(settings, jobs=JOBS, *, mesh=None, size=1, **options):
    """Return the videos [F H W 3]."""
    parts = open_parts(settings)
    sizes = {"frames": settings.frames, "height": settings.height, "width": settings.width}
    shape = latents_shape(**sizes, dit=parts.transformer.config, vae=parts.vae.config)
    how = {"mesh": mesh or make_mesh(devices=jax.devices()[:1]), "size": size, **options}
    found = list(sample_videos(settings, parts, shape, jobs, **how))
    jax.effects_barrier()
    assert [job for job, _ in found] == list(jobs)
    return [video for _, video in found]


@pytest.fixture(scope="module")
def expected(settings):
    videos = sampled(settings)
    assert np.abs(videos[0] - videos[1]).max() > 0.1
    return videos


@pytest.mark.parametrize(
    ("videos", "heads", "options", "sizes"),
    [
        (8, 12, {}, (8, 1, 1)),
        (100, 12, {}, (8, 1, 1)),
        (1, 40, {}, (1, 1, 8)),
        (1, 12, {}, (2, 1, 4)),  # eight do not divide twelve heads
        (3, 12, {}, (4, 1, 2)),
        (5, 12, {}, (8, 1, 1)),
        (1, 12, {"fsdp": 4}, (1, 4, 2)),
        (1, 40, {"fsdp": 8}, (1, 8, 1)),
        (1, 12, {"seq": 1}, (8, 1, 1)),
        (8, 12, {"seq": 2, "fsdp": 2}, (2, 2, 2)),
    ],
)
def test_devices_without_a_video_of_their_own_share_one(videos, heads, options, sizes):
    assert tuple(generation_mesh(videos, heads, **options).shape.values()) == sizes


def test_a_mesh_of_some_devices():
    devices = jax.devices()[4:6]
    mesh = generation_mesh(1, 12, devices=devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 2}
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": 3}, "--fsdp 3: give a divisor of the number of devices, which is 8"),
        ({"fsdp": 0}, "--fsdp 0: give a divisor"),
        (
            {"seq": 8},
            "--seq 8: give one of 1, 2, 4: it must divide the transformer's 12 attention heads, and with --fsdp 1",
        ),
        ({"seq": 4, "fsdp": 4}, "--seq 4: give one of 1, 2: "),
        ({"seq": 0}, "--seq 0: give one of 1, 2, 4: "),
        ({"seq": -1}, "--seq -1: give one of 1, 2, 4: "),
    ],
)
def test_sizes_that_do_not_divide(options, message):
    with pytest.raises(UserError) as error:
        generation_mesh(1, 12, **options)
    assert str(error.value).startswith(message)


def test_a_video_that_devices_share_is_the_same(settings, expected):
    """Two of the mesh's devices share its tokens, two its parameters."""
    mesh, counted = make_mesh(devices=jax.devices()[:4], fsdp=2, seq=2), []
    (video,) = sampled(settings, JOBS[1:2], mesh=mesh, size=2, on_step=lambda: counted.append(1))
    np.testing.assert_allclose(video, expected[1], atol=LAST_BITS)
    assert len(counted) == settings.steps, "a step counts once, not on every device"


def test_the_teachers_two_passes_are_one_step(settings):
    teacher = {"solver": "unipc", "shift": 5.0, "guidance_scale": 5.0, "negative_prompt": "ugly"}
    settings, counted = replace(settings, **teacher, steps=3, timesteps=(999, 800, 500)), []
    sampled(settings, JOBS[:2], size=2, on_step=lambda: counted.append(1))
    assert len(counted) == 3


def test_transformer_and_decoder_take_turns_if_they_do_not_fit_together(settings, expected, monkeypatch, capsys):
    """The decoder says so like a device: it finds no memory while the transformer's parameters are there."""
    kernel = (DIT.num_layers, DIT.dim, DIT.num_heads, DIT.head_dim)
    gc.collect()  # what other tests left in cycles would go while this one counts
    before = sum(array.shape == kernel for array in jax.live_arrays())
    make, calls = sampling.video_decoder, itertools.count()  # the first time there is just room enough

    def crowded_decoder(vae, **options):
        decode = make(vae, **options)

        def decode_alone(latents):
            crowded = sum(array.shape == kernel for array in jax.live_arrays()) > before
            if crowded and next(calls):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 274877906944 bytes.")
            return decode(latents)

        return decode_alone

    monkeypatch.setattr(sampling, "video_decoder", crowded_decoder)
    monkeypatch.setattr(sampling, "SAMPLED_BEFORE_DECODING", 2)  # so that it is loaded once more for the third
    videos = sampled(settings)
    np.testing.assert_array_equal(videos, expected)
    assert "the transformer and the decoder do not fit into memory together" in capsys.readouterr().err


def test_programs_are_compiled_before_anything_is_loaded(settings, expected, monkeypatch):
    compiled = {name: threading.Event() for name in ("_compiled_steps", "_compiled_decoder")}
    for name, event in compiled.items():
        make = getattr(sampling, name)

        def noted(*args, make=make, event=event):
            program = make(*args)
            event.set()
            return program

        monkeypatch.setattr(sampling, name, noted)
    load = sampling.text_encoder_of

    def waiting(*args):
        assert all(event.wait(timeout=300) for event in compiled.values())
        return load(*args)

    monkeypatch.setattr(sampling, "text_encoder_of", waiting)
    np.testing.assert_array_equal(sampled(settings, JOBS[:1]), expected[:1])


def test_what_is_too_large_to_decode_is_told_before_anything_is_loaded(settings, monkeypatch):
    monkeypatch.setattr(sampling, "load_module", None)
    with pytest.raises(UserError, match="the VAE takes"):
        sampled(settings, JOBS[:1], vae_gib=1e-4)


@pytest.mark.parametrize("name", ["_compiled_steps", "_compiled_decoder"])
def test_what_cannot_be_compiled_says_why(settings, name, monkeypatch):
    def failing(*args):
        raise UserError("too large")

    monkeypatch.setattr(sampling, name, failing)
    with pytest.raises(UserError, match="too large"):
        sampled(settings, JOBS[:1])


def test_other_failures_of_the_decoder_are_not_taken_for_that(settings, monkeypatch):
    def failing(latents):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(sampling, "video_decoder", lambda vae, **options: failing)
    monkeypatch.setattr(sampling._Sampler, "__call__", lambda sampler, batch: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        sampled(settings, JOBS[:1])


def test_the_text_encoder_is_not_loaded_for_prompts_that_are_kept(settings, expected, monkeypatch, tmp_path):
    cache = PromptCache(tmp_path, "key")
    sampled(settings, JOBS[:1], cache=cache)
    load, loaded = sampling.load_module, []

    def spy(weights, *args, **kwargs):
        loaded.append(weights.architecture.name)
        return load(weights, *args, **kwargs)

    monkeypatch.setattr(sampling, "load_module", spy)
    (video,) = sampled(settings, JOBS[:1], cache=cache)
    np.testing.assert_array_equal(video, expected[0])
    assert sorted(loaded) == ["wan_dit", "wan_vae"]

"""Samplers on networks whose answer is known, on a tiny transformer in other batches and on several devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import DIT, VAE, InMemory

from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.weights import load_module
from avd_jax.errors import UserError
from avd_jax.generation import pipeline
from avd_jax.generation.pipeline import (
    StudentSampler,
    latents_shape,
    make_teacher_sampler,
    sample_keys,
    student_steps,
    teacher_steps,
)
from avd_jax.models.functional import denoiser
from avd_jax.models.wan_dit import WAN_1_3B
from avd_jax.models.wan_vae import WanVAEConfig
from avd_jax.parallel.mesh import batch_sharding, make_mesh, replicated

SHAPE = (2, 4, 4, 4)


def test_latents_shape_of_wan():
    shape = latents_shape(frames=81, height=480, width=832, dit=WAN_1_3B, vae=WanVAEConfig())
    assert shape == (21, 60, 104, 16)
    assert latents_shape(frames=7, height=8, width=12, dit=DIT, vae=VAE) == (4, 4, 6, 4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"frames": 16}, "frames=16 is not 4n + 1; try 13 or 17"),
        ({"frames": 0}, "frames=0 is not 4n + 1; try 1"),
        ({"height": 100}, "height=100 is not a multiple of 16; try 96 or 112"),
        ({"width": 8}, "width=8 is not a multiple of 16; try 16"),
        ({"width": -16}, "width=-16 is not a multiple of 16; try 16"),
    ],
)
def test_sizes_that_do_not_fit(size, message):
    with pytest.raises(UserError) as error:
        latents_shape(**({"frames": 81, "height": 480, "width": 832} | size), dit=WAN_1_3B, vae=WanVAEConfig())
    assert str(error.value) == message


def test_noise_is_per_example_to_the_bit():
    together = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(sample_keys([3, 0, 2**32 - 1]))
    for row, seed in enumerate([3, 0, 2**32 - 1]):
        alone = jax.random.normal(jax.random.key(np.uint32(seed), impl="threefry2x32"), SHAPE)
        np.testing.assert_array_equal(together[row], alone)
    assert len(np.unique(np.asarray(together)[:, 0, 0, 0, 0])) == 3


def towards(params, latents, timesteps, conditions):
    """The velocity of a network that is sure of its x0: every latent is scale times the prompt's mean."""
    x0 = params["scale"] * jnp.mean(conditions["prompt_embeds"], axis=(1, 2))
    return (latents - x0[:, None, None, None, None]) / (timesteps / 1000)[:, None, None, None, None]


def told(value):
    """The conditions of an example whose prompt's embeddings are all of one value."""
    return {"prompt_embeds": np.full((3, 2), value, np.float32)}


BATCH = {"prompt_embeds": np.stack([told(value)["prompt_embeds"] for value in (0.5, -1.0)])}


def test_student_on_a_network_that_knows_the_answer():
    sample = StudentSampler(towards, SHAPE, timesteps=[1000, 700, 300])
    latents = sample({"scale": 2.0}, sample_keys([0, 1]), BATCH)
    assert latents.shape == (2, *SHAPE)
    np.testing.assert_allclose(latents[0], 1.0, atol=1e-5)
    np.testing.assert_allclose(latents[1], -2.0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance_goes_from_negative_to_prompt(scale):
    sample = make_teacher_sampler(towards, SHAPE, num_steps=4, shift=5.0, guidance_scale=scale)
    # The sure network at sigma says (x - x0) / sigma; the solver's own sigma is up to 1e-3 off the whole timestep.
    latents = sample({"scale": 2.0}, sample_keys([0, 1]), BATCH, told(0.25))
    np.testing.assert_allclose(latents[0], 0.5 + scale * (1.0 - 0.5), atol=0.05)
    np.testing.assert_allclose(latents[1], 0.5 + scale * (-2.0 - 0.5), atol=0.05)


@pytest.mark.parametrize("solver", ["student", "unipc"])
@pytest.mark.parametrize("devices", [1, 2])
def test_steps_are_the_samplers_in_one_program(solver, devices):
    mesh, calls, made = make_mesh(devices=jax.devices()[:devices]), [], []

    def network(params, latents, timesteps, conditions):
        calls.append(latents.shape)
        return jnp.tanh(towards(params, latents, timesteps, conditions))

    keys, texts = jax.device_put((sample_keys([0, 1]), BATCH), batch_sharding(mesh))
    inputs, how = (keys, texts), {"timesteps": [1000, 700, 300]}
    whole, cut = StudentSampler, student_steps
    if solver == "unipc":
        inputs, how = (*inputs, told(0.25)), {"num_steps": 4, "shift": 5.0, "guidance_scale": 5.0}
        whole, cut = make_teacher_sampler, teacher_steps
    params = {"scale": jnp.float32(2.0)}
    expected = whole(network, SHAPE, **how)(params, *inputs)
    calls.clear()
    steps = cut(network, SHAPE, **how, mesh=mesh).compiled(params, *inputs)
    latents = steps(params, *inputs, on_step=made.append)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    assert np.abs(np.asarray(latents)).max() > 0.1
    assert len(calls) == 1, "one trace for all steps"
    assert len(made) == steps.count == len(how.get("timesteps", range(4)))
    np.testing.assert_array_equal(made[-1], latents)
    assert np.abs(np.asarray(made[0]) - made[1]).max() > 0.01
    assert len(latents.addressable_shards) == devices


@pytest.mark.parametrize("make", [StudentSampler, student_steps, make_teacher_sampler, teacher_steps])
def test_programs_of_a_mesh_have_its_compiler_options(make, monkeypatch):
    """Else a TPU's compiler cuts each product with a sharded weight into a loop over the shards."""
    monkeypatch.setattr(pipeline, "compiler_options", lambda mesh: {"xla_cpu_no_such_option": True})
    how, texts = {"timesteps": [1000, 300]}, ()
    if make in (make_teacher_sampler, teacher_steps):
        how, texts = {"num_steps": 2, "shift": 5.0, "guidance_scale": 5.0}, (told(0.25),)
    sample = make(towards, SHAPE, **how, mesh=make_mesh(devices=jax.devices()[:2]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_no_such_option"):
        sample({"scale": 2.0}, sample_keys([0, 1]), BATCH, *texts)


def test_one_trace_of_the_network():
    calls = []

    def counted(params, latents, timesteps, conditions):
        calls.append(latents.shape)
        return towards(params, latents, timesteps, conditions)

    sample = make_teacher_sampler(counted, SHAPE, num_steps=9, shift=5.0, guidance_scale=5.0)
    for _ in range(2):
        sample({"scale": 1.0}, sample_keys([0, 1]), BATCH, told(0.5))
    assert calls == [(2, *SHAPE)]


def test_bad_schedules_are_refused_before_the_first_call():
    with pytest.raises(UserError, match="decreasing"):
        StudentSampler(towards, SHAPE, timesteps=[500, 1000])
    with pytest.raises(UserError, match="at least 1"):
        make_teacher_sampler(towards, SHAPE, num_steps=0, shift=5.0, guidance_scale=5.0)
    with pytest.raises(UserError, match="above 0"):
        make_teacher_sampler(towards, SHAPE, num_steps=4, shift=0.0, guidance_scale=5.0)


def tiny_network():
    return denoiser(load_module(InMemory(WAN_DIT, DIT), jnp.float32))


def conditions(*size):
    return {"prompt_embeds": np.random.default_rng(1).standard_normal((*size, 6, DIT.text_dim), np.float32)}


SEEDS = [5, 6, 7, 8]
# Another batch size may sum in another order: a few last bits of float32, on values of about 1.
LAST_BITS = 2e-5


def tiny_latents(devices, rows):
    """Return what a tiny student makes of some of four prompts, over so many devices."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    network, params = tiny_network()
    student = StudentSampler(network, SHAPE, timesteps=[1000, 400])
    batch = sample_keys(SEEDS[rows]), {"prompt_embeds": conditions(4)["prompt_embeds"][rows]}
    return student(jax.device_put(params, replicated(mesh)), *jax.device_put(batch, batch_sharding(mesh)))


def test_a_video_depends_neither_on_its_batch_nor_on_the_devices():
    together, alone, shared = tiny_latents(1, slice(4)), tiny_latents(1, slice(1, 2)), tiny_latents(2, slice(4))
    np.testing.assert_allclose(alone[0], together[1], atol=LAST_BITS)
    np.testing.assert_allclose(shared, together, atol=LAST_BITS)
    assert [shard.data.shape[0] for shard in shared.addressable_shards] == [2, 2]
    assert np.abs(np.asarray(together[0] - together[1])).max() > 0.1


def test_guidance_moves_no_shard():
    mesh = make_mesh(devices=jax.devices()[:2])
    teacher = make_teacher_sampler(towards, SHAPE, num_steps=2, shift=5.0, guidance_scale=5.0)
    keys, texts = jax.device_put((sample_keys(SEEDS), conditions(4)), batch_sharding(mesh))
    arguments = {"scale": 1.0}, keys, texts, jax.device_put(conditions(), replicated(mesh))
    program = teacher.lower(*arguments).compile().as_text()
    assert not re.search(r"all-(gather|to-all|reduce)|collective-permute", program)
    latents = teacher(*arguments)
    assert [shard.data.shape[0] for shard in latents.addressable_shards] == [2, 2]

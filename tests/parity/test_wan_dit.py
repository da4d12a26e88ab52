"""The transformer against diffusers' WanTransformer3DModel, live: velocity both ways, and sampling from an export."""

import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx

from avd_jax import convert
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.diffusion.student import initial_noise, renoise, student_sample

STUDENT = {"timesteps": [1000.0, 900.0, 757.0, 522.0], "shift": 5.0, "guidance_scale": 5.0, "num_steps": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=64, text_dim=24, ffn_dim=72, num_layers=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "hub" / "transformer")
    return tmp_path / "hub"


def inputs(seed=0, shape=(2, 3, 8, 6), length=512):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((*shape, 16), dtype=np.float32)
    prompt_embeds = rng.standard_normal((shape[0], length, 24), dtype=np.float32)
    return latents, np.array([999.0, 12.25], np.float32)[: shape[0]], prompt_embeds


def velocity_of(model, latents, timesteps, prompt_embeds):
    channels_first = torch.from_numpy(np.moveaxis(latents, -1, 1).copy())
    with torch.no_grad():
        velocity = model(channels_first, torch.from_numpy(timesteps), torch.from_numpy(prompt_embeds)).sample
    return np.moveaxis(velocity.numpy(), 1, -1)


def relative_error(actual, expected):
    return float(np.sqrt(np.mean(np.square(np.asarray(actual) - expected)) / np.mean(np.square(expected))))


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 1, 4, 10), (2, 5, 2, 2)])
def test_velocity(model, folder, shape):
    dit = convert.load_dit(folder)
    assert relative_error(dit(*inputs(1, shape)), velocity_of(model, *inputs(1, shape))) < 1e-4


def test_short_texts_are_padded_as_the_pipeline_pads_them(model, folder):
    latents, timesteps, prompt_embeds = inputs(2, length=9)
    padded = np.pad(prompt_embeds, ((0, 0), (0, 503), (0, 0)))
    ours = convert.load_dit(folder)(latents, timesteps, prompt_embeds)
    assert relative_error(ours, velocity_of(model, latents, timesteps, padded)) < 1e-4


def test_half_precision_is_as_close_to_float32_as_theirs(tmp_path):
    """diffusers keeps norms, modulation and the timestep's path in float32 too, and rounds the residual stream."""
    torch.manual_seed(0)
    deep = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, text_dim=24, ffn_dim=256, num_layers=30
    )
    deep.save_pretrained(tmp_path / "transformer")
    exact = velocity_of(deep.eval(), *inputs(5))
    half = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    latents, timesteps, prompt_embeds = (torch.from_numpy(x) for x in inputs(5))
    with torch.no_grad():
        theirs = half(latents.moveaxis(-1, 1).bfloat16(), timesteps, prompt_embeds.bfloat16()).sample
    theirs = np.moveaxis(theirs.float().numpy(), 1, -1)
    dit = nnx.jit(convert.load_dit(tmp_path, dtype=jnp.bfloat16))
    ours = relative_error(dit(*inputs(5)), exact)
    assert 1e-4 < ours < relative_error(theirs, exact)
    assert ours < 5.5e-3


@pytest.fixture
def exported(folder, tmp_path):
    """A student in diffusers' layout, exported from a training checkpoint."""
    dit = convert.load_dit(folder)
    meta = {"architecture": WAN_DIT.record(dit.config), "student": STUDENT, "step": 3}
    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        params = nnx.to_pure_dict(nnx.state(dit, nnx.Param))
        arguments = ocp.args.Composite(generator=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
        manager.save(3, args=arguments)
        manager.wait_until_finished()
    convert.export_dit(tmp_path / "run", tmp_path / "student", layout="diffusers", max_shard_bytes=500_000)
    return tmp_path / "student"


def test_an_export_loads_in_diffusers_and_predicts_the_same(model, exported):
    loaded, report = diffusers.WanTransformer3DModel.from_pretrained(
        exported, subfolder="transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (exported / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_sampling_from_an_export_as_its_model_card_says(exported, monkeypatch):
    """diffusers' whole pipeline on the card's scheduler, given our noise, makes the video of our own sampler."""
    card = (exported / "README.md").read_text()
    sigmas = json.loads(card.split("sigmas=")[1].split(")")[0])
    transformer = diffusers.WanTransformer3DModel.from_pretrained(exported, subfolder="transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(exported, subfolder="scheduler")
    scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, sigmas=sigmas)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer, vae=None, scheduler=scheduler
    )
    _, _, prompt_embeds = inputs(4, (1, 3, 8, 6))
    shape, keys = (3, 8, 6, 16), jax.random.split(jax.random.key(7), 1)

    def as_torch(array):
        return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())

    pure = jnp.full(1, 1000.0)  # as strong as noise gets
    noises = [as_torch(renoise(jnp.zeros((1, *shape)), keys, step=i, timesteps=pure)) for i in range(len(sigmas))]
    steps = iter(noises)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", lambda *_, **__: next(steps)
    )
    arguments = {"height": 64, "width": 48, "num_frames": 9, "guidance_scale": 1.0, "output_type": "latent"}
    start = initial_noise(keys, shape)
    result = pipeline(
        prompt_embeds=torch.from_numpy(prompt_embeds),
        num_inference_steps=len(sigmas),
        latents=as_torch(start),
        **arguments,
    ).frames
    assert next(steps, None) is None
    dit, timesteps = nnx.jit(convert.load_dit(exported)), convert.student_settings(exported)["timesteps"]
    ours = student_sample(lambda xt, times: dit(xt, times, prompt_embeds), start, keys, timesteps=timesteps)
    assert relative_error(as_torch(ours).numpy(), result.numpy()) < 1e-4

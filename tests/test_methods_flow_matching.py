"""Flow matching: the loss has a known answer, dropped prompts become the negative one, weights are read everywhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import use_devices

from avd_jax import convert
from avd_jax.convert.shipping import write_dit
from avd_jax.data import encoding, shapes_world
from avd_jax.data.encode_sets import encode_videos
from avd_jax.data.inputs import Clip
from avd_jax.errors import UserError
from avd_jax.fields import config_from
from avd_jax.methods import transformers
from avd_jax.methods.flow_matching import FIELDS, RECIPE
from avd_jax.methods.flow_matching.method import losses, matrices_of_blocks, trained_dit
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.training.optimizers import scheduled
from avd_jax.training.trainer import train
from avd_jax.training.update import example_keys

LATENTS, TEXT_DIM, TEXT_LEN = (2, 4, 4, 4), 6, 5


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    use_devices(monkeypatch.setattr, 2, transformers)


@pytest.fixture(scope="module")
def latents_dir(tmp_path_factory):
    """A set of clips whose latents are block means and whose embeddings depend on the text's length."""
    folder = tmp_path_factory.mktemp("data") / "latents"

    def encode(video):
        blocks = video[:, ::4].reshape(video.shape[0], 2, 4, 8, 4, 8, 3).mean((3, 5))
        return jnp.concatenate([blocks, blocks[..., :1]], -1).astype(jnp.bfloat16)

    def embed(texts):
        return [np.full((3, TEXT_DIM), len(text) / 50, np.float32) for text in texts]

    size = {"frames": 5, "height": 32, "width": 32}
    clips = [
        Clip(f"{i}", shapes_world.caption(i), "world", lambda i=i: shapes_world.clip(i, **size)[0]) for i in range(6)
    ]
    text = encoding.TextEncoder(embed, text_len=TEXT_LEN, fingerprint="t")
    vae = encoding.VideoEncoder(encode, fingerprint="v")
    encode_videos(clips, folder, vae=vae, text=text, fps=16, **size)
    return folder


def tiny_config(latents_dir, **changes):
    config = config_from(FIELDS)
    sizes = config.model
    sizes.dim, sizes.ffn_dim, sizes.num_heads, sizes.num_layers, sizes.text_len = 16, 32, 2, 1, TEXT_LEN
    config.data.latents = str(latents_dir)
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 4, 8, 1, 0
    config.optimizer.warmup_steps = 1
    config.update(changes)
    return config


def batch_of(size):
    latents = jax.random.normal(jax.random.key(0), (size, *LATENTS))
    return {"latents": latents, "captions": {"prompt_embeds": jnp.ones((size, TEXT_LEN, TEXT_DIM))}}


def loss_of(network, negative, batch, *, minimum=0.0, prompt_dropout=0.1):
    """Return the loss of each example, with the other settings as they are by default."""
    config = config_from(FIELDS)
    assert (config.timestep.min, config.timestep.max, config.prompt_dropout) == (0.0, 1000.0, 0.1)
    settings = {"shift": config.timestep.shift, "maximum": config.timestep.max}
    loss = losses(network, minimum=minimum, prompt_dropout=prompt_dropout, **settings)
    keys = example_keys(jax.random.key(1), jnp.arange(len(batch["latents"])))
    return loss(generator={}, negative={"prompt_embeds": negative}, keys=keys, **batch)


def test_a_network_that_knows_the_noise_has_no_loss():
    batch = batch_of(8)

    def oracle(params, xt, timesteps, conditions):
        sigmas = timesteps[:, None, None, None, None] / 1000
        return (xt - batch["latents"]) / sigmas

    # At 0 the noise cannot be told.
    loss = jax.jit(lambda: loss_of(oracle, jnp.zeros((TEXT_LEN, TEXT_DIM)), batch, minimum=1.0))()
    assert loss.shape == (8,)
    assert float(jnp.mean(loss)) < 1e-5


def test_timesteps_are_shifted_and_prompts_dropped_as_often_as_asked():
    batch, seen = batch_of(4000), {}

    def network(params, xt, timesteps, conditions):
        seen.update(timesteps=timesteps, embeds=conditions["prompt_embeds"])
        return jnp.zeros_like(xt)

    negative = jnp.arange(TEXT_LEN * TEXT_DIM, dtype=jnp.float32).reshape(TEXT_LEN, TEXT_DIM)
    loss_of(network, negative, batch, prompt_dropout=0.25)
    # The median of uniform times, shifted by 3: 3/2 / (1 + 2/2) = 0.75.
    assert float(jnp.median(seen["timesteps"])) == pytest.approx(750, abs=15)
    dropped = (seen["embeds"] == negative).all((1, 2))
    kept = (seen["embeds"] == 1).all((1, 2))
    assert bool((dropped ^ kept).all())
    assert float(dropped.mean()) == pytest.approx(0.25, abs=0.03)


def test_examples_do_not_depend_on_the_batch_around_them():
    seen = []

    def network(params, xt, timesteps, conditions):
        seen.append((xt, timesteps, conditions["prompt_embeds"]))
        return jnp.zeros_like(xt)

    for size in (2, 4):
        batch = jax.tree.map(lambda array, size=size: array[:size], batch_of(4))
        loss_of(network, jnp.zeros((TEXT_LEN, TEXT_DIM)), batch)
    jax.tree.map(lambda few, many: np.testing.assert_array_equal(few, many[:2]), *seen)


def long_run(latents_dir, workdir, optimizer):
    config = tiny_config(latents_dir, num_steps=60)
    config.optimizer.name = optimizer
    config.optimizer.learning_rate = 1e-2
    return train(RECIPE, config, workdir)


@pytest.fixture(scope="module")
def adamws(latents_dir, tmp_path_factory):
    """What a run with AdamW on one device came to, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch.setattr, 1, transformers)
        workdir = tmp_path_factory.mktemp("adamw")
        return long_run(latents_dir, workdir, "adamw"), workdir


@nnx.jit
def forward(dit, *inputs):
    return dit(*inputs)


def test_weights_of_a_run_are_read_everywhere_and_fine_tuned(adamws, tmp_path, latents_dir):
    whole, workdir = adamws
    assert whole.status == 0
    dit = trained_dit(whole.method, whole.state.networks["generator"].ema)
    model = dit.config
    assert (model.in_dim, model.text_dim, model.text_len) == (4, TEXT_DIM, TEXT_LEN)
    write_dit(dit, tmp_path / "shipped")
    inputs = (jnp.ones((1, *LATENTS)), jnp.array([500.0]), jnp.ones((1, TEXT_LEN, TEXT_DIM)))
    expected = np.asarray(forward(dit, *inputs))
    assert convert.dit_config(tmp_path / "shipped") == model  # text_len too
    np.testing.assert_allclose(forward(convert.load_dit(tmp_path / "shipped"), *inputs), expected, atol=1e-5)
    np.testing.assert_allclose(forward(convert.load_dit(workdir, key="ema"), *inputs), expected, atol=1e-5)

    tuned = tiny_config(latents_dir, init_from=str(tmp_path / "shipped"), num_steps=1)
    tuned.optimizer.learning_rate = 1e-8
    further = train(RECIPE, tuned, tmp_path / "tuned")
    params = further.state.networks["generator"].params
    np.testing.assert_allclose(forward(trained_dit(further.method, params), *inputs), expected, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(adamws, tmp_path, latents_dir, optimizer):
    _, workdir = adamws if optimizer == "adamw" else (long_run(latents_dir, tmp_path, optimizer), tmp_path)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    totals = [line["loss/total"] for line in lines]
    assert np.mean(totals[-10:]) < 0.8 * np.mean(totals[:5])


def test_muon_makes_the_blocks_updates_orthogonal():
    config = config_from(FIELDS)
    config.optimizer.warmup_steps = 0
    sizes = WanDiTConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=TEXT_DIM)
    model = nnx.eval_shape(lambda: WanDiT(sizes, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), nnx.to_pure_dict(nnx.state(model)))
    optimizer = scheduled(config.optimizer, config.num_steps, matrices_of_blocks)
    rng = np.random.default_rng(1)
    gradient = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    updates = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(params), params)[0])(gradient)
    blocks = updates["blocks"]
    for kernel, shape in (
        (blocks["ffn_0"]["kernel"], (16, 32)),
        (blocks["self_attn"]["q"]["kernel"], (16, 2 * 8)),
        (blocks["cross_attn"]["o"]["kernel"], (2 * 8, 16)),
    ):
        for layer in kernel:
            values = np.linalg.svd(np.reshape(layer, shape), compute_uv=False)
            assert values.max() < 2 * np.median(values), "of a random matrix they spread"
            assert values.sum() > 0.8 * len(values) * np.median(values)
    for other in (updates["head"]["head"]["kernel"], blocks["ffn_0"]["bias"]):
        sizes = np.abs(other)
        np.testing.assert_allclose(sizes, sizes.max(), rtol=1e-3, err_msg="AdamW's first update has one size for all")


def test_wrong_values_are_named(tmp_path, latents_dir):
    for field, value, message in (
        ("remat", "all", "remat"),
        ("optimizer.name", "moun", "did you mean 'muon'"),
        ("prompt_dropout", 1.5, "prompt_dropout"),
        ("data.latents", "", "data.latents is empty"),
        ("timestep.min", 1001.0, "timestep.min"),
        ("init_lora", "a.safetensors", "init_lora='a.safetensors' goes with init_from"),
    ):
        config = tiny_config(latents_dir)
        config.update_from_flattened_dict({field: value})
        with pytest.raises(UserError, match=message):
            train(RECIPE, config, tmp_path)

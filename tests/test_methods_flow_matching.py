"""Flow matching: the loss has a known answer, dropped prompts become the negative one, weights are read everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from avd_jax.training.fitting import make_optimizer
from avd_jax.training.pretraining import FIELDS, matrices_of_blocks, pretrain, pretraining_loss, trained_dit
from avd_jax.training.shipping import write_dit
from flax import nnx

from avd_jax import convert
from avd_jax.data import encoding, shapes_world
from avd_jax.data.inputs import Clip
from avd_jax.errors import UserError
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.training.fields import config_from

LATENTS, TEXT_DIM, TEXT_LEN = (2, 4, 4, 4), 6, 5


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
    encoding.encode_videos(clips, folder, vae=vae, text=text, fps=16, **size)
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
    return {"latents": latents, "caption_embeds": jnp.ones((size, TEXT_LEN, TEXT_DIM))}


def test_a_network_that_knows_the_noise_has_no_loss():
    config, batch = config_from(FIELDS), batch_of(8)
    config.timestep.min = 1.0  # at 0 the noise cannot be told

    def oracle(params, xt, timesteps, embeds):
        sigmas = timesteps[:, None, None, None, None] / 1000
        return (xt - batch["latents"]) / sigmas

    loss, _ = pretraining_loss(config, oracle, jnp.zeros((TEXT_LEN, TEXT_DIM)), {}, batch, jax.random.key(1))
    assert float(loss) < 1e-5


def test_timesteps_are_shifted_and_prompts_dropped_as_often_as_asked():
    config, batch, seen = config_from(FIELDS), batch_of(4000), {}
    config.prompt_dropout = 0.25

    def network(params, xt, timesteps, embeds):
        seen.update(timesteps=timesteps, embeds=embeds)
        return jnp.zeros_like(xt)

    negative = jnp.arange(TEXT_LEN * TEXT_DIM, dtype=jnp.float32).reshape(TEXT_LEN, TEXT_DIM)
    pretraining_loss(config, network, negative, {}, batch, jax.random.key(1))
    # The median of uniform times, shifted by 3: 3/2 / (1 + 2/2) = 0.75.
    assert float(jnp.median(seen["timesteps"])) == pytest.approx(750, abs=15)
    dropped = (seen["embeds"] == negative).all((1, 2))
    kept = (seen["embeds"] == 1).all((1, 2))
    assert bool((dropped ^ kept).all())
    assert float(dropped.mean()) == pytest.approx(0.25, abs=0.03)


def test_examples_do_not_depend_on_the_batch_around_them():
    config, seen = config_from(FIELDS), []

    def network(params, xt, timesteps, embeds):
        seen.append((xt, timesteps))
        return jnp.zeros_like(xt)

    for size in (2, 4):
        batch = {name: array[:size] for name, array in batch_of(4).items()}
        pretraining_loss(config, network, jnp.zeros((TEXT_LEN, TEXT_DIM)), {}, batch, jax.random.key(1))
    jax.tree.map(lambda few, many: np.testing.assert_array_equal(few, many[:2]), *seen)


def test_weights_of_a_run_are_read_everywhere_and_fine_tuned(tmp_path, latents_dir):
    status, whole, model = pretrain(tiny_config(latents_dir, num_steps=1), tmp_path / "whole")
    assert status == 0
    assert (model.in_dim, model.text_dim, model.text_len) == (4, TEXT_DIM, TEXT_LEN)
    dit = trained_dit(model, whole.ema)
    write_dit(dit, tmp_path / "shipped")
    inputs = (jnp.ones((1, *LATENTS)), jnp.array([500.0]), jnp.ones((1, TEXT_LEN, TEXT_DIM)))
    expected = np.asarray(dit(*inputs))
    assert convert.dit_config(tmp_path / "shipped") == model  # text_len too
    np.testing.assert_allclose(convert.load_dit(tmp_path / "shipped")(*inputs), expected, atol=1e-5)
    np.testing.assert_allclose(convert.load_dit(tmp_path / "whole", key="ema")(*inputs), expected, atol=1e-5)

    tuned = tiny_config(latents_dir, init_from=str(tmp_path / "shipped"), num_steps=1)
    tuned.optimizer.learning_rate = 1e-8
    _, state, _ = pretrain(tuned, tmp_path / "tuned")
    np.testing.assert_allclose(trained_dit(model, state.params)(*inputs), expected, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tmp_path, latents_dir, optimizer):
    config = tiny_config(latents_dir, num_steps=60)
    config.optimizer.name = optimizer
    config.optimizer.learning_rate = 1e-2
    pretrain(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss/total": ')[1].split(",")[0]) for line in lines]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_muon_makes_the_blocks_updates_orthogonal():
    config = config_from(FIELDS)
    config.optimizer.warmup_steps = 0
    sizes = WanDiTConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=TEXT_DIM)
    params = nnx.to_pure_dict(nnx.state(WanDiT(sizes, rngs=nnx.Rngs(0))))
    optimizer = make_optimizer(config, matrices_of_blocks)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    gradient = tree.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
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
    ):
        config = tiny_config(latents_dir)
        config.update_from_flattened_dict({field: value})
        with pytest.raises(UserError, match=message):
            pretrain(config, tmp_path)

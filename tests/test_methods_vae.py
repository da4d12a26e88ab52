"""Training a VAE: the loss sees the VAE's own network, falls, and a run resumes bit for bit."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import run_method

from avd_jax import convert
from avd_jax.convert.shipping import write_vae
from avd_jax.data import shapes_world
from avd_jax.errors import UserError
from avd_jax.fields import config_from
from avd_jax.methods.vae import FIELDS, RECIPE
from avd_jax.methods.vae.config import model_config
from avd_jax.methods.vae.method import FIRST_LOG_VARIANCE, crops, decode, new_vae, posterior, trained_vae
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig
from avd_jax.training.trainer import train
from avd_jax.training.update import passes_of

# Every kind of layer, in few of them: halves height and width twice and frames once.
SIZES = WanVAEConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(False, True))


def tiny_config(**changes):
    config = config_from(FIELDS)
    for name in ("base_dim", "dim_mult", "num_res_blocks", "temporal_downsample"):
        config.model[name] = getattr(SIZES, name)
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 4, 1, 1, 0
    config.data.crop_frames, config.data.crop_size = 5, 16
    config.optimizer.warmup_steps = 1
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def vae():
    return nnx.jit(lambda: WanVAE(SIZES, nnx.Rngs(0)))()


def test_the_trained_network_is_the_one_that_is_used(vae):
    video = shapes_world.clip(0, frames=9, height=16, width=16)[0][None]
    mean, log_variance = jax.jit(partial(posterior, vae))(video)
    assert mean.shape == log_variance.shape == (1, 5, 4, 4, 16)
    normalised = (np.asarray(mean) - np.array(SIZES.latents_mean)) / np.array(SIZES.latents_std)
    np.testing.assert_allclose(vae.encode(video), normalised, atol=2e-5)
    decoded = jax.jit(partial(decode, vae))(mean)
    np.testing.assert_allclose(decoded, vae.decode(vae.encode(video)), atol=1e-4)


def loss_of(vae, video, *, gradient, kl):
    """Return the loss of a video as a run computes it, and what it is made of; each test replaces the network."""
    config = tiny_config()
    config.loss.gradient, config.loss.kl = gradient, kl
    (one,) = passes_of(RECIPE.build(config).updates[0])  # one reconstruction, for all terms
    params = nnx.to_pure_dict(nnx.state(vae))
    return one.loss({"vae": params, "video": video, "noise_key": jax.random.key(0)})


def replace_network(monkeypatch, decoded):
    """Let the posterior be a normal distribution, and any latents be decoded to one video."""
    monkeypatch.setattr("avd_jax.methods.vae.method.posterior", lambda *_: (jnp.zeros((1, 3, 4, 4, 16)),) * 2)
    monkeypatch.setattr("avd_jax.methods.vae.method.decode", lambda *_: decoded)


def test_loss_of_a_perfect_and_of_a_shifted_copy(vae, monkeypatch):
    video = jnp.asarray(shapes_world.clip(1, frames=5, height=16, width=16)[0][None])
    replace_network(monkeypatch, video + 0.1)
    loss, parts = loss_of(vae, video, gradient=0.5, kl=0.0)
    assert float(loss) == pytest.approx(0.1, abs=1e-5)  # a constant error has no gradient
    assert float(parts["gradient"]) < 1e-5
    assert float(parts["reconstruction"]["psnr"]) == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-2)


def test_the_gradient_is_that_of_neighbouring_pixels_and_has_its_weight(vae, monkeypatch):
    video = jnp.zeros((1, 5, 16, 16, 3))
    error = jnp.zeros_like(video).at[:, :, ::2].set(0.1)  # every second row
    replace_network(monkeypatch, video + error)
    loss, parts = loss_of(vae, video, gradient=0.5, kl=0.0)
    assert float(parts["l1"]) == pytest.approx(0.05, abs=1e-5)
    assert float(parts["gradient"]) == pytest.approx(0.1, abs=1e-5)
    assert float(loss) == pytest.approx(0.05 + 0.5 * 0.1, abs=1e-5)


def test_divergence_is_zero_for_a_normal_posterior(vae, monkeypatch):
    video = jnp.zeros((1, 5, 16, 16, 3))
    replace_network(monkeypatch, video)
    assert float(loss_of(vae, video, gradient=0, kl=1)[1]["kl"]) == 0


def test_crops_are_cut_from_the_world_and_fixed_by_their_number():
    config = tiny_config(batch_size=2)
    batch = crops(config, 3)
    assert batch.shape == (2, 5, 16, 16, 3)
    np.testing.assert_array_equal(batch, crops(config, 3))
    assert np.abs(batch - crops(config, 4)).max() > 0.1
    whole, _ = shapes_world.clip(config.data.first_clip + 6, frames=17, height=64, width=64)
    windows = np.lib.stride_tricks.sliding_window_view(whole, batch[0].shape)
    assert (windows[:, :, :, 0] == batch[0]).all((-4, -3, -2, -1)).any()


def test_a_new_vae_carries_colours_and_motion():
    """A mosaic of 8 pixel cells: right for pictures without details, in every frame, to within the norms' bend."""
    colours = jnp.array([[0.4, -0.5, 0.1], [-0.6, -0.6, -0.5], [0.1, 0.5, 0.7]])
    video = jnp.broadcast_to(colours[:, None, None, None], (3, 9, 16, 16, 3))
    video = video.at[:, 5:, :, 8:].set(-video[:, 5:, :, 8:])  # after a cut: frames 5 to 8 are the last latent
    vae = new_vae(model_config(config_from(FIELDS)), seed=0)

    @jax.jit
    def there_and_back(video):
        mean, log_variance = posterior(vae, video)
        return decode(vae, mean), log_variance

    decoded, log_variance = there_and_back(video)
    np.testing.assert_allclose(log_variance, FIRST_LOG_VARIANCE, atol=1e-5)
    error = np.abs(decoded - video)
    assert error.mean() < 0.1
    assert error.max() < 0.4


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_finite_weights_resumes_bit_for_bit_and_refuses_another_config(tmp_path):
    config = tiny_config(num_steps=2, checkpoint_every=1)
    run = run_method(RECIPE, config, tmp_path)
    assert run.status == 0
    assert int(run.state.step) == 2
    lines = metrics(tmp_path)
    for line in lines:
        assert np.isfinite(line["loss/total"])
        parts = line["loss/l1"] + 0.5 * line["loss/gradient"] + 1e-4 * line["loss/kl"]
        assert line["loss/total"] == pytest.approx(parts, rel=1e-5)
        assert np.isfinite(line["psnr"])
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "gone")  # as if it had been killed after step 1
    jax.tree.map(np.testing.assert_array_equal, run_method(RECIPE, config, tmp_path).state, run.state)
    assert [line["loss/total"] for line in metrics(tmp_path)] == [line["loss/total"] for line in lines]
    with pytest.raises(UserError, match="other settings"):
        train(RECIPE, tiny_config(num_steps=2, seed=1), tmp_path)


def test_written_weights_are_read_back_with_their_statistics(tmp_path, vae):
    params = nnx.to_pure_dict(nnx.state(vae))
    config = tiny_config()
    config.data.height = config.data.width = 16
    config.data.frames = 5
    trained = trained_vae(config, params, clips=4, batch_size=2)
    write_vae(trained, tmp_path)
    loaded = convert.load_vae(tmp_path)
    assert loaded.config == trained.config
    videos = [shapes_world.clip(config.data.first_clip - 4 + i, frames=5, height=16, width=16)[0] for i in range(4)]
    latents = np.asarray(loaded.encode(np.stack(videos)))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=1e-4)
    deviation = latents.std((0, 1, 2, 3))
    assert deviation.max() == pytest.approx(1, abs=1e-3)
    assert deviation.max() < 1.001


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.crop_size", 12, "crop_size=12"),
        ("data.crop_size", 72, "no larger"),
        ("data.crop_frames", 4, "4n"),
        ("data.crop_frames", 21, "more than"),
        ("num_steps", 0, "at least 1"),
    ],
)
def test_wrong_values_are_named(tmp_path, field, value, message):
    config = config_from(FIELDS)
    config.model.dim_mult, config.model.temporal_downsample = (1, 1, 1, 1), (False, True, True)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        train(RECIPE, config, tmp_path)

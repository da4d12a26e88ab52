"""The FLOPs of a cycle against those of its parts."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from training_cases import make_config

from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training import throughput


def make_run(devices: int, kind: str):
    """A run whose updates are matrix products: 2 and 5, and 3 for each trip of a rollout."""
    mesh = make_mesh(devices=jax.devices()[:devices])

    @jax.jit
    def fake_score_step(state, frozen, batch, key):
        rows = batch["prompt_embeds"][:, 0].astype(jnp.float32)
        once = rows @ state["square"]
        stop = jax.random.randint(key, (), 0, 4)
        return jax.lax.fori_loop(0, stop, lambda _, x: x @ state["square"], once)

    @jax.jit
    def generator_step(state, frozen, batch, key):
        return batch["caption_embeds"][:, 0].astype(jnp.float32) @ state["wide"], batch["latents"]

    fake_device = SimpleNamespace(device_kind=kind)
    return SimpleNamespace(
        config=make_config(batch_size=8, fake_score_updates=5),
        mesh=SimpleNamespace(devices=SimpleNamespace(flat=[fake_device]), size=devices),
        rows=batch_rows(mesh, 8),
        model_config=SimpleNamespace(text_len=4, text_dim=16),
        info=SimpleNamespace(latents_shape=(1, 2, 2, 4)),
        abstract={
            "square": jax.ShapeDtypeStruct((16, 16), jnp.float32),
            "wide": jax.ShapeDtypeStruct((16, 100), jnp.float32),
        },
        frozen={},
        fake_score_step=fake_score_step,
        generator_step=generator_step,
    )


def test_a_cycle_is_its_updates_with_the_expected_rollout():
    square, wide = 2 * 8 * 16 * 16, 2 * 8 * 16 * 100
    assert throughput.cycle_flops(make_run(1, "cpu")) == 5 * (square + 1.5 * square) + wide


def test_more_devices_would_take_less_time_and_unknown_ones_nobody_knows():
    one, four = (throughput.seconds_at_peak(make_run(devices, "TPU v5 lite")) for devices in (1, 4))
    assert one == throughput.cycle_flops(make_run(1, "")) / 197e12
    assert four == pytest.approx(one / 4)
    assert throughput.seconds_at_peak(make_run(1, "cpu")) is None

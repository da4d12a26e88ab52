"""The loop of one network and one loss: a known optimum, exact resumption, skipped updates."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from avd_jax.training.pretraining import FIELDS

from avd_jax.errors import UserError
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training import fitting
from avd_jax.training.fields import config_from

TARGET = jnp.array([1.0, -2.0, 3.0])


def config_for(**changes):
    config = config_from(FIELDS)
    config.num_steps, config.log_every, config.checkpoint_every = 6, 1, 2
    config.optimizer.learning_rate, config.optimizer.warmup_steps, config.ema_decay = 0.1, 1, 0.5
    config.data.latents = "unused"
    config.update(changes)
    return config


def loss(params, batch, key):
    noise = 0.01 * jax.random.normal(key, TARGET.shape)
    return jnp.sum(jnp.square(params["x"] - TARGET + noise)) * batch["scale"], {"loss/part": batch["scale"]}


def run(config, workdir, scale=lambda number: 1.0, at_batch=lambda number: None, inputs=None):
    def build():
        def make(number):
            at_batch(number)
            return {"scale": jnp.float32(scale(number))}

        return fitting.build_fit(
            config,
            make_mesh(),
            loss=loss,
            abstract_params={"x": jax.ShapeDtypeStruct((3,), jnp.float32)},
            init_params=lambda shardings: {"x": jnp.zeros(3)},
            architecture={"name": "line", "config": {}},
            batches=fitting.CountedBatches(make),
            inputs=inputs or {},
        )

    return fitting.fit(build, config, workdir, movable=("data.latents",))


def test_it_finds_the_optimum(tmp_path):
    _, state = run(config_for(num_steps=150, checkpoint_every=0), tmp_path)
    np.testing.assert_allclose(state.params["x"], TARGET, atol=0.05)
    np.testing.assert_allclose(state.ema["x"], TARGET, atol=0.05)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    _, whole = run(config_for(), tmp_path / "whole", scale=lambda number: 1 + number)
    run(config_for(), tmp_path / "parts", scale=lambda number: 1 + number)
    (tmp_path / "parts" / "checkpoints" / "6").rename(tmp_path / "gone")  # as if it had been killed after step 4
    _, resumed = run(config_for(), tmp_path / "parts", scale=lambda number: 1 + number)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_path_may_change_but_not_what_it_leads_to(tmp_path):
    run(config_for(num_steps=2), tmp_path, inputs={"data.latents": "aaaa"})
    moved = config_for(num_steps=2)
    moved.data.latents = "elsewhere"
    assert run(moved, tmp_path, inputs={"data.latents": "aaaa"})[0] == 0
    with pytest.raises(UserError, match=r"/2: the run began with other contents of config.data.latents; name a copy"):
        run(moved, tmp_path, inputs={"data.latents": "bbbb"})
    moved.seed = 1
    with pytest.raises(UserError, match=r"config\.seed was 0, is 1"):
        run(moved, tmp_path, inputs={"data.latents": "aaaa"})


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    def stop(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    status, stopped = run(config_for(checkpoint_every=0), tmp_path / "parts", at_batch=stop)
    assert status == 128 + signal.SIGTERM
    assert int(stopped.step) == 3
    status, resumed = run(config_for(checkpoint_every=0), tmp_path / "parts")
    assert status == 0
    _, whole = run(config_for(checkpoint_every=0), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_a_non_finite_update_changes_nothing_and_too_many_stop_the_run(tmp_path):
    _, state = run(config_for(num_steps=2), tmp_path / "one", scale=lambda number: np.nan if number else 1.0)
    _, before = run(config_for(num_steps=1, checkpoint_every=0), tmp_path / "before")
    assert int(state.step) == 2
    assert int(state.skipped_in_row) == 1
    np.testing.assert_array_equal(state.ema["x"] * 0, 0)
    assert np.isfinite(before.params["x"]).all()
    with pytest.raises(UserError, match="max_nonfinite"):
        run(config_for(num_steps=9, max_nonfinite=2), tmp_path / "all", scale=lambda number: np.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_every": 0}, "config.log_every=0 must be at least 1"),
        ({"checkpoint.keep": 0}, "config.checkpoint.keep=0 must be at least 1"),
        ({"ema_decay": 1.0}, "config.ema_decay=1.0 must be at least 0 and below 1"),
        ({"optimizer.learning_rate": -1e-3}, "config.optimizer.learning_rate=-0.001 must be 0 or a positive number"),
        (
            {"optimizer.max_grad_norm": float("nan")},
            "config.optimizer.max_grad_norm=nan must be 0 or a positive number",
        ),
    ],
)
def test_the_fields_that_every_training_has_are_checked(change, message):
    config = config_for()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=re.escape(message)):
        fitting.check_shared(config, FIELDS)

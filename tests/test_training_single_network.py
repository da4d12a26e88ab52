"""The trainer with the smallest method: a known optimum, exact resumption, skipped updates, folders of other runs."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.fields import Field, check_values, config_from, with_defaults
from avd_jax.parallel.mesh import make_mesh
from avd_jax.training.config import RUN_FIELDS, SCHEDULE_FIELDS
from avd_jax.training.method import BatchField, Method, Recipe, Term, Trained, Update
from avd_jax.training.optimizers import growing_decay, scheduled
from avd_jax.training.trainer import train

TARGET = jnp.array([1.0, -2.0, 3.0])
FIELDS = {
    **with_defaults(RUN_FIELDS, method="line"),
    **SCHEDULE_FIELDS,
    "data.latents": Field("unused", "a path", changeable=True),
}


def config_for(**changes):
    config = config_from(FIELDS)
    config.num_steps, config.log_every, config.checkpoint_every = 6, 1, 2
    config.optimizer.learning_rate, config.optimizer.warmup_steps, config.ema_decay = 0.1, 1, 0.5
    config.update(changes)
    return config


class Counted:
    """Endless batches made from their number."""

    def __init__(self, make):
        self._make, self._number = make, 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = self._make(self._number)
        self._number += 1
        return batch

    def get_state(self):
        return {"batch": self._number}

    def set_state(self, state):
        self._number = state["batch"]


def loss(line, scale, keys):
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, TARGET.shape))(keys)
    return jnp.sum(jnp.square(line["x"] - TARGET + noise), axis=-1) * scale


def run(config, workdir, scale=lambda number: 1.0, at_batch=lambda number: None, inputs=None, name="line"):
    """Train three numbers; `scale` is that of the loss of a batch."""

    def build(config, *, devices=None, video=None):
        def make(number):
            at_batch(number)
            return {"scale": np.full(config.batch_size, scale(number), np.float32)}

        start = {"x": jnp.zeros(3)}
        line = Trained(
            abstract=jax.eval_shape(lambda: start),
            start=lambda shardings: start,
            optimizer=scheduled(config.optimizer, config.num_steps),
            ema_decay=growing_decay(config.ema_decay),
        )
        return Method(
            name=name,
            main="line",
            mesh=make_mesh(),
            networks={"line": line},
            updates=(Update("total", "line", (Term("distance", 1.0, ("line", "scale", "keys"), loss),)),),
            fields={"scale": BatchField(jax.ShapeDtypeStruct((config.batch_size,), jnp.float32))},
            batches=lambda fresh: Counted(make),
            record=lambda: {"architecture": {"name": "line", "config": {}}},
            inputs=lambda: inputs or {},
        )

    def validate(config):
        check_values(config, FIELDS)

    outcome = train(Recipe(name, FIELDS, validate, validate, build), config, workdir)
    return outcome.status, outcome.state


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_finds_the_optimum(tmp_path):
    _, state = run(config_for(num_steps=150, checkpoint_every=0), tmp_path)
    line = state.networks["line"]
    np.testing.assert_allclose(line.params["x"], TARGET, atol=0.05)
    np.testing.assert_allclose(line.ema["x"], TARGET, atol=0.05)
    assert line.latest is line.ema


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    _, whole = run(config_for(), tmp_path / "whole", scale=lambda number: 1 + number)
    run(config_for(), tmp_path / "parts", scale=lambda number: 1 + number)
    (tmp_path / "parts" / "checkpoints" / "6").rename(tmp_path / "gone")  # as if it had been killed after step 4
    _, resumed = run(config_for(), tmp_path / "parts", scale=lambda number: 1 + number)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_every_line_of_the_log_has_loss_and_norm_and_what_was_skipped(tmp_path):
    run(config_for(num_steps=2), tmp_path, scale=lambda number: [1.0, np.nan][number])
    first, second = metrics(tmp_path)
    assert first["loss/total"] == pytest.approx(float(jnp.sum(TARGET**2)), rel=0.02)
    assert first["grad_norm/total"] == pytest.approx(2 * float(jnp.linalg.norm(TARGET)), rel=0.02)
    assert (first["skipped/total"], first["skipped/in_row"]) == (0, 0)
    assert (second["loss/total"], second["grad_norm/total"]) == (None, None)
    assert (second["skipped/total"], second["skipped/in_row"]) == (1, 1)
    assert "loss/distance" not in first, "a loss of one term is its total"


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


def test_a_signal_saves_and_the_same_command_resumes(tmp_path):
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
    line = state.networks["line"]
    assert int(state.step) == 2
    assert int(line.skipped_in_row) == int(line.skipped) == 1
    np.testing.assert_array_equal(line.ema["x"] * 0, 0)
    assert np.isfinite(before.networks["line"].params["x"]).all()
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
def test_the_fields_that_every_training_has_are_checked(tmp_path, change, message):
    config = config_for()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=re.escape(message)):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_an_older_version_is_named_and_left_as_it_is(tmp_path):
    run(config_for(num_steps=2), tmp_path)
    path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta.pop("format") == 2
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError) as raised:
        run(config_for(num_steps=2), tmp_path)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/checkpoints/2: is of an older version of avd_jax (format 1, here 2)")
    assert message.endswith("end the run with that version, or begin one in another --workdir")
    assert "\n" not in message
    assert json.loads(path.read_text()) == meta


def test_a_folder_of_another_method_is_named(tmp_path):
    run(config_for(num_steps=2), tmp_path)
    with pytest.raises(UserError, match=r"holds a run of the method 'line', the config is of 'curve'; use its") as one:
        run(config_for(num_steps=2, method="curve"), tmp_path, name="curve")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"/2: is a run of the method 'line', the config is of 'curve'; use its") as two:
        run(config_for(num_steps=2, method="curve"), tmp_path, name="curve")
    assert "\n" not in f"{one.value}{two.value}"

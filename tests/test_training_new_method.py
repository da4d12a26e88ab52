"""What CONTRIBUTING promises of a new method and of a new term, done: the rest follows from what they declare."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
import toy_method
from training_cases import DIT, train, use_linear_network, write_sets, write_weights

from avd_jax.errors import UserError
from avd_jax.fields import Field, config_from, not_negative
from avd_jax.methods.avd import RECIPE, terms
from avd_jax.methods.avd import config as avd_config
from avd_jax.training import trainer
from avd_jax.training.assembly import Assembly
from avd_jax.training.method import Term

TESTS = Path(__file__).parent


def make_config(**changes):
    config = config_from(toy_method.FIELDS)
    config.update_from_flattened_dict(changes)
    return config


def run(workdir, **changes):
    return trainer.train(toy_method.RECIPE, make_config(**changes), workdir)


def slow_down(after):
    """Let each batch take a second, from this number on: a run that is to be killed does not end before."""
    points = toy_method.points
    toy_method.points = lambda size, number: time.sleep(number >= after) or points(size, number)


def saved(workdir, step):
    """Every array of a checkpoint, as bytes."""
    folder, found = workdir / "checkpoints" / str(step), {}
    for item in (child for child in folder.iterdir() if (child / "_METADATA").is_file()):
        for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(item)):
            found[f"{item.name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    return found


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_is_whole_in_60_lines():
    assert len(Path(toy_method.__file__).read_text().splitlines()) <= 60


def test_it_learns_and_shows_in_logs_and_checkpoints(tmp_path, capsys):
    outcome = run(tmp_path, num_steps=200, checkpoint_every=0, log_every=200, **{"loss.small": 0.0})
    line = outcome.state.networks["line"]
    np.testing.assert_allclose([line.params["slope"], line.params["height"]], [2, -1], atol=0.02)
    assert {"loss/line", "loss/fit", "loss/small", "loss/guess", "grad_norm/line", "grad_norm/guess"} < set(
        lines(tmp_path)[-1]
    )
    items = {child.name for child in (tmp_path / "checkpoints" / "200").iterdir() if child.is_dir()}
    assert items >= {"line", "line_ema", "guess", "guess_ema", "optimizers", "progress", "meta"}
    out = capsys.readouterr().out
    assert "one cycle (2 guess updates, 1 line update) costs 0 FLOPs an example" in out
    assert "done: 200 steps" in out


def test_it_is_resumed_after_a_kill_bit_for_bit(tmp_path):
    """SIGKILL at some moment while it trains; the same command ends where a run that nobody stopped does."""
    script = (
        "import pathlib, sys; sys.path[:0] = sys.argv[2:]; import test_training_new_method as t; "
        "t.slow_down(after=30); t.run(pathlib.Path(sys.argv[1]), num_steps=60, checkpoint_every=20)"
    )
    process = processes.start(["-c", script, tmp_path / "killed", TESTS, TESTS.parent])
    until = time.monotonic() + 120
    while not any(path.name.isdigit() for path in (tmp_path / "killed" / "checkpoints").glob("*")):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for name in ("killed", "whole"):
        assert run(tmp_path / name, num_steps=60, checkpoint_every=20).status == 0
    assert saved(tmp_path / "killed", 60) == saved(tmp_path / "whole", 60)
    losses = [[line["loss/line"] for line in lines(tmp_path / name)] for name in ("killed", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60


def test_its_checkpoints_are_of_no_other_method(tmp_path):
    run(tmp_path, num_steps=2)
    other = dataclasses.replace(toy_method.RECIPE, build=_renamed("other"))
    with pytest.raises(UserError, match=r"/2: is a run of the method 'toy', the config is of 'other'; use"):
        trainer.train(other, make_config(num_steps=2), tmp_path)


def _renamed(name):
    def build(config, **options):
        return dataclasses.replace(toy_method.build(config, **options), name=name)

    return build


# A new term: a function, a row of the config, an entry of the list.


@pytest.fixture
def with_a_new_term(monkeypatch):
    original = terms.generator_terms

    def generator_terms(weights):
        brightness = Term("brightness", weights.brightness, ("x0",), lambda x0: jnp.mean(x0, axis=(1, 2, 3, 4)) ** 2)
        return (*original(weights), brightness)

    use_linear_network(monkeypatch.setattr)
    monkeypatch.setattr(terms, "generator_terms", generator_terms)
    row = {"loss.brightness": Field(0.0, "weight of the samples' mean; 0 switches the term off", not_negative)}
    monkeypatch.setattr(avd_config, "FIELDS", avd_config.FIELDS | row)
    monkeypatch.setattr("training_cases.RECIPE", dataclasses.replace(RECIPE, fields=avd_config.FIELDS))


def test_a_new_term_is_summed_logged_and_switched_off(with_a_new_term, tmp_path):
    latents, prompts = write_sets(tmp_path)
    config = config_from(avd_config.FIELDS)
    config.init_from = str(write_weights(tmp_path / "dit", DIT))
    config.data.latents, config.data.prompts = str(latents), str(prompts)
    config.compute_dtype = config.teacher_dtype = "float32"
    config.num_steps, config.batch_size, config.sample_every = 1, 8, 0
    for name in ("distribution_matching", "regression", "temporal"):
        config.loss[name] = 0.0
    with pytest.raises(UserError, match="every term has weight 0"):
        train(config, tmp_path / "off")

    config.loss.brightness = 3.0
    config.student.timesteps = (1000.0,)
    assert train(config, tmp_path / "on") == 0
    (line,) = lines(tmp_path / "on")
    assert line["loss/brightness"] > 0
    assert line["loss/generator"] == pytest.approx(3 * line["loss/brightness"], rel=1e-5)
    assert line["loss/regression"] == line["loss/distribution_matching"] == 0
    # Nothing but the samples is computed for it: no fake_score, no teacher, no captions.
    assembly = Assembly(RECIPE.build(config))
    assert set(assembly.abstract.networks) == {"generator"}
    assert assembly.calls[0].fields == ("prompts", "latents", "canvas")

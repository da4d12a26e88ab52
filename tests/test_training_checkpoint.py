"""Checkpoints: every leaf comes back, the newest and the best stay, a full disk and damage are one line."""

import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_cases import DIT, linear_params, make_config, make_method, small_disk, start_state

from avd_jax import convert
from avd_jax.errors import UserError
from avd_jax.methods.transformers import architecture
from avd_jax.models.functional import make_denoiser
from avd_jax.training.checkpoint import Checkpoints
from avd_jax.training.state import abstract_state


def random_state(config, seed=0, size=4, params=None):
    """A state in which every leaf has values of its own."""
    params = linear_params(0, size) if params is None else params
    state = start_state(make_method(config, abstract=params), params)
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == bool:
            return jnp.asarray(rng.random(leaf.shape) < 0.5)
        return jnp.asarray(100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(fill, state)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_round_trip(tmp_path, ema_decay):
    config = make_config(ema_decay=ema_decay)
    states = {step: random_state(config, step) for step in (1, 2)}
    checkpoints = Checkpoints(tmp_path, **config.checkpoint)
    assert checkpoints.latest_step() is None
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step, "list": [1, 2.5, "x"]}, {})
    checkpoints.wait()

    again = Checkpoints(tmp_path, **config.checkpoint)
    assert again.latest_step() == 2
    for step, state in states.items():
        assert again.meta(step) == {"step": step, "list": [1, 2.5, "x"]}
        chex.assert_trees_all_equal(again.restore(step, abstract(state)), state, strict=True)


def test_moments_come_back_to_the_hosts_memory(tmp_path):
    config = make_config(optimizer__memory="host")
    state = random_state(config)
    like = abstract_state(make_method(config, abstract=linear_params()))
    state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, like)
    checkpoints = Checkpoints(tmp_path, **config.checkpoint)
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    restored = checkpoints.restore(1, like)
    chex.assert_trees_all_equal(restored, state)
    kinds = [[leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)] for tree in (restored, like)]
    assert kinds[0] == kinds[1]
    assert "pinned_host" in kinds[0]


def test_each_network_is_found_by_those_who_load_weights(tmp_path):
    abstract = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat="none").abstract_params()
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    config = make_config(ema_decay=0.9)
    state, checkpoints = random_state(config, params=zeros), Checkpoints(tmp_path, **config.checkpoint)
    checkpoints.save(1, state, {"main": "generator", "architecture": architecture(DIT)}, {})
    checkpoints.wait()
    generator, fake_score = state.networks["generator"], state.networks["fake_score"]
    for key, params in (("generator", generator.params), ("ema", generator.ema), ("critic", fake_score.params)):
        found = nnx.to_pure_dict(nnx.state(convert.load_dit(tmp_path, key=key)))
        chex.assert_trees_all_equal(found, params)


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    """The step that follows reuses the state's memory while the checkpoint is still being written."""
    config = make_config()
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state), donate_argnums=0)
    state = random_state(config, size=256)
    checkpoints, expected = Checkpoints(tmp_path, **config.checkpoint), {}
    for number in range(1, 4):
        expected[number] = jax.tree.map(np.array, state)
        checkpoints.save(number, state, {}, {})
        for _ in range(3):
            state = step(state)
    checkpoints.wait()
    for number in (2, 3):
        chex.assert_trees_all_equal(checkpoints.restore(number, abstract(state)), expected[number], strict=True)


def test_the_newest_stay(tmp_path):
    config = make_config(checkpoint__keep=2)
    checkpoints, state = Checkpoints(tmp_path, **config.checkpoint), random_state(config)
    for step in range(1, 6):
        checkpoints.save(step, state, {}, {"loss/regression": 1.0})
    checkpoints.save(5, state, {}, {})  # a second time: nothing to do
    checkpoints.wait()
    assert steps(tmp_path) == [4, 5]


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_best_stays_too_in_later_runs_as_well(tmp_path, mode, best):
    config = make_config(checkpoint__keep=1, checkpoint__best_metric="loss/regression", checkpoint__best_mode=mode)
    state, values = random_state(config), {1: 0.5, 2: 0.25, 3: 0.75, 4: 0.5, 5: 0.5}
    for run in ([1, 2, 3], [4, 5]):
        checkpoints = Checkpoints(tmp_path, **config.checkpoint)
        for step in run:
            checkpoints.save(step, state, {}, {"loss/regression": values[step], "other": 0.0})
        checkpoints.wait()
    assert steps(tmp_path) == [best, 5]


def test_a_checkpoint_before_the_first_metrics_is_no_best_one(tmp_path):
    config = make_config(checkpoint__keep=1, checkpoint__best_metric="loss/regression")
    checkpoints, state = Checkpoints(tmp_path, **config.checkpoint), random_state(config)
    checkpoints.save(0, state, {}, {})
    for step in (1, 2):
        checkpoints.save(step, state, {}, {"loss/regression": float(step)})
    checkpoints.wait()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path, mode):
    config = make_config(checkpoint__keep=1, checkpoint__best_metric="loss/regression", checkpoint__best_mode=mode)
    checkpoints, state = Checkpoints(tmp_path, **config.checkpoint), random_state(config)
    for step, value in enumerate((1.0, np.nan, 1.0, np.inf, -np.inf, 1.5 if mode == "min" else 0.5), start=1):
        checkpoints.save(step, state, {}, {"loss/regression": value})
    checkpoints.wait()
    assert steps(tmp_path)[0] in (1, 3)
    assert steps(tmp_path)[1:] == [6]


def test_a_best_metric_that_is_not_logged(tmp_path):
    config = make_config(checkpoint__best_metric="loss/regresion")
    checkpoints = Checkpoints(tmp_path, **config.checkpoint)
    with pytest.raises(UserError, match=r"best_metric='loss/regresion' is not logged .did you mean 'loss/regression'"):
        checkpoints.check_best_metric({"loss/temporal": 0.0, "loss/regression": 1.0})
    Checkpoints(tmp_path, **make_config().checkpoint).check_best_metric({})


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    config = make_config(checkpoint__keep=5)
    state = random_state(config, size=500)  # 6 MB
    with small_disk(tmp_path / "disk", 15) as workdir:
        checkpoints = Checkpoints(workdir, **config.checkpoint)
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()

        def save_until_it_is_full():
            for step in range(2, 5):
                checkpoints.save(step, state, {}, {})
            checkpoints.wait()

        with pytest.raises(UserError) as error:
            save_until_it_is_full()
        last = steps(workdir)[-1]
        assert re.fullmatch(
            r".*/checkpoints: no space left on the disk for the (last checkpoint|checkpoint of step \d); "
            rf"step {last} is the last good one. Free some space and run the same command again",
            str(error.value),
        )

        again = Checkpoints(workdir, **config.checkpoint)  # removes what is half-written
        assert again.latest_step() == last
        chex.assert_trees_all_equal(again.restore(last, abstract(state)), state, strict=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = make_config()
    state = random_state(config)
    checkpoints = Checkpoints(tmp_path, **config.checkpoint)
    checkpoints.save(7, state, {}, {})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "7" / "fake_score")
    (tmp_path / "checkpoints" / "7" / "meta" / "metadata").write_text("{")
    again = Checkpoints(tmp_path, **config.checkpoint)
    for read in (lambda: again.restore(7, abstract(state)), lambda: again.meta(7)):
        with pytest.raises(
            UserError, match=r"checkpoints/7: cannot be read .*; remove it to go on from the one before"
        ):
            read()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"checkpoints: cannot be written .*; choose another --workdir"):
        Checkpoints(tmp_path, **make_config().checkpoint)

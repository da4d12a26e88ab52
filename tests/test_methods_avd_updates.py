"""The two updates: optimizer, accumulation, devices, loss history, skipped updates, EMA, dtypes."""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import (
    DIT,
    generator_loss,
    linear_network,
    linear_params,
    make_batch,
    make_config,
    make_frozen,
    make_method,
    make_student,
    recording,
    start_state,
    steps_of,
)

from avd_jax.models.functional import make_denoiser
from avd_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from avd_jax.parallel.rules import dotted
from avd_jax.training.assembly import Assembly
from avd_jax.training.update import example_keys

FROZEN = make_frozen(linear_params(2), np.ones((8, 16), np.float32))
COMPILED = {}


class Runner:
    """Both updates of the linear network under one config, and the calls that they made."""

    def __init__(self, config, network=linear_network):
        self.config, self.calls = config, []
        self.method = make_method(config, recording(network, self.calls, "student"))
        steps = {name: jax.jit(step) for name, step in steps_of(self.method).items()}
        self.generator, self.fake_score = steps["generator"], steps["fake_score"]

    def init(self, params=None):
        return start_state(self.method, linear_params(0) if params is None else params)


def runner(**fields):
    """Return a compiled pair of updates, one for each config."""
    config = make_config(**fields)
    name = config.to_json()
    if name not in COMPILED:
        COMPILED[name] = Runner(config)
    return COMPILED[name]


def params_of(state, network):
    return state.networks[network].params


def without_counts(networks):
    return {name: dataclasses.replace(network, skipped=None, skipped_in_row=None) for name, network in networks.items()}


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


def assert_same(found, expected):
    chex.assert_trees_all_equal(found, expected)


# The two networks' rates differ, and clipping and the mean show.
UNLIKE = {
    "optimizer__learning_rate": 1e-2,
    "optimizer__fake_score_learning_rate": 0.0,
    "optimizer__max_grad_norm": 1e-3,
    "ema_decay": 0.75,
}


def test_an_update_is_clipped_adamw():
    run = runner(**UNLIKE)
    before, batch, key = run.init(), make_batch(), jax.random.key(1)
    student = make_student(run.config)
    keys, stop = example_keys(key, jnp.arange(4)), student.stop_step(key)

    def loss(params):
        constants = params_of(before, "fake_score"), FROZEN, before.extras["history"], batch, keys, stop
        return generator_loss(run.config, student, linear_network, params, *constants)[0]

    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params_of(before, "generator")))
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient)))
    after, metrics = run.generator(before, FROZEN, batch, key)
    assert float(metrics["grad_norm/generator"]) == pytest.approx(norm, rel=1e-4)
    assert norm > 1e-3
    for name, parameter in params_of(before, "generator").items():
        clipped = gradient[name] * 1e-3 / norm
        moved = clipped / (np.abs(clipped) + 1e-8)  # Adam's first step, both moments corrected
        expected = parameter - 1e-2 * (moved + 0.01 * parameter)
        np.testing.assert_allclose(params_of(after, "generator")[name], expected, rtol=1e-3, atol=1e-5)
        mean = 0.75 * parameter + 0.25 * params_of(after, "generator")[name]
        np.testing.assert_allclose(after.networks["generator"].ema[name], mean, rtol=1e-5)
    assert int(after.step) == 1
    assert_same(params_of(after, "fake_score"), params_of(before, "fake_score"))
    assert_same(after.networks["fake_score"].optimizer, before.networks["fake_score"].optimizer)


def test_fake_scores_update_changes_nothing_else():
    run = runner()
    before = run.init()
    after, metrics = run.fake_score(before, FROZEN, make_batch(), jax.random.key(0))
    assert set(metrics) == {"loss/fake_score", "grad_norm/fake_score", "skipped/total", "skipped/in_row"}
    assert_same(
        (after.step, after.networks["generator"], after.extras),
        (before.step, before.networks["generator"], before.extras),
    )
    assert int(after.networks["fake_score"].skipped) == 0
    assert all(
        (a != b).any()
        for a, b in zip(
            *map(jax.tree.leaves, (params_of(after, "fake_score"), params_of(before, "fake_score"))),
            strict=True,
        )
    )


def test_learning_rates_are_each_networks_own():
    run = runner(**UNLIKE)
    state, _ = run.fake_score(run.init(), FROZEN, make_batch(), jax.random.key(0))
    assert_same(params_of(state, "fake_score"), params_of(run.init(), "fake_score"))
    state, _ = run.generator(state, FROZEN, make_batch(), jax.random.key(0))
    assert max(np.abs(params_of(state, "generator")["mix"] - params_of(run.init(), "generator")["mix"]).ravel()) > 5e-3


def test_metrics():
    _, metrics = runner().generator(runner().init(), FROZEN, make_batch(), jax.random.key(0))
    assert set(metrics) == {
        *(f"loss/{name}" for name in ("generator", "distribution_matching", "regression", "temporal")),
        *("regression/weight", "grad_norm/generator", "skipped/total", "skipped/in_row"),
        *(f"regression/ema_{i}" for i in range(4)),
        *("meter/latent_temporal_variance", "meter/latent_spread", "rollout_stop"),
        *("regression_weight", "timestep_index"),
    }
    by_example = {"regression_weight", "timestep_index"}
    size = make_batch()["latents"].shape[0]
    assert all(value.shape == ((size,) if name in by_example else ()) for name, value in metrics.items())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts):
    fields = {"loss__temporal": 0.0, "optimizer__learning_rate": 1e-3}
    whole, cut = runner(**fields), runner(**fields, accumulation_steps=parts)
    batch, key = make_batch(8), jax.random.key(3)
    for update in ("generator", "fake_score"):
        (a, metrics_a), (b, metrics_b) = (getattr(run, update)(run.init(), FROZEN, batch, key) for run in (whole, cut))
        assert_close(metrics_b, metrics_a, rtol=1e-4)
        assert_close(b, a, rtol=1e-3, atol=1e-5)
        moments = [optax.tree_utils.tree_get(s.networks[update].optimizer, "mu") for s in (b, a)]
        assert_close(*moments, rtol=1e-4, atol=1e-7)


def test_accumulated_temporal_loss_is_the_mean_of_its_parts():
    _, metrics = runner(accumulation_steps=2).generator(runner().init(), FROZEN, make_batch(8), jax.random.key(3))
    _, whole = runner().generator(runner().init(), FROZEN, make_batch(8), jax.random.key(3))
    assert float(metrics["loss/temporal"]) == pytest.approx(float(whole["loss/temporal"]), rel=0.2)
    total = metrics["loss/distribution_matching"] + 0.05 * metrics["loss/temporal"]
    assert float(metrics["loss/generator"]) > float(total)


@pytest.mark.parametrize("uses", ["before", "after"])
def test_loss_history_over_updates_is_the_plain_loop(uses):
    """One example after another in the order of the batch; weights from the history before the batch."""
    run = runner(loss__adaptive_uses=uses)
    state, means = run.init(), {}
    for update in range(4):
        batch, key = make_batch(5, seed=update), jax.random.key(update)
        run.calls.clear()
        state, metrics = run.generator(state, FROZEN, batch, key)
        jax.effects_barrier()
        (regression,) = [call for call in run.calls if np.array_equal(call[4], batch["captions"]["prompt_embeds"])]
        _, _, xt, timesteps, _, velocity = regression
        sigmas = np.float64(timesteps)[:, None, None, None, None] / 1000
        y = np.asarray(batch["latents"], np.float64)
        target = (xt - (1 - sigmas) * y) / sigmas - y
        losses, weights, before = np.mean((velocity - target) ** 2, axis=(1, 2, 3, 4)), [], dict(means)
        for loss, timestep in zip(losses, timesteps, strict=True):
            mean = before.get(timestep, loss)
            if uses == "after":
                mean = 0.95 * mean + 0.05 * loss
            weights.append(1 - 1 / (1 + np.exp(-3 * (loss - mean))))
            means[timestep] = 0.95 * means.get(timestep, loss) + 0.05 * loss
        assert float(metrics["regression/weight"]) == pytest.approx(np.mean(weights), rel=1e-4)
        assert float(metrics["loss/regression"]) == pytest.approx(losses.mean(), rel=1e-4)
        for i, timestep in enumerate((1000, 900, 757, 522)):
            assert bool(state.extras["history"].seen[i]) == (timestep in means)
            assert float(metrics[f"regression/ema_{i}"]) == pytest.approx(means.get(timestep, 0), rel=1e-4)


def test_without_regression_the_history_stays():
    run = runner(loss__regression=0.0)
    state, _ = run.generator(run.init(), FROZEN, make_batch(), jax.random.key(0))
    assert_same(state.extras["history"], run.init().extras["history"])


def broken(batch, name):
    return batch | {name: jax.tree.map(lambda array: array.at[1, 0].set(jnp.nan), batch[name])}


@pytest.mark.parametrize("name", ["latents", "prompts", "captions"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(name):
    run = runner(**UNLIKE)
    good = make_batch()
    before, _ = run.generator(run.init(), FROZEN, good, jax.random.key(0))
    state = before
    for update in range(1, 3):
        state, metrics = run.generator(state, FROZEN, broken(good, name), jax.random.key(update))
        assert not np.isfinite(metrics["loss/generator"])
        assert (int(metrics["skipped/total"]), int(metrics["skipped/in_row"])) == (update, update)
        assert int(state.step) == 1 + update, "a skipped update is an update made, or the run would never end"
        assert_same(without_counts(state.networks), without_counts(before.networks))
        assert_same(state.extras, before.extras)
    state, metrics = run.generator(state, FROZEN, good, jax.random.key(9))
    assert (int(metrics["skipped/total"]), int(metrics["skipped/in_row"])) == (2, 0)
    assert max(np.abs(params_of(state, "generator")["mix"] - params_of(before, "generator")["mix"]).ravel()) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_fake_score_update_that_is_not_finite_is_skipped():
    run = runner()
    state, metrics = run.fake_score(run.init(), FROZEN, broken(make_batch(), "prompts"), jax.random.key(0))
    assert (int(metrics["skipped/total"]), int(metrics["skipped/in_row"])) == (1, 1)
    assert_same(params_of(state, "fake_score"), params_of(run.init(), "fake_score"))
    assert_same(state.networks["fake_score"].optimizer, run.init().networks["fake_score"].optimizer)


def test_good_updates_of_one_network_do_not_hide_that_the_other_makes_none():
    run = runner()
    state, good, bad = run.init(), make_batch(), broken(make_batch(), "latents")
    for cycle in range(1, 4):
        for i in range(2):
            state, _ = run.fake_score(state, FROZEN, good, jax.random.key(i))
        state, metrics = run.generator(state, FROZEN, bad, jax.random.key(2))
        assert int(metrics["skipped/in_row"]) == cycle
    state, metrics = run.generator(state, FROZEN, good, jax.random.key(3))
    assert int(metrics["skipped/in_row"]) == 0
    for cycle in range(1, 4):
        state, _ = run.fake_score(state, FROZEN, broken(good, "prompts"), jax.random.key(3))
        state, metrics = run.generator(state, FROZEN, good, jax.random.key(4))
        assert int(metrics["skipped/in_row"]) == cycle


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    def network(params, latents, timesteps, conditions):
        # sqrt has an infinite derivative at 0.
        return linear_network(params, latents, timesteps, conditions) + jnp.sqrt(0 * params["time"])

    run = Runner(make_config(), network)
    state, metrics = run.generator(run.init(), FROZEN, make_batch(), jax.random.key(0))
    assert np.isfinite(metrics["loss/generator"])
    assert not np.isfinite(metrics["grad_norm/generator"])
    assert int(metrics["skipped/in_row"]) == 1
    assert_same(params_of(state, "generator"), params_of(run.init(), "generator"))


def test_each_update_draws_anew():
    run = runner()
    losses = {
        float(run.generator(run.init(), FROZEN, make_batch(), jax.random.key(seed))[1]["loss/generator"])
        for seed in range(5)
    }
    assert len(losses) == 5
    again = run.generator(run.init(), FROZEN, make_batch(), jax.random.key(0))[1]["loss/generator"]
    assert float(again) in losses


# The transformer itself, on several devices.


@functools.cache
def on_mesh(sizes, compute_dtype="float32", remat="none", number_of_updates=2):
    """Return (state, metrics, abstract, compiled updates) after two rounds of updates on a mesh."""
    config = make_config(
        compute_dtype=compute_dtype, remat=remat, loss__regression_weighting="adaptive", optimizer__learning_rate=1e-3
    )
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(**dict(zip(("data", "fsdp", "seq"), sizes, strict=True)), devices=devices)
    student = make_denoiser(DIT, dtype=compute_dtype, param_dtype="float32", remat=remat)
    teacher = make_denoiser(DIT, dtype="float32", param_dtype="float32", remat="none")
    method = make_method(config, student, teacher, abstract=student.abstract_params(), mesh=mesh)
    assembly = Assembly(method)
    abstract = assembly.abstract
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) * max(leaf.shape[-2:]) ** -0.5,
        student.abstract_params(),
    )
    params = jax.device_put(params, params_of(shardings, "generator"))
    state = jax.jit(functools.partial(start_state, method), out_shardings=shardings)(params)
    frozen = make_frozen(params, jax.device_put(jnp.ones((8, 16)), replicated(mesh)))
    batch = jax.device_put(make_batch(8), batch_sharding(mesh))
    updates = tuple(call.step for call in reversed(assembly.calls))
    logged, history = {}, []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*donated.*")  # memory that could not be reused
        for number in range(2):
            for update in updates[:number_of_updates]:
                old = state
                state, metrics = update(state, frozen, batch, jax.random.key(number))
                logged |= {f"{number}/{name}": np.asarray(value) for name, value in metrics.items()}
                history.append(old)
    return state, logged, abstract, updates, history


MESHES = [(2, 2, 2)]


@pytest.mark.parametrize("sizes", MESHES)
def test_devices_change_nothing(sizes):
    state, logged, *_ = on_mesh(sizes)
    alone, alone_logged, *_ = on_mesh((1, 1, 1))
    assert_close(logged, alone_logged, rtol=1e-4)
    # Adam divides by the gradient's size: if a gradient is all rounding, so is the direction of its update.
    moments = [optax.tree_utils.tree_get(s.networks["generator"].optimizer, "mu") for s in (state, alone)]
    assert_close(*moments, rtol=1e-3, atol=1e-5)
    assert_close(state.extras["history"], alone.extras["history"])
    differences = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - b).max(),
        params_of(state, "generator"),
        params_of(alone, "generator"),
    )
    assert np.median(jax.tree.leaves(differences)) < 1e-5


@pytest.mark.parametrize("sizes", MESHES)
def test_the_state_keeps_its_shardings_and_no_large_leaf_is_whole(sizes):
    state, _, abstract, updates, _ = on_mesh(sizes)
    for (keys, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim), dotted(keys)
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), dotted(keys)
        if dotted(keys).endswith("kernel"):
            assert leaf.addressable_shards[0].data.size * sizes[1] * sizes[2] == leaf.size, dotted(keys)
    assert [update._cache_size() for update in updates] == [1, 1], "the second update runs the first one's program"


def test_the_old_state_is_given_up():
    *_, history = on_mesh((2, 2, 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(history[-1].networks["generator"].params))


def test_half_precision_keeps_float32_masters():
    state, logged, *_ = on_mesh((1, 1, 1), "bfloat16", "block", 1)
    full_state, full, *_ = on_mesh((1, 1, 1))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    for name in ("loss/distribution_matching", "loss/regression", "loss/temporal"):
        assert logged[f"0/{name}"] == pytest.approx(full[f"0/{name}"], rel=0.1)
    assert logged != full
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), params_of(state, "generator"), params_of(full_state, "generator")
    )
    assert max(jax.tree.leaves(moved)) < 5e-3

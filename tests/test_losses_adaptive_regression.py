import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from avd_jax.errors import UserError
from avd_jax.losses.adaptive_regression import (
    LossHistory,
    adaptive_weight,
    regression_loss,
    update_history,
    weights_and_update,
)

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "losses_golden.npz")
LOSSES = jnp.asarray(GOLDEN["losses"], jnp.float32)
INDEX = jnp.asarray(GOLDEN["timestep_index"], jnp.int32)


@pytest.mark.parametrize("weight_uses", ["before", "after"])
def test_golden_one_by_one(weight_uses):
    step = jax.jit(lambda *args: weights_and_update(*args, weight_uses=weight_uses))
    history = LossHistory.init(4)
    for i in range(len(LOSSES)):
        weight, history = step(history, LOSSES[i : i + 1], INDEX[i : i + 1])
        np.testing.assert_allclose(weight, GOLDEN[f"weights_{weight_uses}"][i : i + 1], atol=1e-6)
        np.testing.assert_allclose(history.mean, GOLDEN["means"][i], atol=1e-6)
        np.testing.assert_array_equal(history.seen, np.isin(np.arange(4), GOLDEN["timestep_index"][: i + 1]))


@pytest.mark.parametrize("batch", [1, 4, 16, 32])
def test_batches_leave_the_history_of_their_samples_one_by_one(batch):
    history = LossHistory.init(4)
    for start in range(0, len(LOSSES), batch):
        rows = slice(start, start + batch)
        history = update_history(history, LOSSES[rows], INDEX[rows], alpha=0.95)
        np.testing.assert_allclose(history.mean, GOLDEN["means"][start + batch - 1], atol=1e-6)


def test_weights_of_a_batch_use_the_history_before_it():
    history = LossHistory(mean=jnp.array([0.5, 0.0]), seen=jnp.array([True, False]))
    losses, index = jnp.array([0.9, 0.3, 2.0, 1.0]), jnp.array([0, 0, 1, 1])
    weights, _ = weights_and_update(history, losses, index)
    # A timestep not seen before the batch weighs all its examples with 1/2.
    np.testing.assert_allclose(weights, [1 - 1 / (1 + np.exp(-1.2)), 1 - 1 / (1 + np.exp(0.6)), 0.5, 0.5], atol=1e-6)


def test_weighing_with_the_mean_after_the_update_lowers_k():
    history = LossHistory(mean=jnp.array([0.5, 0.7]), seen=jnp.array([True, True]))
    losses, index = jnp.array([0.9, 0.3, 2.0]), jnp.array([0, 0, 1])
    after, _ = weights_and_update(history, losses, index, weight_uses="after")
    lower_k, _ = weights_and_update(history, losses, index, k=0.95 * 3.0)
    np.testing.assert_allclose(after, lower_k, atol=1e-6)


def test_weight():
    losses = jnp.array([1.0, 1.0, 101.0, -99.0])
    weights = adaptive_weight(losses, jnp.array([1.0, 1.0 - np.log(3) / 3, 1.0, 1.0]), k=3.0)
    np.testing.assert_allclose(weights, [0.5, 0.25, 0.0, 1.0], atol=1e-6)


def test_no_gradient_through_weight_or_history():
    def total(losses):
        weights, history = weights_and_update(LossHistory.init(4), losses, INDEX)
        return jnp.sum(weights) + jnp.sum(history.mean)

    np.testing.assert_array_equal(jax.grad(total)(LOSSES), np.zeros_like(LOSSES))


def test_gradient_of_the_weighted_loss_is_the_weight():
    history = update_history(LossHistory.init(4), LOSSES, INDEX, alpha=0.95)
    weights, _ = weights_and_update(history, LOSSES, INDEX)

    def weighted(losses):
        return jnp.sum(weights_and_update(history, losses, INDEX)[0] * losses)

    np.testing.assert_allclose(jax.grad(weighted)(LOSSES), weights, atol=1e-6)


def test_history_keeps_its_structure_and_types():
    history = LossHistory.init(4)
    after = jax.jit(lambda h: update_history(h, LOSSES.astype(jnp.bfloat16), INDEX, alpha=0.95))(history)
    assert jax.tree.structure(after) == jax.tree.structure(history)
    assert (after.mean.dtype, after.seen.dtype) == (jnp.float32, jnp.bool_)


def test_timesteps_absent_from_the_batch_stay():
    history = LossHistory(mean=jnp.array([0.5, 0.7, 0.0]), seen=jnp.array([True, True, False]))
    after = update_history(history, jnp.array([9.0]), jnp.array([1]), alpha=0.95)
    np.testing.assert_allclose(after.mean, [0.5, 0.95 * 0.7 + 0.05 * 9, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(after.seen, [True, True, False])


def test_regression_loss_is_per_example():
    velocity, target = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 2, 4))
    expected = [np.mean((np.asarray(velocity) - target)[b] ** 2) for b in range(3)]
    np.testing.assert_allclose(regression_loss(velocity=velocity, target=target), expected, rtol=1e-6)


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match=r"weight_uses is 'during'.*use"):
        weights_and_update(LossHistory.init(4), LOSSES, INDEX, weight_uses="during")


def test_devices_share_one_history():
    root = Path(__file__).parents[1]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(root)}
    run = processes.run(["-c", ON_FOUR_DEVICES], env=environment)
    assert run.returncode == 0, run.stderr
    numbers = np.fromstring(run.stdout, sep=" ")
    weights, history = weights_and_update(LossHistory.init(4), jnp.linspace(0.2, 2.0, 8), jnp.array([3, 1, 0, 3] * 2))
    np.testing.assert_allclose(numbers, np.concatenate([weights, history.mean, history.seen]), atol=1e-6)


ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from avd_jax.losses.adaptive_regression import LossHistory, weights_and_update
assert jax.device_count() == 4
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
rows = NamedSharding(mesh, PartitionSpec("data"))
losses, index = (jax.device_put(x, rows) for x in (jnp.linspace(0.2, 2.0, 8), jnp.array([3, 1, 0, 3] * 2)))
weights, history = jax.jit(weights_and_update)(LossHistory.init(4), losses, index)
print(*np.concatenate([weights, history.mean, history.seen]))
"""

"""The optimizer that warms up, and the running mean whose memory grows."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avd_jax.training.optimizers import power_decay, warmed_up


def settings(**changes):
    values = {"beta1": 0.0, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01, "warmup_steps": 4}
    return SimpleNamespace(**values | {"max_grad_norm": 0.0} | changes)


def after_updates(optimizer, count=6, scale=1.0):
    params = {"x": jnp.asarray([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    for number in range(count):
        gradient = {"x": scale * jnp.asarray(np.random.default_rng(number).standard_normal(3), jnp.float32)}
        changes, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    return params["x"], state


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_it_is_adamw_with_a_rate_that_rises(beta1):
    rate = optax.linear_schedule(1e-8, 1e-2, 4)
    expected, _ = after_updates(optax.adamw(rate, b1=beta1, b2=0.999, weight_decay=0.01))
    found, state = after_updates(warmed_up(settings(beta1=beta1), 1e-2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == (6 if beta1 else 3)


def test_gradients_are_clipped_only_if_it_is_asked_for():
    clipped, large = settings(max_grad_norm=1.0, epsilon=1.0), settings(epsilon=1.0)
    found = [after_updates(warmed_up(clipped, 1e-2), scale=scale)[0] for scale in (1e3, 1e6)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert np.abs(np.subtract(*(after_updates(warmed_up(large, 1e-2), scale=s)[0] for s in (1.0, 2.0)))).max() > 1e-3


def test_the_running_mean_forgets_the_start_and_weighs_by_a_power():
    decay = power_decay(6.937)
    assert decay(jnp.int32(0)) == 0
    mean = 99.0
    for step in range(200):
        mean = float(decay(step)) * mean + (1 - float(decay(step))) * (step + 1)
    # Of weights t^6.937 along a ramp the mean is 7.937 / 8.937 of its end.
    assert mean == pytest.approx(200 * 7.937 / 8.937, rel=0.01)

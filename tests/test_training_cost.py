"""What a cycle costs, against a count of the networks' evaluations while the updates run."""

import collections

import jax
import jax.numpy as jnp
import pytest
from avd_jax.training.networks import Networks
from avd_jax.training.steps import make_fake_score_step, make_generator_step
from training_cases import LATENTS_SHAPE, linear_network, linear_params, make_batch, make_config, recording

from avd_jax.training import objectives
from avd_jax.training.cost import HALF_RATE, cycle_cost
from avd_jax.training.state import init_state, make_optimizers


def counted(config):
    """Run both updates until each stop was seen; return {stop: evaluations} of the generator's and of fake_score's."""
    calls, optimizers, batch = [], make_optimizers(config), make_batch(1)
    networks = Networks(recording(linear_network, calls, "student"), recording(linear_network, calls, "teacher"))
    frozen = objectives.Frozen(linear_params(2), jnp.zeros((8, 16)))
    state = init_state(config, optimizers, linear_params(0))
    steps = (
        jax.jit(make_generator_step(config, networks, optimizers)),
        jax.jit(make_fake_score_step(config, networks, optimizers, latents_shape=LATENTS_SHAPE)),
    )
    found = [{}, {}]
    for seed in range(40):
        key = jax.random.key(seed)
        stop = int(objectives.stop_step(config, key))
        if stop in found[0]:
            continue
        for counts, step in zip(found, steps, strict=True):
            calls.clear()
            step(state, frozen, batch, key)
            jax.effects_barrier()
            counts[stop] = collections.Counter(name for name, *_ in calls)
    return found


@pytest.mark.parametrize("off", [(), ("distribution_matching", "temporal")])
def test_cost_is_what_the_updates_evaluate(off):
    config = make_config(**{f"loss__{term}": 0.0 for term in off})
    generator, fake_score = counted(config)
    assert set(generator) == {0, 1, 2, 3}
    scores = "distribution_matching" not in off
    rollout = scores or "temporal" not in off
    for stop in range(4):
        assert generator[stop] == collections.Counter(
            student=rollout * (stop + 1) + scores + ("regression" not in off), teacher=2 * scores
        )
        assert fake_score[stop] == collections.Counter(student=stop + 2)
    # A backward pass is worth two forward passes, and each loss differentiates one evaluation.
    with_gradient = rollout + ("regression" not in off)
    cost = cycle_cost(config)
    assert cost.generator == sum(c.total() for c in generator.values()) / 4 + 2 * with_gradient
    assert cost.fake_score == sum(c.total() for c in fake_score.values()) / 4 + 2
    # Nothing but distribution matching asks for fake_score.
    assert cost.cycle == cost.generator + 5 * scores * cost.fake_score


def test_the_papers_cycle():
    """45 with remat, where rollouts that always run to the end, as the authors' do, need 54."""
    assert cycle_cost(make_config(remat="block")).cycle == 45
    passes, backward = 4, 2 + 1  # the rollout; a gradient's share, with the forward pass that remat runs again
    generator = passes + backward + 1 + 2 + (1 + backward)
    fake_score = passes + (1 + backward)
    assert generator + 5 * fake_score == 54


def test_other_cycles():
    assert cycle_cost(make_config(remat="none")).cycle == 45 - 5 - 2
    assert cycle_cost(make_config(remat="block", student__timesteps=(1000.0,))).cycle == 45 - 6 * 1.5
    assert cycle_cost(make_config(remat="block", fake_score_updates=1)).cycle == 12.5 + 6.5


def test_half_rate_steps_cost_less():
    config = make_config(remat="block", half_rate__steps=2, half_rate__interpolator="unused")
    half, before = HALF_RATE, (0 + HALF_RATE + 2 * HALF_RATE + (1 + 2 * HALF_RATE)) / 4
    at_stop = (2 + 2 * half) / 4
    cost = cycle_cost(config)
    assert cost.generator == pytest.approx(before + 8 * at_stop + 3)
    assert cost.fake_score == pytest.approx(before + at_stop + 4)

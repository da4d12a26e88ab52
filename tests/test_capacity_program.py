"""The expected FLOPs of a program that draws a number."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from avd_jax.capacity.program import Program, expected_flops, expected_trips
from avd_jax.errors import UserError

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONE = 2 * 4**3
KEY = jax.eval_shape(lambda: jax.random.key(0))


def rollout(x, key):
    """Make as many products as are drawn, and two more if those are at least two."""
    stop = checkpoint_name(jax.random.randint(key, (), 0, 4), "draw/stop")
    x = jax.lax.fori_loop(0, stop, lambda _, x: x @ x, x)
    return jax.lax.cond(stop < 2, lambda x: x, lambda x: x @ x @ x, x)


def test_the_mean_over_the_outcomes_and_one_trace():
    traces = []

    @jax.jit
    def function(x, key):
        traces.append(1)
        return rollout(x, key)

    outcomes = tuple({"stop": stop} for stop in range(4))
    program = Program("rollout", function, (SQUARE, KEY), outcomes)
    assert expected_flops(program) == (0 + 1 + 2 + 2 + 3 + 2) / 4 * ONE
    assert len(traces) == 1
    assert expected_flops(Program("rollout", function, (SQUARE, KEY), outcomes[:1])) == 0


def test_a_loop_whose_length_follows_from_no_outcome():
    function = jax.jit(rollout)
    with pytest.raises(UserError, match="give dynamic_trips"):
        expected_flops(Program("rollout", function, (SQUARE, KEY)))
    assert expected_flops(Program("rollout", function, (SQUARE, KEY), dynamic_trips=1.5)) == (1.5 + 2) * ONE
    # If the outcome says it, the number is of no use.
    known = Program("rollout", function, (SQUARE, KEY), ({"stop": 3},), dynamic_trips=1.5)
    assert expected_flops(known) == 5 * ONE


def test_loops_run_as_often_as_the_outcomes_say_on_average():
    """In the compiled text no loop says how often the drawn number makes it run."""

    def function(x, key):
        stop = checkpoint_name(jax.random.randint(key, (), 0, 4), "draw/stop")
        return jax.lax.fori_loop(0, stop, lambda _, x: x @ x, x) @ x

    outcomes = tuple({"stop": stop} for stop in range(4))
    program = Program("rollout", jax.jit(function), (SQUARE, KEY), outcomes)
    assert expected_trips(program) == 1.5
    assert expected_trips(Program("rollout", jax.jit(function), (SQUARE, KEY), dynamic_trips=2.5)) == 2.5
    assert expected_trips(Program("square", jax.jit(lambda x: x @ x), (SQUARE,))) == 1


def test_a_program_that_draws_nothing():
    assert expected_flops(Program("square", jax.jit(lambda x: x @ x), (SQUARE,))) == ONE


def test_an_outcome_that_leaves_a_draw_open_is_noticed():
    program = Program("rollout", jax.jit(rollout), (SQUARE, KEY), ({"stop": 0}, {"step": 1}), dynamic_trips=1.5)
    with pytest.raises(ValueError, match="rollout draws stop, which not every outcome gives"):
        expected_flops(program)
    # What the program does not draw has no effect: a loss that is switched off may have drawn it.
    outcomes = ({"stop": 0, "other": 5}, {"stop": 1, "other": 5})
    assert expected_flops(Program("rollout", jax.jit(rollout), (SQUARE, KEY), outcomes)) == ONE / 2

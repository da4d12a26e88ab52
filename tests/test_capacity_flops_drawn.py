"""The FLOP count of programs that draw a number for the whole batch, against counts made by hand."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from training_cases import DIT

from avd_jax.capacity.flops import count_flops, jaxpr_flops
from avd_jax.errors import UserError
from avd_jax.models.functional import make_denoiser
from avd_jax.parallel.mesh import make_mesh

STEPS = 4
ONE_BATCH = 2 * 8 * 4 * 4  # an [8, 4] by a [4, 4]


def drawn(key, name="draw/stop", steps=STEPS):
    return checkpoint_name(jax.random.randint(key, (), 0, steps), name)


def rolled_out(weights, x, first, stop):
    weights, x = jax.lax.stop_gradient((weights, x))
    return jax.lax.stop_gradient(jax.lax.fori_loop(first, stop, lambda _, x: x @ weights, x))


def by_draw(function, *args, name="stop", steps=STEPS, **rest):
    """Count for each value of a draw, and trace once."""
    jaxpr = jax.make_jaxpr(function)(*args)
    return [jaxpr_flops(jaxpr, draws={name: value}, **rest) for value in range(steps)]


KEY = jax.eval_shape(lambda: jax.random.key(0))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


WEIGHTS, BATCH = shape(4, 4), shape(8, 4)


def test_a_rollout_counts_the_trips_that_follow_from_its_draw():
    def rollout(weights, x, key):
        return rolled_out(weights, x, 0, drawn(key))

    assert by_draw(rollout, WEIGHTS, BATCH, KEY) == [0, ONE_BATCH, 2 * ONE_BATCH, 3 * ONE_BATCH]
    assert by_draw(jax.jit(rollout), WEIGHTS, BATCH, KEY) == [0, ONE_BATCH, 2 * ONE_BATCH, 3 * ONE_BATCH]
    # Another draw says nothing of this one.
    assert by_draw(rollout, WEIGHTS, BATCH, KEY, name="other", dynamic_trips=1.5) == [1.5 * ONE_BATCH] * STEPS
    with pytest.raises(UserError, match="give dynamic_trips"):
        by_draw(rollout, WEIGHTS, BATCH, KEY, name="other")


def loss(weights, x, stop):
    return jnp.sum((rolled_out(weights, x, 0, stop) @ weights) ** 2)


def test_a_rollout_within_a_gradient():
    def update(weights, x, key):
        return jax.value_and_grad(loss)(weights, x, drawn(key))

    # The last step's forward pass, and the gradient of the weights.
    assert by_draw(update, WEIGHTS, BATCH, KEY) == [(2 + stop) * ONE_BATCH for stop in range(STEPS)]


@pytest.mark.parametrize(
    ("wrap", "rollouts", "last"),
    [
        (jax.jit, 1, 2),
        # Remat runs all of it again.
        (jax.checkpoint, 2, 3),
        (lambda function: jax.jit(jax.checkpoint(function)), 2, 3),
    ],
)
def test_a_rollout_within_jit_and_remat(wrap, rollouts, last):
    def update(weights, x, key):
        stop = drawn(key)
        return jax.grad(wrap(lambda weights, x: loss(weights, x, stop)))(weights, x)

    assert by_draw(update, WEIGHTS, BATCH, KEY) == [(rollouts * stop + last) * ONE_BATCH for stop in range(STEPS)]


def test_a_rollout_within_the_scan_over_parts():
    def update(weights, parts, key):
        stop = drawn(key)

        def part(total, x):
            value, gradient = jax.value_and_grad(loss)(weights, x, stop)
            return total + gradient, value

        return jax.lax.scan(part, jnp.zeros_like(weights), parts)

    assert by_draw(update, WEIGHTS, shape(3, 8, 4), KEY) == [3 * (2 + stop) * ONE_BATCH for stop in range(STEPS)]


def at_two_rates(weights, x, stop, half_steps):
    """The last step after a rollout whose first steps see every second row."""

    def at_half_rate():
        return jnp.sum(rolled_out(weights, x[::2], 0, stop) @ weights)

    def at_full_rate():
        halves = rolled_out(weights, x[::2], 0, half_steps)
        return jnp.sum(rolled_out(weights, jnp.repeat(halves, 2, axis=0), half_steps, stop) @ weights)

    return jax.lax.cond(stop < half_steps, at_half_rate, at_full_rate)


@pytest.mark.parametrize(
    ("transform", "rollouts", "last"),
    [
        (lambda function: function, 1, 1),
        (jax.grad, 1, 2),
        (lambda function: jax.grad(jax.checkpoint(function, static_argnums=3)), 2, 2),  # the last step is linear
    ],
)
@pytest.mark.parametrize("parts", [0, 3])
def test_the_branch_that_a_draw_takes(transform, rollouts, last, parts):
    def update(weights, x, key):
        stop = drawn(key)
        if not parts:
            return transform(at_two_rates)(weights, x, stop, 2)
        return jax.lax.scan(lambda _, x: (None, transform(at_two_rates)(weights, x, stop, 2)), None, x)

    half, full = ONE_BATCH // 2, ONE_BATCH
    rolled = [0, half, 2 * half, 2 * half + full]
    expected = [rollouts * before + last * step for before, step in zip(rolled, [half, half, full, full], strict=True)]
    counts = by_draw(update, WEIGHTS, shape(parts, 8, 4) if parts else BATCH, KEY)
    assert counts == [(parts or 1) * count for count in expected]


def test_a_branch_that_nothing_decides_is_the_dearest_one():
    def choose(weights, x, key):
        return at_two_rates(weights, x, drawn(key), 2)

    jaxpr = jax.make_jaxpr(choose)(WEIGHTS, BATCH, KEY)
    assert jaxpr_flops(jaxpr, dynamic_trips=1.5) == 2 * ONE_BATCH // 2 + 1.5 * ONE_BATCH + ONE_BATCH


def test_what_the_draw_hands_on_is_followed():
    """Through bounds by `where`, a switch, a library function, custom gradients, and numbers kept in an array."""

    @jax.custom_vjp
    def powers(x, weights, first, last):
        return jax.lax.fori_loop(first, last, lambda _, x: x @ weights, x)

    powers.defvjp(lambda *args: (powers(*args), args[1]), lambda weights, g: (g @ weights.T, None, None, None))

    def follow(weights, x, key):
        stop = drawn(key)
        late = stop >= 2
        first, last = jnp.where(late, 2, 0), jnp.clip(jnp.where(late, STEPS, 2), 0, 100)
        trips = jnp.arange(STEPS)[stop]
        x = jax.lax.switch(trips, [lambda x: x] * 3 + [lambda x: x @ weights], x)
        return powers(x, weights, first, last)

    jaxpr = jax.make_jaxpr(jax.grad(lambda x, *rest: jnp.sum(follow(rest[0], x, rest[1]))))(BATCH, WEIGHTS, KEY)
    counts = [jaxpr_flops(jaxpr, draws={"stop": stop}) for stop in range(STEPS)]
    # Two trips and one product backwards; the switch's product and its transpose at the last stop.
    assert counts == [3 * ONE_BATCH, 3 * ONE_BATCH, 3 * ONE_BATCH, 5 * ONE_BATCH]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_that_decides_by_its_step(reverse):
    """A rollout that can be differentiated: a scan over all steps, each of which is made or not."""

    def rollout(weights, x, key):
        stop = drawn(key)

        def step(x, i):
            return jax.lax.cond(i < stop, lambda x: jnp.sin(x @ weights), lambda x: x, x), None

        return jnp.sum(jax.lax.scan(step, x, jnp.arange(STEPS), reverse=reverse)[0])

    assert by_draw(rollout, WEIGHTS, BATCH, KEY) == [stop * ONE_BATCH for stop in range(STEPS)]
    assert by_draw(jax.grad(rollout), WEIGHTS, BATCH, KEY) == [3 * stop * ONE_BATCH for stop in range(STEPS)]


def test_a_count_in_the_carry_decides():
    def rollout(weights, x, key):
        stop = drawn(key)

        def step(carry, _):
            i, x = carry
            return (i + 1, jax.lax.cond(i == stop, lambda x: x @ weights, lambda x: x, x)), None

        return jax.lax.scan(step, (0, x), None, length=STEPS + 1)

    # At the step of the draw, once, whichever it is.
    assert by_draw(rollout, WEIGHTS, BATCH, KEY) == [ONE_BATCH] * STEPS
    # Else the branch with work counts at each step.
    assert jaxpr_flops(jax.make_jaxpr(rollout)(WEIGHTS, BATCH, KEY)) == (STEPS + 1) * ONE_BATCH


def test_loops_within_loops():
    def nested(weights, x, key):
        stop = drawn(key)

        def outer(i, x):
            return jax.lax.fori_loop(0, i, lambda _, x: x @ weights, x)

        return jax.lax.fori_loop(0, stop + 1, outer, x)

    assert by_draw(nested, WEIGHTS, BATCH, KEY) == [0, ONE_BATCH, 3 * ONE_BATCH, 6 * ONE_BATCH]

    def lengths_of_a_scan(weights, x):
        def step(x, length):
            return jax.lax.fori_loop(0, length, lambda _, x: x @ weights, x), None

        return jax.lax.scan(step, x, jnp.arange(STEPS))

    assert count_flops(lengths_of_a_scan, WEIGHTS, BATCH) == 6 * ONE_BATCH

    def scans(weights, x):
        inner = lambda x, _: (jax.lax.scan(lambda x, _: (x @ weights, None), x, None, length=5)[0], None)  # noqa: E731
        return jax.lax.scan(inner, x, None, length=7)

    assert count_flops(scans, WEIGHTS, BATCH) == 35 * ONE_BATCH


def test_a_loop_that_ends_by_data_is_unknown_though_its_draw_is_known():
    def search(weights, x, key):
        stop = drawn(key)

        def going(carry):
            i, x = carry
            return (i < stop) & (jnp.sum(x) < 1)

        return jax.lax.while_loop(going, lambda carry: (carry[0] + 1, carry[1] @ weights), (0, x))

    # At stop 0 it makes no trip, whatever the data are.
    assert by_draw(search, WEIGHTS, BATCH, KEY, dynamic_trips=1.5) == [0] + [1.5 * ONE_BATCH] * 3


def test_two_draws():
    def both(weights, x, key):
        stop, other = drawn(key), drawn(key, "draw/other")
        return rolled_out(weights, x, 0, stop), jax.lax.cond(other == 1, lambda: x @ weights, lambda: x)

    jaxpr = jax.make_jaxpr(both)(WEIGHTS, BATCH, KEY)
    assert jaxpr_flops(jaxpr, draws={"stop": 3, "other": 1}) == 4 * ONE_BATCH
    assert jaxpr_flops(jaxpr, draws={"stop": 3, "other": 0}) == 3 * ONE_BATCH
    assert jaxpr_flops(jaxpr, draws={"stop": 3}) == 4 * ONE_BATCH


def test_a_draw_within_shard_map():
    mesh = make_mesh(data=4, seq=2)

    def rollout(weights, x, key):
        stop = drawn(key)

        def on_each(weights, x, stop):
            return jax.lax.fori_loop(0, stop, lambda _, x: x @ weights, x)

        cut = jax.shard_map(on_each, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data"), check_vma=False)
        return cut(weights, x, stop)

    assert by_draw(rollout, WEIGHTS, BATCH, KEY) == [2 * stop * ONE_BATCH for stop in range(STEPS)]


def test_the_trips_are_those_that_run():
    """Against a counter in the program itself."""

    def rollout(weights, x, stop, half_steps):
        stop = checkpoint_name(stop, "draw/stop")

        def count(first, last):
            return jax.lax.fori_loop(first, last, lambda _, c: (c[0] + 1, c[1] @ weights), (0, x))[0]

        return jax.lax.cond(stop < half_steps, lambda: count(0, stop), lambda: 10 + count(half_steps, stop)) % 10

    traced = jax.jit(rollout, static_argnums=3).trace(WEIGHTS, BATCH, jax.ShapeDtypeStruct((), jnp.int32), 2)
    for stop in range(6):
        ran = rollout(jnp.zeros((4, 4)), jnp.zeros((8, 4)), jnp.int32(stop), 2)
        assert jaxpr_flops(traced.jaxpr, draws={"stop": stop}) == ran * ONE_BATCH


def test_it_is_quick_for_a_deep_model():
    network = make_denoiser(replace(DIT, num_layers=30), dtype="float32", param_dtype="float32", remat="block")
    inputs = shape(2, 3, 4, 4, 4), shape(2), {"prompt_embeds": shape(2, DIT.text_len, 16)}

    def update(params, latents, timesteps, conditions, key):
        stop = drawn(key)

        def loss(params):
            constants = jax.lax.stop_gradient(params)

            def step(_, x):
                return jax.lax.stop_gradient(network(constants, x, timesteps, conditions))

            x = jax.lax.fori_loop(0, stop, step, latents)
            return jnp.sum(network(params, x, timesteps, conditions))

        return jax.value_and_grad(loss)(params)

    params = network.abstract_params()
    jaxpr = jax.make_jaxpr(update)(params, *inputs, KEY)
    start = time.perf_counter()
    counts = [jaxpr_flops(jaxpr, draws={"stop": stop}) for stop in range(STEPS)]
    assert time.perf_counter() - start < 4
    forward = count_flops(network, params, *inputs)
    assert counts == [counts[0] + stop * forward for stop in range(STEPS)]

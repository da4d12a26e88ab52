"""Integers followed through a program, against what the program gives when it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from avd_jax.capacity import known

NUMBERS = np.array([[-7, 0, 3], [5, -2, 7]], np.int32)
NATURAL = np.array([4, 0, 250], np.uint8)


def evaluated(function, *values):
    """Return the results of a traced function whose equations call no other program."""
    jaxpr = jax.make_jaxpr(function)(*values)
    found = dict(zip(jaxpr.jaxpr.invars, (None if v is None else np.asarray(v) for v in values), strict=True))

    def value_of(variable):
        if hasattr(variable, "val"):
            return known.of_constant(variable.val, variable.aval)
        return found.get(variable)

    for equation in jaxpr.jaxpr.eqns:
        results = known.evaluate(equation, [value_of(variable) for variable in equation.invars])
        found.update(zip(equation.outvars, results, strict=True))
    return [value_of(variable) for variable in jaxpr.jaxpr.outvars]


@pytest.mark.parametrize(
    "function",
    [
        *(jax.lax.add, jax.lax.sub, jax.lax.mul, jax.lax.max, jax.lax.min, jax.lax.div, jax.lax.rem),
        *(jax.lax.eq, jax.lax.ne, jax.lax.lt, jax.lax.le, jax.lax.gt, jax.lax.ge),
        *(jax.lax.bitwise_and, jax.lax.bitwise_or, jax.lax.bitwise_xor),
        lambda x, y: jax.lax.select(x < y, x, y),
        lambda x, y: jax.lax.select_n(x > y, y, x),
        lambda x, y: jax.lax.clamp(y - 1, x, y + 1),
        lambda x, y: jax.lax.concatenate([x, y], 1),
    ],
)
def test_two_arrays(function):
    other = np.array([[2, 1, -3], [5, 3, -4]], np.int32)
    agree(function, NUMBERS, other)


@pytest.mark.parametrize(
    "function",
    [
        *(jax.lax.neg, jax.lax.abs, jax.lax.sign, jax.lax.bitwise_not),
        lambda x: jax.lax.convert_element_type(x, jnp.bool_),
        lambda x: jax.lax.convert_element_type(x, jnp.uint8),
        lambda x: jax.lax.broadcast_in_dim(x, (2, 4, 3), (0, 2)),
        lambda x: jax.lax.reshape(x, (6,)),
        lambda x: jax.lax.transpose(x, (1, 0)),
        lambda x: jax.lax.rev(x, (1,)),
        lambda x: jax.lax.slice(x, (0, 1), (2, 3), (1, 2)),
        lambda x: jax.lax.squeeze(jax.lax.slice(x, (0, 1), (1, 2)), (0, 1)),
        lambda x: jax.lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(9)), (1, 2)),
        lambda x: jax.lax.broadcasted_iota(jnp.int32, (2, 3), 1) + x,
        lambda x: jax.lax.reduce_max_p.bind(x, axes=(1,), out_sharding=None),
        lambda x: checkpoint_name(jax.lax.stop_gradient(x), "a name"),
        lambda x: jax.lax.optimization_barrier((x, -x)),
    ],
)
def test_one_array(function):
    agree(function, NUMBERS)


def test_integers_wrap():
    agree(lambda x: x * x + x, NATURAL)
    agree(lambda x: x - 5, NATURAL)


def agree(function, *values):
    ran = jax.tree.leaves(function(*map(jnp.asarray, values)))
    for result, expected in zip(evaluated(function, *values), ran, strict=True):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(result, expected)


def evaluate_one(function, values):
    """Return the result of a function that is one equation; None stands for an unknown argument."""
    (equation,) = jax.make_jaxpr(function)(*(jnp.zeros_like(v[1]) for v in values)).jaxpr.eqns
    return known.evaluate(equation, [value if is_known else None for is_known, value in values])[0]


def test_one_argument_may_suffice():
    yes, no, numbers = np.array(True), np.array(False), NUMBERS
    assert evaluate_one(jax.lax.bitwise_and, [(True, no), (False, yes)]) == no
    assert evaluate_one(jax.lax.bitwise_and, [(True, yes), (False, yes)]) is None
    assert evaluate_one(jax.lax.bitwise_or, [(False, no), (True, yes)]) == yes
    assert evaluate_one(jax.lax.bitwise_or, [(False, no), (True, no)]) is None
    assert not evaluate_one(jax.lax.mul, [(True, 0 * numbers), (False, numbers)]).any()
    assert evaluate_one(jax.lax.mul, [(True, numbers), (False, numbers)]) is None
    # Only the case that is chosen has to be known; or both, if they are the same.
    assert (evaluate_one(jax.lax.select_n, [(True, no), (True, numbers), (False, numbers)]) == numbers).all()
    assert evaluate_one(jax.lax.select_n, [(True, yes), (True, numbers), (False, numbers)]) is None
    assert (evaluate_one(jax.lax.select_n, [(False, no), (True, numbers), (True, numbers)]) == numbers).all()


def test_division_by_nothing_is_unknown():
    assert evaluate_one(jax.lax.div, [(True, NUMBERS), (True, 0 * NUMBERS)]) is None
    assert evaluate_one(jax.lax.rem, [(True, NUMBERS), (True, 0 * NUMBERS)]) is None


def test_floats_and_large_arrays_are_not_followed():
    assert evaluated(lambda x: x.astype(jnp.float32).astype(jnp.int32), NUMBERS) == [None]
    assert evaluated(lambda x: jnp.zeros((known.LARGEST,), jnp.int32) + x, np.int32(1))[0].sum() == known.LARGEST
    assert evaluated(lambda x: jnp.zeros((known.LARGEST + 1,), jnp.int32) + x, np.int32(1)) == [None]

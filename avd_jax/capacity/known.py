"""What a program's small integers are, as far as that can be told without running it.

A program decides by them which branch it takes and how often a loop runs. An array is known with its value or not at
all; floats never are, and large arrays are not: no decision depends on them, and to follow them would take time.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.extend.core import JaxprEqn

Known = np.ndarray | None

LARGEST = 64  # elements of an array that is followed


def can_be_known(aval) -> bool:
    """Return whether arrays of an abstract value are followed: few integers or booleans."""
    dtype = getattr(aval, "dtype", None)
    return isinstance(dtype, np.dtype) and dtype.kind in "biu" and aval.size <= LARGEST


def of_constant(value, aval) -> Known:
    """Return a literal of a program, or one of its constants, if arrays like it are followed."""
    if not can_be_known(aval):
        return None
    if isinstance(value, jax.Array):
        if not value.is_fully_addressable:
            return None
        value = jax.device_get(value)
    return np.asarray(value).astype(aval.dtype)


def same(one: Known, other: Known) -> bool:
    """Return whether both are known, and to be the same."""
    return one is not None and other is not None and np.array_equal(one, other)


def evaluate(equation: JaxprEqn, inputs: Sequence[Known]) -> list[Known]:
    """Return what an equation that calls no other program gives.

    Args:
      equation: of a jaxpr.
      inputs: its arguments, as far as they are known.
    """
    name, outputs = equation.primitive.name, equation.outvars
    if name in _IDENTITIES:
        return list(inputs)
    unknown = [None] * len(outputs)
    if len(outputs) != 1 or not can_be_known(outputs[0].aval):
        return unknown
    with np.errstate(all="ignore"):  # integers wrap here as they do there
        if name in _WITH_UNKNOWNS:
            found = _WITH_UNKNOWNS[name](*inputs)
        elif name in _FUNCTIONS and all(value is not None for value in inputs):
            found = _FUNCTIONS[name](equation.params, *inputs)
        else:
            return unknown
    if found is None:
        return unknown
    aval = outputs[0].aval
    return [np.broadcast_to(np.asarray(found).astype(aval.dtype), aval.shape)]


# Whose results are their arguments, one by one; the values change neither by name, place nor layout.
_IDENTITIES = {
    *("name", "copy", "copy_p", "stop_gradient", "optimization_barrier", "device_put"),
    *("sharding_constraint", "layout_constraint", "mesh_cast", "reshard", "pvary"),
}


def _divide(one, other):
    return np.sign(one) * np.sign(other) * (np.abs(one) // np.abs(other)) if np.all(other) else None


def _remainder(one, other):
    return np.fmod(one, other) if np.all(other) else None


def _broadcast(params: Mapping, value, *_):
    kept = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], value.shape, strict=True):
        kept[axis] = size
    return np.broadcast_to(value.reshape(kept), params["shape"])


def _iota(params: Mapping):
    along = [1] * len(params["shape"])
    along[params["dimension"]] = -1
    return np.broadcast_to(np.arange(params["shape"][params["dimension"]]).reshape(along), params["shape"])


def _slice(params: Mapping, value):
    strides = params["strides"] or (1,) * value.ndim
    parts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return value[tuple(slice(*part) for part in parts)]


def _dynamic_slice(params: Mapping, value, *starts):
    sizes = params["slice_sizes"]
    first = [int(np.clip(start, 0, axis - size)) for start, axis, size in zip(starts, value.shape, sizes, strict=True)]
    return value[tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))]


def _elementwise(function: Callable) -> Callable:
    return lambda _, *values: function(*values)


def _reduction(function: Callable) -> Callable:
    return lambda params, value: function(value, axis=tuple(params["axes"]))


_FUNCTIONS = {
    **{name: _elementwise(function) for name, function in {
        "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "sign": np.sign, "div": _divide,
        "rem": _remainder, "max": np.maximum, "min": np.minimum, "xor": np.bitwise_xor, "not": np.invert,
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "clamp": lambda low, value, high: np.minimum(np.maximum(value, low), high),
    }.items()},
    **{name: _reduction(function) for name, function in {
        "reduce_sum": np.sum, "reduce_prod": np.prod, "reduce_max": np.max, "reduce_min": np.min,
        "reduce_and": np.bitwise_and.reduce, "reduce_or": np.bitwise_or.reduce,
    }.items()},
    "convert_element_type": lambda params, value: value.astype(params["new_dtype"]),
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reshape": lambda params, value: value.reshape(params["new_sizes"]) if not params["dimensions"] else None,
    "squeeze": lambda params, value: np.squeeze(value, tuple(params["dimensions"])),
    "transpose": lambda params, value: np.transpose(value, params["permutation"]),
    "rev": lambda params, value: np.flip(value, tuple(params["dimensions"])),
    "concatenate": lambda params, *values: np.concatenate(values, params["dimension"]),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}  # fmt: skip


def _decided_by(function: Callable, decisive: int) -> Callable:
    """Return `function` of two arrays, one of which suffices if it is `decisive` (-1: all bits) throughout."""

    def of_two(one: Known, other: Known):
        if one is not None and other is not None:
            return function(one, other)
        given = other if one is None else one
        if given is None:
            return None
        # Not ~0: the inverse of False is True, of 0 is -1, in each dtype.
        wanted = np.invert(np.zeros((), given.dtype)) if decisive else np.zeros((), given.dtype)
        return given if np.all(given == wanted) else None

    return of_two


def _select(which: Known, *cases: Known):
    if which is None:
        return cases[0] if all(same(cases[0], case) for case in cases) else None
    chosen = set(which.astype(int).flat)
    if len(chosen) == 1:
        return cases[chosen.pop()]
    if any(cases[number] is None for number in chosen):
        return None
    return np.select([which.astype(int) == number for number in chosen], [cases[number] for number in chosen])


# These may be known although an argument is not.
_WITH_UNKNOWNS = {
    "mul": _decided_by(np.multiply, 0),
    "and": _decided_by(np.bitwise_and, 0),
    "or": _decided_by(np.bitwise_or, -1),
    "select_n": _select,
}

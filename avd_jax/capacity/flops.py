"""The floating-point operations of a traced program, counted from its jaxpr.

What counts is the work of the matrix units: matrix products, convolutions and the attention kernels, a multiplication
and an addition as two operations. The body of a loop counts as often as it runs, that of `shard_map` once a device, and
a forward pass that remat runs again counts again. XLA's own count sees a loop's body once and a Pallas kernel not at
all, so it is of no use for a whole training step.

How much a program does may depend on a number that it draws at random for the whole batch, such as the step at which a
rollout stops. The program names it, `stop = checkpoint_name(stop, "draw/stop")`, and the count for one value of it,
`draws={"stop": 2}`, takes the branches and the trips that follow: small integers are followed through the program as
far as they are known (`capacity/known.py`). What a Pallas kernel skips is counted.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from avd_jax.capacity import known
from avd_jax.capacity.known import Known
from avd_jax.errors import UserError

DRAW = "draw/"  # what the names of drawn numbers begin with

_MOST_TRIPS = 4096  # of a loop that is followed trip by trip


def count_flops(
    function: Callable, *args, dynamic_trips: float | None = None, draws: Mapping[str, int] | None = None
) -> float:
    """Return the FLOPs of `function(*args)` over all devices.

    Args:
      function: anything that can be traced, jitted or not.
      args: arrays or `jax.ShapeDtypeStruct`s.
      dynamic_trips, draws: see `jaxpr_flops`.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args), dynamic_trips=dynamic_trips, draws=draws)


def jaxpr_flops(
    jaxpr: Jaxpr | ClosedJaxpr,
    *,
    dynamic_trips: float | None = None,
    draws: Mapping[str, int] | None = None,
    kernels_only: bool = False,
) -> float:
    """Return the FLOPs of a program over all devices.

    If nothing that is known decides between branches, the most expensive one counts.

    Args:
      jaxpr: for instance `jitted.trace(*args).jaxpr`.
      dynamic_trips: how often the body of a loop is expected to run whose length does not follow from known numbers.
        Such loops within such loops each run so often.
      draws: the values of numbers that the program draws, by the name after "draw/". Those that it does not name have
        no effect; those that are not given are unknown.
      kernels_only: count nothing but attention kernels, of which the compiler makes no estimate.

    Raises:
      UserError: a loop of unknown length with work in it, if `dynamic_trips` is not given.
    """
    inner = _open(jaxpr)
    flops, _ = _Count(dynamic_trips, draws or {}, kernels_only).program(jaxpr, [None] * len(inner.invars))
    return flops


def draws_of(jaxpr: Jaxpr | ClosedJaxpr) -> set[str]:
    """Return the names of the numbers that a program says it draws."""
    found, seen, waiting = set(), set(), [jaxpr]
    while waiting:
        inner = _open(waiting.pop())
        if inner in seen:
            continue
        seen.add(inner)
        for equation in inner.eqns:
            if _is_draw(equation):
                found.add(equation.params["name"].removeprefix(DRAW))
            waiting += _jaxprs_in(equation.params)
    return found


class _Count:
    """The count of one program for one set of draws. Every method returns (FLOPs, results as far as they are known)."""

    def __init__(self, dynamic_trips: float | None, draws: Mapping[str, int], kernels_only: bool = False):
        self._dynamic_trips = dynamic_trips
        self._leaves = _LEAVES if not kernels_only else _LEAVES | dict.fromkeys(_OUTSIDE_KERNELS, lambda equation: 0)
        # What is within a kernel counts in any case.
        self._within_kernels = _Count(dynamic_trips, draws) if kernels_only else self
        self._draws = draws
        # Programs that are called again with the same known arguments, such as a layer's or a library function's.
        self._done: dict[tuple, tuple[float, list[Known]]] = {}
        self._control = {"cond": self._branches, "while": self._while, "scan": self._scan}

    def program(self, jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Known]) -> tuple[float, list[Known]]:
        called = jaxpr, *(None if value is None else (value.shape, value.tobytes()) for value in inputs)
        if called not in self._done:
            self._done[called] = self._equations(jaxpr, inputs)
        return self._done[called]

    def _equations(self, jaxpr, inputs):
        inner, flops = _open(jaxpr), 0
        values = {variable: value for variable, value in zip(inner.invars, inputs, strict=True) if value is not None}
        for variable, constant in zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=False):
            values[variable] = known.of_constant(constant, variable.aval)

        def value_of(variable):
            if isinstance(variable, Literal):
                return known.of_constant(variable.val, variable.aval)
            return values.get(variable)

        for equation in inner.eqns:
            work, results = self._equation(equation, [value_of(variable) for variable in equation.invars])
            flops += work
            for variable, value in zip(equation.outvars, results, strict=True):
                if value is not None:
                    values[variable] = value
        return flops, [value_of(variable) for variable in inner.outvars]

    def _equation(self, equation: JaxprEqn, inputs):
        name, params = equation.primitive.name, equation.params
        if name in self._leaves:
            return self._leaves[name](equation), [None] * len(equation.outvars)
        if _is_draw(equation):
            return 0, [self._drawn(params["name"].removeprefix(DRAW), equation.outvars[0].aval)]
        if name in self._control:
            return self._control[name](equation, inputs)
        called = list(_jaxprs_in(params))
        if not called:
            return 0, known.evaluate(equation, inputs)
        flops, results = self._call(equation, called, inputs)
        return flops and flops * _repeated(equation), results

    def _drawn(self, name: str, aval) -> Known:
        if name not in self._draws or not known.can_be_known(aval):
            return None
        return np.full(aval.shape, self._draws[name], aval.dtype)

    def _call(self, equation: JaxprEqn, called: list, inputs):
        """Count the programs that an equation calls, whatever its primitive."""
        count = self._within_kernels if equation.primitive.name == "pallas_call" else self
        inner = _open(called[0])
        arguments, results = _alike(equation.invars, inner.invars), _alike(equation.outvars, inner.outvars)
        # A call hands on all that it is given; shard_map cuts arrays, and what it does not cut is the same inside.
        handed_on = all(arguments + results) or equation.primitive.name == "shard_map"
        if len(called) > 1 or not handed_on:
            flops = sum(count.program(jaxpr, [None] * len(_open(jaxpr).invars))[0] for jaxpr in called)
            return flops, [None] * len(equation.outvars)
        flops, found = count.program(called[0], _where(arguments, inputs))
        return flops, _where(results, found)

    def _branches(self, equation: JaxprEqn, inputs):
        which, *operands = inputs
        branches = equation.params["branches"]
        if which is not None:
            return self.program(branches[int(np.clip(which, 0, len(branches) - 1))], operands)
        counts, results = zip(*(self.program(branch, operands) for branch in branches), strict=True)
        agreed = [
            values[0] if all(known.same(values[0], value) for value in values) else None
            for values in zip(*results, strict=True)
        ]
        return max(counts), agreed

    def _while(self, equation: JaxprEqn, inputs):
        params = equation.params
        condition, body = params["cond_jaxpr"], params["body_jaxpr"]
        condition_consts, body_consts, start = _cut(inputs, params["cond_nconsts"], params["body_nconsts"])
        flops, carry = 0, start
        for _ in range(_MOST_TRIPS):
            work, (continues,) = self.program(condition, [*condition_consts, *carry])
            flops += work
            if continues is None:
                break
            if not continues:
                return flops, carry
            work, carry = self.program(body, [*body_consts, *carry])
            flops += work
        flops, carry, _ = self._unchanging(body, body_consts, start, [])
        flops += self.program(condition, [*condition_consts, *carry])[0]
        if flops and self._dynamic_trips is None:
            raise UserError(
                "a loop's length is known only when it runs; give dynamic_trips, the trips to count it with"
            )
        return flops and flops * self._dynamic_trips, carry

    def _scan(self, equation: JaxprEqn, inputs):
        body, length = equation.params["jaxpr"], equation.params["length"]
        # JAX's versions write down the numbers of these differently; the body sees slices of the xs and makes slices.
        num_xs = _alike(equation.invars, _open(body).invars).count(False)
        num_carry = _alike(equation.outvars, _open(body).outvars).count(True)
        consts, start, xs = _cut(inputs, len(inputs) - num_xs - num_carry, num_carry)
        changing = any(value is not None for value in (*start, *xs))
        if not (changing and length <= _MOST_TRIPS and _decides(body)):
            flops, carry, made = self._unchanging(body, consts, start, [None] * num_xs)
            return flops * length, [*carry, *([None] * len(made))]
        flops, carry, stacks = 0, start, [[None] * length for _ in equation.outvars[num_carry:]]
        for trip in reversed(range(length)) if equation.params["reverse"] else range(length):
            slices = (None if x is None else x[trip] for x in xs)
            work, results = self.program(body, [*consts, *carry, *slices])
            flops += work
            carry, made, _ = _cut(results, num_carry, len(stacks))
            for stack, value in zip(stacks, made, strict=True):
                stack[trip] = value
        return flops, [*carry, *(_stacked(stack) for stack in stacks)]

    def _unchanging(self, body, consts, start, xs):
        """Count a trip of a loop's body that knows of its carry what no trip changes: (FLOPs, carry, other results)."""
        carry = start
        while True:
            flops, results = self.program(body, [*consts, *carry, *xs])
            kept = [old if known.same(old, new) else None for old, new in zip(carry, results, strict=False)]
            if all(old is None or new is not None for old, new in zip(carry, kept, strict=True)):
                return flops, carry, results[len(carry) :]
            carry = kept


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _cut(values: Sequence, first: int, second: int) -> tuple[list, list, list]:
    """Return the first so many values, the next so many, and the rest."""
    return list(values[:first]), list(values[first : first + second]), list(values[first + second :])


def _stacked(values: list[Known]) -> Known:
    if not values or any(value is None for value in values) or sum(value.size for value in values) > known.LARGEST:
        return None
    return np.stack(values)


def _alike(outer: Sequence, inner: Sequence) -> list[bool]:
    """Return which variables have the same shape and type outside and inside a call; none if their numbers differ."""
    kinds = [
        [(getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)) for v in side] for side in (outer, inner)
    ]
    return [one == other for one, other in zip(*kinds, strict=True)] if len(outer) == len(inner) else [False]


def _where(kept: Sequence[bool], values: Sequence[Known]) -> list[Known]:
    return [value if keep else None for keep, value in zip(kept, values, strict=True)]


def _is_draw(equation: JaxprEqn) -> bool:
    return equation.primitive.name == "name" and equation.params["name"].startswith(DRAW)


def _decides(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    """Return whether a program has a branch or a loop whose count may depend on its arguments."""
    return any(
        equation.primitive.name in ("cond", "while") or any(map(_decides, _jaxprs_in(equation.params)))
        for equation in _open(jaxpr).eqns
    )


def _repeated(equation: JaxprEqn) -> int:
    """Return how often an equation runs the program that it calls, over all devices."""
    name, params = equation.primitive.name, equation.params
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs_in(params: Mapping) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yield the programs that an equation calls, whatever its primitive names them."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def _dot_flops(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation: JaxprEqn) -> float:
    kernel = equation.invars[1].aval
    out_channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    products = kernel.size / out_channels / math.prod(equation.params["lhs_dilation"])
    return 2 * equation.outvars[0].aval.size * products


def _cudnn_flops(products: int) -> Callable[[JaxprEqn], int]:
    """Return the count of a fused attention that makes so many products of tokens x tokens x head size."""

    def flops(equation: JaxprEqn) -> int:
        query, key = (variable.aval.shape for variable in equation.invars[:2])  # B N H K
        batch, tokens, heads, head_dim = query
        return 2 * products * batch * heads * tokens * key[1] * head_dim

    return flops


_OUTSIDE_KERNELS = "dot_general", "conv_general_dilated"
_LEAVES = {
    "dot_general": _dot_flops,
    "conv_general_dilated": _convolution_flops,
    # Scores and output; backwards the scores again and the four gradients.
    "dot_product_attention_fwd_wrapper": _cudnn_flops(2),
    "dot_product_attention_bwd_wrapper": _cudnn_flops(5),
}

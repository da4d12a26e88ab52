"""The floating-point operations of a traced program, counted from its jaxpr.

What counts is the work of the matrix units: matrix products, convolutions and the attention kernels, a multiplication
and an addition as two operations. The body of a scan counts as often as it runs, that of `shard_map` once a device, and
a forward pass that remat runs again counts again. XLA's own count sees a loop's body once and a Pallas kernel not at
all, so it is of no use for a whole training step.
"""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from avd_jax.errors import UserError


def count_flops(function: Callable, *args, dynamic_trips: float | None = None) -> float:
    """Return the FLOPs of `function(*args)` over all devices.

    Args:
      function: anything that can be traced, jitted or not.
      args: arrays or `jax.ShapeDtypeStruct`s.
      dynamic_trips: see `jaxpr_flops`.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args), dynamic_trips=dynamic_trips)


def jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr, *, dynamic_trips: float | None = None) -> float:
    """Return the FLOPs of a program over all devices.

    Args:
      jaxpr: for instance `jitted.trace(*args).jaxpr`.
      dynamic_trips: how often the body of a loop whose length is not known before it runs is expected to run; the
        student's rollout up to a random step is such a loop. Loops within loops each run so often.

    Raises:
      UserError: a loop of unknown length with work in it, where `dynamic_trips` is not given.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation_flops(equation, dynamic_trips) for equation in inner.eqns)


def _equation_flops(equation: JaxprEqn, dynamic_trips: float | None) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _LEAVES:
        return _LEAVES[name](equation)
    if name == "cond":
        return max(jaxpr_flops(branch, dynamic_trips=dynamic_trips) for branch in params["branches"])
    inner = sum(jaxpr_flops(jaxpr, dynamic_trips=dynamic_trips) for jaxpr in _jaxprs_in(params))
    if not inner:
        return 0
    if name == "scan":
        return inner * params["length"]
    if name == "while":
        if dynamic_trips is None:
            raise UserError(
                "a loop's length is known only when it runs; give dynamic_trips, the trips to count it with"
            )
        return inner * dynamic_trips
    if name == "shard_map":
        mesh = params["mesh"]
        return inner * math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return inner * math.prod(params["grid_mapping"].grid)
    return inner


def _jaxprs_in(params: dict) -> Iterator[Jaxpr | ClosedJaxpr]:
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


_LEAVES = {
    "dot_general": _dot_flops,
    "conv_general_dilated": _convolution_flops,
    # Scores and output; backwards the scores again and the four gradients.
    "dot_product_attention_fwd_wrapper": _cudnn_flops(2),
    "dot_product_attention_bwd_wrapper": _cudnn_flops(5),
}

"""A program as capacity planning sees it: what is compiled, for which arguments, and what it draws at random."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean

from avd_jax.capacity.flops import draws_of, jaxpr_flops


@dataclass(frozen=True)
class Program:
    """A program and the shapes and shardings of its arguments.

    Attributes:
      name: under which it is reported.
      function: jitted.
      args: `jax.ShapeDtypeStruct`s with shardings, or arrays.
      outcomes: the equally likely values of what it draws for the whole batch, by the names that it gives them (see
        `capacity/flops.py`); ({"stop": 0}, {"stop": 1}) for a rollout that stops at one of two steps. With the one
        empty outcome all that it draws is unknown.
      resident: positions of the arguments that a run holds anyway (see `capacity/budget.py`).
      dynamic_trips: expected length of its loops whose length does not follow from the outcome.
    """

    name: str
    function: Callable
    args: tuple
    outcomes: tuple[Mapping[str, int], ...] = ({},)
    resident: tuple[int, ...] = ()
    dynamic_trips: float | None = None


def expected_flops(program: Program, *, traced=None, kernels_only: bool = False) -> float:
    """Return the FLOPs of one run over all devices, the mean over its outcomes.

    Args:
      program: is traced once, without a device.
      traced: `program.function.trace(*program.args)`, from a caller that has it.
      kernels_only: count attention kernels only.

    Raises:
      UserError: a loop whose length follows from no outcome, if `dynamic_trips` is not given.
      ValueError: an outcome without a number that the program draws.
    """
    jaxpr = (traced or program.function.trace(*program.args)).jaxpr
    missing = {name for outcome in program.outcomes if outcome for name in draws_of(jaxpr) - set(outcome)}
    if missing:
        raise ValueError(f"{program.name} draws {', '.join(sorted(missing))}, which not every outcome gives")
    trips = program.dynamic_trips
    options = {"dynamic_trips": trips, "kernels_only": kernels_only}
    return mean(jaxpr_flops(jaxpr, draws=outcome, **options) for outcome in program.outcomes)


def expected_trips(program: Program, *, traced=None) -> float:
    """Return how often the loops run on average whose length the compiled text does not say, for it knows no outcomes.

    That many trips make the FLOPs what they are expected to be: 1.5 of a rollout that makes 0 to 3 steps before it
    stops. One, if the program has no such loop.

    Args:
      program, traced: as for `expected_flops`.
    """
    if program.dynamic_trips is not None:
        return program.dynamic_trips
    traced = traced or program.function.trace(*program.args)
    none, once = (jaxpr_flops(traced.jaxpr, dynamic_trips=trips) for trips in (0, 1))
    return (expected_flops(program, traced=traced) - none) / (once - none) if once > none else 1.0

"""Optimised HLO as text: computations, instructions, and how often a loop runs.

A loop's trips are what the compiler noted (`known_trip_count`), or else follow from its condition `counter < bound`, if
both start from constants. The TPU's compiler notes none. Passes may move bound and step out of the loop, which then
carries them; so constants are followed through the tuples of all loops around.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<operation>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME_VALUE = ("copy", "bitcast", "convert", "copy-done", "copy-start", "opt-barrier")

Given = Mapping[int, int]  # position in the tuple that a loop carries -> constant that no trip changes


@dataclass(frozen=True)
class Instruction:
    """One line: `[ROOT] name = result operation(rest`."""

    result: str
    operation: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


Computation = Mapping[str, Instruction]


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Return computation -> instruction name -> instruction, and the entry computation's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            current[found["name"]] = Instruction(
                found["result"], found["operation"], found["rest"], found["root"] is not None
            )
    return computations, entry


def called_by(instruction: Instruction) -> Iterator[str]:
    """Yield the computations that an instruction calls."""
    yield from _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        yield from re.findall(r"[\w.\-]+", branches)


def loop(
    instruction: Instruction, computations: Mapping[str, Computation], within: Computation, given: Given
) -> tuple[int | None, Given]:
    """Return how often a loop runs, None if its text does not say, and the constants that it carries.

    Args:
      instruction: the `while`.
      computations: of the module.
      within: the computation that holds the loop.
      given: the constants of the loop around it.
    """
    named = {role: re.search(rf"\b{role}=%?([\w.\-]+)", instruction.rest) for role in ("condition", "body")}
    condition, body = (computations.get(found[1], {}) if found else {} for found in named.values())
    elements = _elements(instruction.operands[0], within) if instruction.operands else []
    start = {i: value for i, name in enumerate(elements) if (value := _constant(name, within, given)) is not None}
    results = next((one.operands for one in body.values() if one.root and one.operation == "tuple"), [])
    kept = {i for i, name in enumerate(results) if _moved(name, i, body, {}) == 0}
    unchanged = {i: value for i, value in start.items() if i in kept}
    moved = {i: _moved(name, i, body, unchanged) for i, name in enumerate(results)}
    noted = _TRIPS.search(instruction.rest)
    return int(noted[1]) if noted else _counted(condition, start, moved, unchanged), unchanged


def _counted(condition: Computation, start: Given, moved: Mapping[int, int | None], unchanged: Given) -> int | None:
    """Return the trips of a loop `while counter < bound`."""
    test = next((one for one in condition.values() if one.root), None)
    if test is None or test.operation != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = _source(test.operands[0], condition), _constant(test.operands[1], condition, unchanged)
    position = _position(condition[counter]) if counter in condition else None
    step = moved.get(position) if position is not None else None
    if bound is None or position not in start or not step or step < 0:
        return None
    return max(0, -(-(bound - start[position]) // step))


def _source(name: str, within: Computation) -> str:
    """Return where a value comes from, behind copies."""
    while name in within and within[name].operation in _SAME_VALUE and within[name].operands:
        name = within[name].operands[0]
    return name


def _position(instruction: Instruction) -> int | None:
    """Return which element of a tuple an instruction takes, if it does."""
    found = re.search(r"\bindex=(\d+)", instruction.rest)
    return int(found[1]) if instruction.operation == "get-tuple-element" and found else None


def _constant(name: str, within: Computation, given: Given) -> int | None:
    """Return an integer that is constant, here or in the tuple of the loop whose body this is."""
    instruction = within.get(_source(name, within))
    if instruction is None:
        return None
    if instruction.operation == "constant":
        found = re.match(r"(-?\d+)\)", instruction.rest)
        return int(found[1]) if found else None
    carried = _position(instruction) is not None and _is_parameter(instruction.operands[0], within)
    return given.get(_position(instruction)) if carried else None


def _is_parameter(name: str, within: Computation) -> bool:
    return name in within and within[name].operation == "parameter"


def _elements(name: str, within: Computation) -> list[str]:
    instruction = within.get(_source(name, within))
    return instruction.operands if instruction is not None and instruction.operation == "tuple" else []


def _moved(name: str, position: int, body: Computation, given: Given) -> int | None:
    """Return by how much a trip moves the element at a position of the tuple, if it adds constants to it."""
    instruction = body.get(_source(name, body))
    if instruction is None:
        return None
    if _position(instruction) == position and _is_parameter(instruction.operands[0], body):
        return 0
    if instruction.operation != "add":
        return None
    for one, other in (instruction.operands, reversed(instruction.operands)):
        before, step = _moved(one, position, body, given), _constant(other, body, given)
        if before is not None and step is not None:
            return before + step
    return None

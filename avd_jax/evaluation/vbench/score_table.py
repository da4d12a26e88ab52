"""Scores as a table to print, and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict

from avd_jax.evaluation.vbench.scores import Difference, Result, differences, totals
from avd_jax.evaluation.vbench.suites import Suite

WIDTH = 30


def as_record(suite: Suite, results: Mapping[str, Result], others: Mapping[str, Result] | None = None) -> dict:
    """Return all that there is to tell, as JSON takes it."""
    found = totals(suite, {name: result.score for name, result in results.items()})
    record = {
        "suite": suite.name,
        "raw": {name: result.score for name, result in results.items()},
        "normalised": found.normalised,
        "groups": found.groups,
        "total": found.total,
        "missing": list(found.missing),
        "videos": {name: {"found": r.count, "expected": suite.results_of(name)} for name, r in results.items()},
    }
    if others is not None:
        beside = as_record(suite, others)
        changes = differences(suite, results, others)
        record["beside"] = beside | {"differences": {name: asdict(change) for name, change in changes.items()}}
    return record


def table(suite: Suite, results: Mapping[str, Result], others: Mapping[str, Result] | None = None) -> str:
    """Return a table: a line a dimension, a group, and the total; beside other videos also the difference."""
    found = totals(suite, {name: result.score for name, result in results.items()})
    changes = {} if others is None else differences(suite, results, others)
    beside = None if others is None else totals(suite, {name: result.score for name, result in others.items()})
    head = f"{suite.title:{WIDTH}}{'results':>12}{'raw':>9}{'norm %':>9}"
    lines = [head if others is None else f"{head}{'other raw':>11}{'difference':>12}   95 % of it"]
    for name in suite.prompts:
        if name not in results and name not in (others or {}):
            continue
        line = f"{name:{WIDTH}}"
        if name in results:
            count, expected = results[name].count, suite.results_of(name)
            line += f"{count:>6}/{expected:<5}{results[name].score:>9.4f}{100 * found.normalised[name]:>9.2f}"
        else:
            line += f"{'':>12}{'-':>9}{'-':>9}"
        if others is not None:
            line += f"{others[name].score:>11.4f}" if name in others else f"{'-':>11}"
            line += _change(changes.get(name), 1, 4)
        lines.append(line)
    for group, value in [*found.groups.items(), *([("Total", found.total)] if found.total is not None else [])]:
        line = f"{group:{WIDTH}}{'':>12}{'':>9}{100 * value:>9.2f}"
        if beside is not None:
            other = beside.total if group == "Total" else beside.groups.get(group)
            line += f"{'-' if other is None else f'{100 * other:.2f}':>11}"
            line += _change(changes.get(group), 100, 2)
        lines.append(line)
    few = [name for name, result in results.items() if result.count < suite.results_of(name)]
    if few:
        lines.append(f"fewer results than videos that {suite.title} asks for: {', '.join(few)}")
    return "\n".join(lines)


def _change(change: Difference | None, scale: float, digits: int) -> str:
    if change is None:
        return ""
    bounds = [None if bound is None else f"{scale * bound:+.{digits}f}" for bound in (change.low, change.high)]
    return f"{scale * change.value:>+12.{digits}f}   " + (
        "(no video in common)" if None in bounds else " to ".join(bounds)
    )

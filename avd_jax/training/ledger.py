"""Where a run's time goes: its wall time by what it was spent on, over all launches of the run.

Only the host's clock is read, where the host already is: no step waits for it. What the devices still work on while the
host waits for data or copies a checkpoint counts as that. The numbers stand in each line of `metrics.jsonl` as
`time/spent_<kind>`, in seconds since the run began, so that a later launch goes on from them.
"""

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

# `down`: between two launches, from the last line that one logged to the start of the next one.
# `lost`: steps that were made, but not saved before the end of a launch.
KINDS = {
    "start": "start",
    "compile": "compiling",
    "restore": "restoring",
    "data": "waiting for data",
    "step": "training",
    "sample": "samples",
    "save": "saving",
    "down": "down between launches",
    "lost": "training that was lost",
}
_PREFIX = "time/spent_"
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_compiled = [0.0]  # seconds that this process has compiled


class Ledger:
    """The seconds of a run so far, by kind; from the start on they count as `start`."""

    def __init__(self):
        """Begin to count."""
        _listen()
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since, self._compiled = "start", time.monotonic(), _compiled[0]
        self._began = time.time()

    def goes_on(self, lines: list[dict], step: int) -> list[dict]:
        """Add what earlier launches spent.

        Args:
          lines: of `metrics.jsonl`, also those after `step`.
          step: from which the run resumes.

        Returns:
          The lines that stay, those up to `step`. The last one says from now on what this launch knows, since nothing
          else does if it is killed before it logs.
        """
        kept = [line for line in lines if line["step"] <= step]
        known = [line for line in lines if f"{_PREFIX}step" in line]
        if not known:
            return kept
        last = known[-1]
        for kind in KINDS:
            self._spent[kind] += last.get(f"{_PREFIX}{kind}", 0.0)
        self._spent["down"] += max(0.0, self._began - last.get("time/unix", self._began))
        saved = [line for line in known if line in kept]
        before = saved[-1] if saved else {"step": 0}
        if last["step"] > step:
            since = last[f"{_PREFIX}step"] - before.get(f"{_PREFIX}step", 0.0)
            lost = max(0.0, since) * (last["step"] - step) / (last["step"] - before["step"])
            self._spent["step"] -= lost
            self._spent["lost"] += lost
        kept = kept or [{"step": step}]
        kept[-1] = kept[-1] | self.numbers()
        return kept

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`, what is compiled meanwhile excepted."""
        outer = self._kind
        self.turn_to(kind)
        try:
            yield
        finally:
            self.turn_to(outer)

    def turn_to(self, kind: str) -> None:
        """Count the time from now on as `kind`."""
        now, compiled = time.monotonic(), _compiled[0]
        elapsed = now - self._since
        compiling = min(elapsed, compiled - self._compiled)
        self._spent[self._kind] += elapsed - compiling
        self._spent["compile"] += compiling
        self._kind, self._since, self._compiled = kind, now, compiled

    def numbers(self) -> dict[str, float]:
        """Return what is to be logged: the seconds of each kind, the share that was training, and the time of day."""
        self.turn_to(self._kind)
        spent = {f"{_PREFIX}{kind}": seconds for kind, seconds in self._spent.items()}
        total = sum(self._spent.values())
        return spent | {"time/goodput": self._spent["step"] / total if total else 0.0, "time/unix": time.time()}


def in_words(numbers: Mapping[str, float]) -> str:
    """Return a sentence on `Ledger.numbers`, the largest shares first."""
    spent = {kind: numbers.get(f"{_PREFIX}{kind}", 0.0) for kind in KINDS}
    total = sum(spent.values()) or 1.0
    others = sorted((kind for kind in KINDS if kind != "step" and spent[kind] / total >= 0.0005), key=spent.get)
    rest = ", ".join(f"{KINDS[kind]} {spent[kind] / total:.1%}" for kind in reversed(others))
    return f"{spent['step'] / total:.1%} of {total / 3600:.2f} h was training" + (f"; {rest}" if rest else "")


def read_lines(path: Path) -> list[dict]:
    """Return the whole lines of a `metrics.jsonl`, none if there is no such file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # of a line that a kill cut off
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
    return found


@functools.cache
def _listen() -> None:
    def heard(event: str, seconds: float, **_) -> None:
        if event in _COMPILE_EVENTS:
            _compiled[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(heard)

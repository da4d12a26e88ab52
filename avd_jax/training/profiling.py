"""A trace of a few steps for XProf (`xprof --logdir WORKDIR/profile`)."""

from pathlib import Path

import jax

TRACED_STEPS = 3
WARM_UP = 2  # the first steps compile


class Profile:
    """Traces a few steps of a loop, once they are warm; without a folder it does nothing."""

    def __init__(self, folder: Path | None, *, first_step: int, num_steps: int):
        """Choose the steps of a loop from `first_step` to `num_steps`."""
        self._folder, self._running = folder, False
        self._start = max(first_step, min(first_step + WARM_UP, num_steps - TRACED_STEPS))
        self._stop = self._start + TRACED_STEPS

    def before(self, step: int) -> None:
        """Start the trace if `step` is the first one in it."""
        if self._folder and step == self._start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would bury the devices' work
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True

    def after(self, step: int, metrics) -> None:
        """Stop the trace if `step`, which gave `metrics`, was the last one in it."""
        if self._running and step + 1 == self._stop:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Stop a trace that is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

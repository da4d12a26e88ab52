"""The analysis of videos on Apache Beam: the same function and the same files as with the process pool.

Beam only spreads the videos over its workers; each of them keeps its results in the store, which therefore lies, as the
videos do, where all workers reach it under the same path.
"""

import contextlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from avd_jax.curation import pipeline as curation
from avd_jax.curation.pipeline import Job, keep
from avd_jax.curation.runner import call
from avd_jax.curation.store import Store
from avd_jax.curation.worker import Worker
from avd_jax.errors import UserError

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise UserError(
        '--runner beam needs Apache Beam: pip install "avd_jax[beam]" (in a checkout: -e ".[beam]")'
    ) from error


class Analyse(beam.DoFn):
    """Analyses a video in a process of its own, as the pool does, so that no video stops the pipeline."""

    def __init__(self, function: str, folder: str, settings: dict, *, seconds: float, memory_gib: float):
        """Take what is the same for all videos; the folder is that of the store, the rest as for `run_pool`."""
        self._function, self._store, self._settings = function, Store(folder), settings
        self._limits = {"seconds": seconds, "memory_gib": memory_gib}
        self._worker: Worker | None = None

    def setup(self) -> None:
        """Begin; called once a worker."""
        self._worker = Worker(self._function, **self._limits)

    def process(self, job: Job):
        """Analyse one video and keep the result."""
        keep(self._store, job, *call(self._worker, [job.path, self._settings]))
        yield job.name

    def teardown(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()


def beam_runner(config, workers: int, arguments: str) -> Callable[[Sequence[Job], Store], None]:
    """Return a function that analyses videos on Beam.

    Args:
      config: validated.
      workers: processes, if Beam runs on this machine.
      arguments: Beam's own flags, in one text. Without a --runner in it, Beam's DirectRunner takes processes here.

    Raises:
      UserError: the arguments are none.
    """
    try:
        given = shlex.split(arguments)
    except ValueError as error:
        raise UserError(f"--beam_args={arguments!r} is no command line ({error})") from None
    if not any(argument.startswith("--runner") for argument in given):
        given = [
            *("--runner=DirectRunner", "--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"),
            "--default_sdk_harness_log_level=ERROR",
            *given,
        ]
    settings, limits = config.analysis.to_dict(), config.limits.to_dict()

    def run(jobs: Sequence[Job], store: Store) -> None:
        folder = str(Path(store.folder).absolute())
        analyse = beam.ParDo(Analyse(curation.ANALYSE, folder, settings, **limits))
        with _told(), beam.Pipeline(options=PipelineOptions(given)) as pipeline:
            _ = pipeline | beam.Create(list(jobs)) | beam.Reshuffle() | analyse

    return run


@contextlib.contextmanager
def _told():
    """Make what Beam raises one line; its last line is what says what happened."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"--runner beam: {lines[-1]}; what is finished is kept, the same command continues") from error

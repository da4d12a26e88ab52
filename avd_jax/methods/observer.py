"""What a distillation shows while it trains: its meters, histograms of the regression weight, and sample videos."""

from collections.abc import Callable, Mapping

from avd_jax.data.leakage import leakage, read_texts
from avd_jax.data.mixture import named_sets
from avd_jax.fields import listed
from avd_jax.methods.meters import BINS, Meters
from avd_jax.methods.samples import SampleWriter
from avd_jax.parallel.hosts import is_first
from avd_jax.training.method import Observer, Surroundings, Trained


class DistillationObserver(Observer):
    """Feeds the meters with every update and with sample videos."""

    samples_at_start = True

    def __init__(
        self,
        config,
        generator: Trained,
        student,
        teacher,
        teacher_parts,
        model,
        info,
        mesh,
        surroundings: Surroundings,
        frozen: Mapping,
    ):
        """Choose the prompts to sample; `generator` is the student, the other arguments as in `SampleWriter`."""
        self._writer, self._generator, self._frozen = surroundings.writer, generator, frozen
        if is_first():
            _tell_of_leakage(config, self._writer.message)
        self.sample_every = config.sample_every
        self._meters = Meters(
            config.meters, config.student.timesteps, self._writer.message, batch_size=config.batch_size
        )
        self._samples = None
        if config.sample_every:
            self._samples = SampleWriter(
                config, student, teacher, teacher_parts, model, info, mesh, surroundings, frozen, self._meters
            )

    @property
    def ratings(self) -> Mapping[str, float]:
        """The latest value of each meter and of each metric of the samples."""
        return self._meters.values

    def summarise(self, step: int, metrics: Mapping) -> dict[str, float]:
        """Return the numbers to log; histograms are logged here."""
        values = dict(metrics)
        for name, counts in self._meters.after_update(step, values).items():
            self._writer.histogram(step, name, counts, BINS)
        return {name: float(value) for name, value in values.items()}

    def sample(self, step: int, state) -> None:
        """Write the student's videos, and rate them."""
        latest = state.networks["generator"].latest
        self._samples.write(step, self._generator.parameters(latest, self._frozen))


def _tell_of_leakage(config, message: Callable[[str], None]) -> None:
    """Send a line for each list that the student will be judged by, if it trains on prompts like those."""
    against = listed(config.data.held_out)
    for source, _ in named_sets(config.data.prompts or config.data.latents) if against else ():
        texts = read_texts(source)
        for path in against:
            found = leakage(texts, path)
            if found.pairs:
                message(
                    f"leakage: {found.summary()} ({source}); scripts/vbench.py leakage --prompts {source} "
                    f"--against {path} shows them"
                )

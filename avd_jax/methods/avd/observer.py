"""What AVD's run keeps for its student beside what every distillation shows."""

from avd_jax import convert
from avd_jax.convert.shipping import write_interpolator
from avd_jax.methods.observer import DistillationObserver
from avd_jax.parallel.hosts import is_first
from avd_jax.training.method import Surroundings


class AVDObserver(DistillationObserver):
    """Copies the frame interpolator to the run, for its student to find."""

    def __init__(self, config, *arguments):
        """Arguments as in `DistillationObserver`, the surroundings last but one."""
        surroundings: Surroundings = arguments[-2]
        if config.half_rate.interpolator and is_first():
            write_interpolator(convert.load_interpolator(config.half_rate.interpolator), surroundings.workdir)
        super().__init__(config, *arguments)

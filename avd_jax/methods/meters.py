"""Collapse meters: how far the student's videos are from real ones while it trains.

A collapse under distribution matching shows as frames that stop moving and as colours that saturate. Each meter is a
share: the student's mean over the real data's. Latent meters come with every update whose rollout reaches the
student's last step and cost nothing; the others are measured on the decoded samples, of student, teacher and real clips
alike. A meter that leaves its band says so once, and once when it is back. Latent meters are judged by their mean over
the last JUDGED_EXAMPLES examples, because those of a small batch scatter. Decoded ones are few and of other captions
than the real clips. They count as outside only if they are also outside relative to the teacher's videos.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.evaluation.suite import RELATIVE, summarise
from avd_jax.losses.temporal import temporal_variance
from avd_jax.training.method import Made, Value

LATENT = ("latent_temporal_variance", "latent_spread")
ADVICE = {
    "temporal_variance": ("motion freezes", "frames jump"),
    "latent_temporal_variance": ("motion freezes", "frames jump"),
    "saturation": ("colours fade", "colours are oversaturated"),
    "colourfulness": ("colours fade", "colours are oversaturated"),
    "latent_spread": ("contrast fades", "contrast and colours are too strong"),
}
BINS = np.linspace(0, 1, 11)  # of the regression weight
WEIGHTS_A_HISTOGRAM = 256
JUDGED_EXAMPLES = 32


def latent_meters(latents: jax.Array) -> dict[str, jax.Array]:
    """Return what the latent meters compare, [B] each, of latents [B F H W C].

    The spread, the deviation over height and width, represents contrast and saturation, which need decoded pixels.
    """
    latents = latents.astype(jnp.float32)  # variances are means of small squares
    return {
        "latent_temporal_variance": temporal_variance(latents),
        "latent_spread": jnp.mean(jnp.std(latents, axis=(2, 3)), axis=(1, 2)),
    }


def latent_shares() -> Value:
    """Return the value of an update by which `latent_metrics` compares its samples `x0` with real `latents`."""

    def compared(x0, latents) -> dict:
        meters = {"made": latent_meters(x0), "real": latent_meters(latents)}
        return {f"{whose}/{name}": value for whose, found in meters.items() for name, value in found.items()}

    return Value("latent_meters", ("x0", "latents"), compared)


def latent_metrics(made: Made) -> dict[str, jax.Array]:
    """Return the metrics that `Meters.after_update` takes: where the rollout stopped, and the latent meters.

    nan stands for samples that were not made; an update that draws no stop makes none and has no such metrics.
    """
    if "stop" not in made.draws:
        return {}
    metrics, found = {"rollout_stop": made.draws["stop"]}, made.values.get("latent_meters")
    for name in LATENT:
        share = jnp.nan if found is None else jnp.mean(found[f"made/{name}"]) / jnp.mean(found[f"real/{name}"])
        metrics[f"meter/{name}"] = jnp.asarray(share, jnp.float32)
    return metrics


class Meters:
    """Holds each meter's last value, and warns when it leaves its band."""

    def __init__(
        self,
        bands: Mapping[str, Sequence[float]],
        timesteps: Sequence[float],
        message: Callable[[str], None],
        *,
        batch_size: int,
    ):
        """Take the bands by meter, the student's timesteps, where warnings go, and the examples of an update."""
        self._bands, self._timesteps, self._message = dict(bands), tuple(timesteps), message
        self._outside: set[str] = set()
        self._weights: list[list[float]] = [[] for _ in self._timesteps]
        self._recent = {name: deque(maxlen=math.ceil(JUDGED_EXAMPLES / batch_size)) for name in LATENT}
        self.values = {
            f"meter/{name}": float("nan") for name in LATENT
        }  # the last of each; a checkpoint is rated by it

    def after_update(self, step: int, metrics: dict) -> dict[str, list[int]]:
        """Take the meters and weights of one update out of its metrics; meters that are worth logging stay.

        Returns:
          Histograms of the regression weight by name, one for each timestep that has any, once enough weights have come
          together; the counts are of ten bins over 0..1.
        """
        if "rollout_stop" not in metrics:  # an update without the student's samples
            return {}
        latent = {name: float(metrics.pop(f"meter/{name}")) for name in LATENT}
        if int(metrics.pop("rollout_stop")) == len(self._timesteps) - 1 and np.isfinite(list(latent.values())).all():
            metrics |= self._keep(latent)
            for name, recent in self._recent.items():
                recent.append(latent[name])
                if len(recent) == recent.maxlen:
                    self._judge(step, name, {"the real data's": float(np.mean(recent))})
        regression = (metrics.pop(name, ()) for name in ("timestep_index", "regression_weight"))
        for index, weight in zip(*regression, strict=True):
            if weight > 0:  # a stand-in is 0 if there is no regression, and a skipped update's may not be finite
                self._weights[int(index)].append(float(weight))
        if sum(map(len, self._weights)) < WEIGHTS_A_HISTOGRAM:
            return {}
        counts = {
            f"regression/weight_histogram_t{timestep:g}": np.histogram(weights, BINS)[0].tolist()
            for timestep, weights in zip(self._timesteps, self._weights, strict=True)
            if weights
        }
        self._weights = [[] for _ in self._timesteps]
        return counts

    def expect_samples(self, names: Iterable[str]) -> None:
        """Say which metrics the rows of `after_samples` will have, so that a checkpoint may be rated by them."""
        self.values |= {f"meter/{name}": float("nan") for name in RELATIVE}
        self.values |= {f"samples/{name}": float("nan") for name in names}

    def after_samples(
        self, step: int, rows: Sequence[Mapping], teacher: Sequence[Mapping], real: Sequence[Mapping]
    ) -> dict[str, float]:
        """Return what to log of decoded samples, one row a video, of student, teacher (or none) and real clips."""
        student = summarise(rows, real)
        values = self._keep({name: student[f"{name}/relative"] for name in RELATIVE})
        beside = {"the real data's": student}
        if teacher:
            of_teacher = summarise(teacher, real)
            values |= {f"meter/teacher_{name}": of_teacher[f"{name}/relative"] for name in RELATIVE}
            beside["the teacher's"] = summarise(rows, teacher)
        for name in RELATIVE:
            self._judge(step, name, {whose: means[f"{name}/relative"] for whose, means in beside.items()})
        values |= {f"samples/{name}": value for name, value in student.items() if not name.endswith("/relative")}
        self.values |= values
        return values

    def _keep(self, shares: Mapping[str, float]) -> dict[str, float]:
        named = {f"meter/{name}": value for name, value in shares.items()}
        self.values |= named
        return named

    def _judge(self, step: int, name: str, shares: Mapping[str, float]) -> None:
        low, high = self._bands.get(name, (-np.inf, np.inf))
        outside = not any(low <= share <= high for share in shares.values())
        if outside == (name in self._outside):
            return
        self._outside ^= {name}
        found = " and ".join(f"{share:.2f} of {whose}" for whose, share in shares.items())
        if outside:
            what = ADVICE[name][min(shares.values()) > high]
            self._message(
                f"warning: step {step}: meter/{name} is {found}, outside config.meters.{name}={low:g}..{high:g}: {what}"
            )
        else:
            self._message(f"step {step}: meter/{name} is back in its band {low:g}..{high:g}: {found}")

"""Charts of what runs logged in their `metrics.jsonl`."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avd_jax.data.html import Curve, Html, charts, line_chart

CHARTS = {  # what is worth a chart, and its title
    "meter/temporal_variance": "Temporal variance of the samples, share of real videos'",
    "meter/saturation": "Saturation of the samples, share of real videos'",
    "meter/colourfulness": "Colourfulness of the samples, share of real videos'",
    "meter/latent_temporal_variance": "Temporal variance in latents, share of real data's",
    "samples/alignment": "Caption alignment of the samples",
    "samples/instance_preservation": "Instance preservation of the samples",
    "loss/distribution_matching": "Distribution matching loss",
    "loss/fake_score": "Loss of fake_score",
    "loss/regression": "Regression loss",
    "loss/temporal": "Temporal loss, before the clip",
    "regression/weight": "Weight of the regression",
}
MOST_POINTS = 60  # a curve with more is shown as means of neighbours


def training_charts(runs: Mapping[str, Sequence[Path]]) -> Html:
    """Return a chart for each number that is worth one and was logged.

    Args:
      runs: label -> folders of runs that differ only in their seed; a curve is their mean.
    """
    logged = {
        label: _mean_of([_read(folder / "metrics.jsonl") for folder in folders]) for label, folders in runs.items()
    }
    figures = []
    for name, title in CHARTS.items():
        curves = [Curve(label, _thinned(points.get(name, {}))) for label, points in logged.items()]
        if any(curve.points for curve in curves):
            figures.append(line_chart(title, curves))
    return charts(figures)


def last_logged(folder: Path) -> dict[str, tuple[int, float]]:
    """Return name -> (step, value) of what a run logged last; see `training_charts`."""
    return {name: max(steps.items()) for name, steps in _read(folder / "metrics.jsonl").items()}


def _read(path: Path) -> dict[str, dict[int, float]]:
    """Return name -> step -> value of a log; numbers that were not finite, and terms switched off, are left out."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that a running training has half written, or a kill cut off
        for name, value in entry.items():
            if isinstance(value, int | float):
                values[name][step] = value
    return {name: steps for name, steps in values.items() if any(steps.values())}


def _mean_of(logs: Sequence[dict[str, dict[int, float]]]) -> dict[str, dict[int, float]]:
    """Return the mean over the logs of what all of them have."""
    together: dict[str, dict[int, float]] = {}
    for name in logs[0] if logs else ():
        steps = set.intersection(*(set(log.get(name, ())) for log in logs))
        together[name] = {step: float(np.mean([log[name][step] for log in logs])) for step in sorted(steps)}
    return together


def _thinned(steps: Mapping[int, float]) -> list[tuple[float, float]]:
    points = np.asarray(list(steps.items()), float)
    if len(points) > MOST_POINTS:
        points = np.stack([part.mean(0) for part in np.array_split(points, MOST_POINTS)])
    return [tuple(point) for point in points.tolist()]

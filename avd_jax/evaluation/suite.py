"""All metrics of one video, and the means over many."""

from collections.abc import Mapping, Sequence

import numpy as np

from avd_jax.data.shapes_world import parse_caption
from avd_jax.evaluation import colour, motion, scenes

RELATIVE = ("saturation", "colourfulness", "temporal_variance")  # also told as a share of the real videos' mean


def measure(video: np.ndarray, caption: str = "", *, fps: float = 16.0) -> dict[str, float]:
    """Return the metrics of a video.

    Args:
      video: [F H W 3] in [-1, 1], at least 2 frames.
      caption: what it should show; the metrics that know the scene are there only for one of the built-in world.
      fps: frames a second.

    Raises:
      UserError: fewer than 2 frames.
    """
    row = {
        "flow_dynamic_degree": motion.flow_dynamic_degree(video, fps),
        "flicker": motion.flicker(video),
        "temporal_variance": motion.temporal_variance(video),
        "saturation": colour.saturation(video),
        "colourfulness": colour.colourfulness(video),
    }
    if not parse_caption(caption):
        return row
    reading = scenes.read(video)
    aligned = scenes.alignment(reading, caption)
    return {
        "alignment": aligned.pop("mean"),
        **{f"alignment/{name}": value for name, value in aligned.items()},
        "instance_preservation": scenes.instance_preservation(reading),
        "dynamic_degree": scenes.dynamic_degree(video),
        **row,
    }


def summarise(
    rows: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]] | None = None
) -> dict[str, float]:
    """Return the mean of every metric over the rows that have it, and `X/relative`, its share of the real mean."""
    means = {
        name: float(np.mean([row[name] for row in rows if name in row]))
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    if real is not None:
        for name in RELATIVE:
            means[f"{name}/relative"] = means[name] / float(np.mean([row[name] for row in real]))
    return means

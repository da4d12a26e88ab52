"""Sets of videos measured and shown side by side: `metrics.json` and `report.html`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from avd_jax.data.atomic import write_text
from avd_jax.data.html import Html, heading, paragraph, table, video_table, write_page
from avd_jax.errors import UserError
from avd_jax.evaluation.suite import summarise
from avd_jax.experiments.curves import training_charts
from avd_jax.experiments.videos import CaptionedVideo, measure_videos

METRICS = {  # those of the page's table, in its order, and what they say
    "alignment": "caption alignment: colours, shapes and directions as the caption says",
    "alignment/shape": "of it, shape",
    "alignment/colour": "of it, colour",
    "alignment/direction": "of it, direction",
    "instance_preservation": "instance preservation: the same objects in every frame",
    "dynamic_degree": "dynamic degree: share of videos in which something really moves",
    "flow_dynamic_degree": "dynamic degree by optical flow (VBench's rule)",
    "saturation": "mean HSV saturation",
    "saturation/relative": "saturation, share of the real videos'",
    "colourfulness": "colourfulness (Hasler and Suesstrunk)",
    "colourfulness/relative": "colourfulness, share of the real videos'",
    "temporal_variance": "variance of pixels along frames",
    "temporal_variance/relative": "variance along frames, share of the real videos'",
    "flicker": "absence of flicker (VBench's formula; 1 is a still picture)",
}
REAL = "real"  # the set, if there is one, that the others are compared with
SHOWN = 16  # captions of which the page shows the videos; Chrome plays at most 75 in a page


def compare(
    sets: Mapping[str, Sequence[CaptionedVideo]],
    out: Path,
    *,
    title: str,
    about: str,
    run: Path | None = None,
    on_progress: Callable[[int], object] = lambda done: None,
) -> dict[str, dict[str, float]]:
    """Measure sets of videos and write `metrics.json` and `report.html` to a folder.

    Args:
      sets: name -> videos; those of several sets stand side by side in their order.
      out: the folder.
      title: of the page.
      about: a sentence on how the videos came about.
      run: a training run, whose curves the page shows if it has logged any.
      on_progress: called with the number of further videos that are measured.

    Returns:
      name -> metric -> mean over the set.

    Raises:
      UserError: a video that cannot be measured, or a folder that cannot be written.
    """
    rows = {name: measure_videos(videos, on_progress) for name, videos in sets.items()}
    means = {name: summarise(rows[name], rows.get(REAL)) for name in sets}
    record = {
        name: {
            "videos": len(videos),
            "metrics": {metric: _finite(value) for metric, value in means[name].items()},
            "rows": [
                {"file": _relative(video.file, out), "caption": video.caption, **row}
                for video, row in zip(videos, rows[name], strict=True)
            ],
        }
        for name, videos in sets.items()
    }
    try:
        write_text(out / "metrics.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    page = out / "report.html"
    counts = ", ".join(f"{name} {len(videos)}" for name, videos in sets.items())
    pieces = [paragraph(about), paragraph(f"Videos measured: {counts}.", soft=True)]
    pieces += [heading("Metrics"), means_table(means), heading("Videos"), side_by_side(sets, page)]
    if run is not None and (run / "metrics.jsonl").is_file():
        pieces += [heading("Training"), training_charts({run.name: [run]})]
    write_page(page, title, pieces)
    return means


def means_table(means: Mapping[str, Mapping[str, float]]) -> Html:
    """Return a table with a row for each metric that a set has, and a column for each set."""
    shown = [metric for metric in METRICS if any(metric in values for values in means.values())]
    rows = [
        [METRICS[metric], *(f"{values[metric]:.3f}" if metric in values else "" for values in means.values())]
        for metric in shown
    ]
    return table(["mean over the videos", *means], rows)


def side_by_side(sets: Mapping[str, Sequence[CaptionedVideo]], page: Path, shown: int = SHOWN) -> Html:
    """Return the first videos of the sets beside each other, a row a caption."""
    captions = next(iter(sets.values()))[:shown]
    rows = [
        (video.caption or video.file.name, [videos[i].file for videos in sets.values()])
        for i, video in enumerate(captions)
    ]
    return video_table(list(sets), rows, page=page)


def _relative(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

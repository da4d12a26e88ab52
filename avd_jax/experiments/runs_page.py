"""One page on several runs and folders of videos: metrics, the same prompts side by side, curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from beartype.door import is_bearable

from avd_jax.convert.layouts import read_json
from avd_jax.data.captions import VIDEO_SUFFIXES
from avd_jax.data.html import Html, heading, paragraph, table, video_table, write_page
from avd_jax.errors import UserError
from avd_jax.experiments.comparison import REAL, means_table
from avd_jax.experiments.curves import CHARTS, last_logged, training_charts
from avd_jax.experiments.video_sets import Shown, matched, read_set, with_record
from avd_jax.training.ledger import in_words

MOST_ROWS, MOST_VIDEOS = 16, 75  # Chrome plays at most 75 in a page
_RESULTS = ("metrics.json", "evaluation/metrics.json")  # of scripts/evaluate.py, with --out as its docs have it

Logged = dict[str, tuple[int, float]]  # name -> (step, value)


@dataclass
class Source:
    """What lies in a folder.

    Attributes:
      videos: set -> its videos; the set of a plain folder has no name.
      metrics: set -> metric -> mean, as scripts/evaluate.py measured it.
      run: the folder, if a training logged there.
    """

    videos: dict[str, list[Shown]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    run: Path | None = None


def read_source(folder: Path) -> Source:
    """Return what lies in a folder: evaluated sets, else the latest samples of a run, else videos.

    Raises:
      UserError: nothing of that, or a file that is not what it should be.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; give a training run, or a folder of videos")
    run = folder if (folder / "metrics.jsonl").is_file() else None
    results = next((folder / name for name in _RESULTS if (folder / name).is_file()), None)
    if results:
        source = _evaluated(results)
    elif samples := _latest_samples(folder):
        source = Source({f"samples of {samples.name.replace('_', ' ')}": read_set(samples)})
    elif any(file.suffix.lower() in VIDEO_SUFFIXES for file in folder.rglob("*")):
        source = Source({"": read_set(folder)})
    elif run:
        source = Source()
    else:
        raise UserError(
            f"{folder}: holds no videos, no metrics.json of scripts/evaluate.py and no metrics.jsonl of a training; "
            "give a training run, or a folder of videos"
        )
    source.run = run
    return source


def write_comparison(folders: Sequence[Path], page: Path) -> None:
    """Write a page that compares what lies in several folders.

    Raises:
      UserError: as for `read_source`; or fewer than two folders, one twice, or a page that cannot be written.
    """
    if len(folders) < 2:
        raise UserError("give two folders at least: training runs, or folders of videos")
    names = _names(folders)
    videos, metrics, runs = {}, {}, {}
    for folder, name in names.items():
        source = read_source(folder)
        if source.run:
            runs[name] = [source.run]
        for part in dict.fromkeys((*source.videos, *source.metrics)):
            if part == REAL and REAL in {*videos, *metrics}:
                continue  # of the same captions, or not to be compared
            label = part if part == REAL else f"{name}: {part}" if part else name
            if source.videos.get(part):
                videos[label] = source.videos[part]
            if part in source.metrics:
                metrics[label] = source.metrics[part]
    logged = {name: last_logged(folder) for name, (folder,) in runs.items()}
    pieces = _numbers(metrics, logged)
    if videos:
        pieces += [heading("Videos"), *_side_by_side(videos, page)]
    if _of_interest(logged):
        pieces += [heading("Training"), training_charts(runs)]
    write_page(page, " and ".join(names.values()) if len(names) == 2 else f"{len(names)} runs", pieces)


def _of_interest(logged: dict[str, Logged]) -> list[str]:
    return [name for name in CHARTS if any(name in values for values in logged.values())]


def _numbers(metrics: dict[str, dict[str, float]], logged: dict[str, Logged]) -> list[Html]:
    pieces = []
    if metrics:
        pieces += [heading("Metrics"), means_table(metrics)]
    if shown := _of_interest(logged):
        rows = [[CHARTS[name], *(_shown(values.get(name)) for values in logged.values())] for name in shown]
        pieces += [heading("Last logged by the training"), table(["value (step)", *logged], rows)]
    if any("time/goodput" in values for values in logged.values()):
        pieces += [heading("Where the time went"), *_times(logged)]
    if not pieces:
        pieces = [paragraph("No metrics: scripts/evaluate.py --videos FOLDER --out FOLDER/evaluation measures them.")]
    return pieces


def _times(logged: dict[str, Logged]) -> list[Html]:
    """Return a sentence a run, which says what its wall time was spent on, restarts included."""
    told = {run: {name: value for name, (_, value) in values.items()} for run, values in logged.items()}
    return [paragraph(f"{run}: {in_words(values)}.") for run, values in told.items() if "time/goodput" in values]


def _side_by_side(videos: dict[str, list[Shown]], page: Path) -> list[Html]:
    rows = sorted(matched(videos), key=lambda row: -len(row.videos))  # stable: those that all have come first
    shown = rows[: max(1, min(MOST_ROWS, MOST_VIDEOS // len(videos)))]
    cells = [
        (
            row.text if row.seed is None else f"{row.text} (seed {row.seed})",
            [row.videos[name].file if name in row.videos else None for name in videos],
        )
        for row in shown
    ]
    common = sum(len(row.videos) == len(videos) for row in rows)
    counted = f"{common} of {len(rows)} prompts and seeds are in every column; {len(shown)} of them are shown."
    if not common:
        counted = f"No prompt and seed is in every column; {len(shown)} of {len(rows)} are shown."
    return [paragraph(counted, soft=True), video_table(list(videos), cells, page=page)]


def _evaluated(results: Path) -> Source:
    """Return the sets that scripts/evaluate.py measured."""
    kind = dict[str, dict]
    record, source = read_json(results), Source()
    for name, entry in record.items():
        parts = (entry.get("metrics"), entry.get("rows")) if isinstance(entry, dict) else (None, None)
        if not is_bearable(parts, tuple[dict[str, float | int | None], list[dict]]) or not is_bearable(record, kind):
            raise UserError(f"{results}: {name!r} is no set that scripts/evaluate.py measured; remove the file")
        means, rows = parts
        source.metrics[name] = {metric: value for metric, value in means.items() if value is not None}
        videos = source.videos[name] = []
        for row in rows:
            told = row.get("file"), row.get("caption")
            if not is_bearable(told, tuple[str, str]):
                raise UserError(f"{results}: a row of {name!r} has no file or caption; remove the file")
            # Those of its own folder are relative to it, others are as --videos was given.
            places = (results.parent / told[0], Path(told[0]))
            file = next((place for place in places if place.is_file()), None)
            if file:
                videos.append(with_record(Shown(file, file.stem, told[1])))
    return source


def _latest_samples(folder: Path) -> Path | None:
    steps = [step for step in (folder / "samples").glob("step_*") if step.is_dir() and any(step.glob("*.mp4"))]
    return max(steps, default=None)


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return folder -> as much of its path's end as tells it from the others."""
    whole = {folder.resolve(): folder for folder in folders}
    if len(whole) < len(folders):
        twice = next(folder for folder in folders if whole[folder.resolve()] is not folder)
        raise UserError(f"{twice}: is given twice; give each folder once")
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = {folder: "/".join(path.parts[-length:]) for path, folder in whole.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _shown(logged: tuple[int, float] | None) -> str:
    return f"{logged[1]:.4g} ({logged[0]})" if logged and math.isfinite(logged[1]) else ""

"""The ablation of the paper in the small world: runs its cells one after another and writes their report.

`workdir/cells/<cell>/` is the folder of a training run, with the videos that its student makes for the held-out
captions and, last of all, `result.json`. A cell that has one is not run again; one that was stopped resumes from its
checkpoint.
"""

import contextlib
import fnmatch
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from avd_jax import convert, methods
from avd_jax.convert.layouts import read_json
from avd_jax.convert.loading import open_interpolator_of
from avd_jax.data.atomic import one_at_a_time, write_text
from avd_jax.data.encode_sets import encode_prompts, encode_shapes_world
from avd_jax.data.encoding import text_encoder, video_encoder
from avd_jax.data.video import read_whole_video
from avd_jax.data.world_clips import training_prompts
from avd_jax.errors import UserError
from avd_jax.evaluation.style import style_features
from avd_jax.experiments.cells import FEW, STYLE, Cell, few_prompts, plan, validate
from avd_jax.experiments.held_out import drawn_videos, make_videos
from avd_jax.experiments.videos import CaptionedVideo, measure_videos
from avd_jax.fields import flatten
from avd_jax.generation.settings import Options, resolve
from avd_jax.generation.weights import open_parts
from avd_jax.paths import local_path
from avd_jax.training.trainer import train
from avd_jax.training.workdir import jsonable

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    Attributes:
      cell: which.
      videos: one a held-out caption.
      rows: metrics of each video.
      features: of its style, see `evaluation.style`.
      seconds: that one more video takes; NaN for drawn ones.
    """

    cell: Cell
    videos: list[CaptionedVideo]
    rows: list[dict[str, float]]
    features: list[list[float]]
    seconds: float


def run_ablation(
    config,
    workdir: Path,
    *,
    only: Sequence[str] = ("*",),
    run: bool = True,
    report: Callable[[object, Path, list[Result]], object],
) -> int:
    """Run the cells that have no result yet, and write the report after each.

    Args:
      config: see `cells.FIELDS`.
      workdir: the folder of the ablation.
      only: patterns of the names of cells to run; the report shows all that have a result.
      run: False only writes the report.
      report: called with the config, the workdir and the results so far.

    Returns:
      The exit status: 0, or that of a training which a signal stopped.

    Raises:
      UserError: for what the user can put right.
    """
    validate(config)
    weights = config.train.init_from
    workdir = local_path(workdir)  # its log grows
    planned = plan(config, workdir / "data", interpolator=open_interpolator_of(weights) is not None)
    chosen = [cell for cell in planned if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in only)]
    if not chosen:
        raise UserError(f"--cells {','.join(only)}: matches none of {', '.join(cell.name for cell in planned)}")
    fingerprints = open_parts(resolve(Options(weights=weights), note=lambda text: None)).fingerprints()
    settings = {cell.name: _settings(cell, config, fingerprints) for cell in planned}
    todo = [cell for cell in chosen if not _finished(workdir, cell, settings[cell.name])] if run else []
    if todo:
        with one_at_a_time(workdir / "data"):  # another command may run other cells
            _encode(config, workdir / "data")
    with _shared_programs():
        for number, cell in enumerate(todo, 1):
            print(f"[{number}/{len(todo)}] {cell.name}", flush=True)
            started = time.monotonic()
            status = _run_cell(cell, config, workdir, settings[cell.name])
            if status:
                return status
            print(f"[{number}/{len(todo)}] {cell.name}: {time.monotonic() - started:.0f} s", flush=True)
            jax.clear_caches()  # those in memory are of no use to the next cell
            with one_at_a_time(workdir):
                report(config, workdir, _results(workdir, planned, settings))
    results = _results(workdir, planned, settings)
    if not results:
        raise UserError(f"{workdir}: has no finished cell of this config yet; run some")
    if not todo:
        report(config, workdir, results)
    return 0


def folder_of(workdir: Path, cell: str) -> Path:
    """Return where a cell of that name lies."""
    return workdir / "cells" / cell


def _run_cell(cell: Cell, config, workdir: Path, settings: dict) -> int:
    folder = folder_of(workdir, cell.name)
    folder.mkdir(parents=True, exist_ok=True)
    if cell.train is not None:
        with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            status = train(methods.get(cell.train.method), cell.train, folder).status
        if status:
            return status
    count, world = config.evaluation.captions, config.world
    size = {"frames": world.frames, "height": world.height, "width": world.width, "fps": float(world.fps)}
    seconds = math.nan
    if cell.style:
        videos = drawn_videos(count, folder / "videos", **size, style=cell.style)
    else:
        student = str(folder_of(workdir, cell.student)) if cell.student else None
        if student and not (Path(student) / "checkpoints").is_dir():
            raise UserError(f"{student}: is not trained yet; run the cell {cell.student} before {cell.name}")
        options = Options(weights=config.train.init_from, checkpoint=student, **cell.sampling, **size)
        made = make_videos(options, count, folder / "videos", batch_size=config.evaluation.batch_size)
        videos, seconds = made.videos, made.seconds
    record = {
        "settings": settings,
        "seconds": None if math.isnan(seconds) else seconds,
        "captions": [video.caption for video in videos],
        "files": [video.file.name for video in videos],
        "features": [style_features(read_whole_video(video.file)[0]).tolist() for video in videos],
        "rows": measure_videos(videos),
    }
    write_text(folder / RESULT, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


def _settings(cell: Cell, config, fingerprints: dict[str, str]) -> dict:
    """Return all that decides a cell's result."""
    settings = {"weights": fingerprints, "sampling": dict(cell.sampling), "style": cell.style}
    settings |= {"captions": config.evaluation.captions, "world": flatten(config.world)}
    if cell.method == STYLE:
        settings["style.clips"] = config.style.clips
    if cell.method.startswith(FEW):
        settings["collapse.prompts"] = config.collapse.prompts
    if cell.train is not None:
        flat = flatten(cell.train).items()
        # What decides its numbers: settings that a run may not change, and how long it is; no paths.
        fields = methods.get(cell.train.method).fields
        decisive = {name for name, field in fields.items() if not field.changeable} - {"half_rate.interpolator"}
        settings["train"] = {name: value for name, value in flat if name in decisive | {"num_steps"}}
    return jsonable(settings)


def _finished(workdir: Path, cell: Cell, settings: dict) -> bool:
    path = folder_of(workdir, cell.name) / RESULT
    return path.is_file() and read_json(path).get("settings") == settings


def _results(workdir: Path, planned: Sequence[Cell], settings: dict[str, dict]) -> list[Result]:
    """Read the results that are there."""
    results = []
    for cell in planned:
        if not _finished(workdir, cell, settings[cell.name]):
            continue
        folder = folder_of(workdir, cell.name)
        record = read_json(folder / RESULT)
        videos = [
            CaptionedVideo(folder / "videos" / file, caption)
            for file, caption in zip(record["files"], record["captions"], strict=True)
        ]
        seconds = math.nan if record["seconds"] is None else record["seconds"]
        results.append(Result(cell, videos, record["rows"], record["features"], seconds))
    return results


@contextlib.contextmanager
def _shared_programs() -> Iterator[None]:
    """Keep compiled programs on disk while the cells run: those that differ in their seed only have the same ones."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


def _encode(config, data: Path) -> None:
    """Encode the sets that the cells share, if they are not there yet."""
    world, weights = config.world, config.train.init_from
    vae = video_encoder(convert.load_vae(weights))
    text = text_encoder(convert.load_umt5(weights), convert.load_tokenizer(weights))
    size = {"frames": world.frames, "fps": world.fps, "height": world.height, "width": world.width}
    for style, clips, prompts in (("painted", world.clips, world.prompts), ("outline", config.style.clips, 0)):
        if clips:
            counts = {"clips": clips, "prompts": prompts}
            encode_shapes_world(data / style, vae=vae, text=text, **counts, **size, style=style)
    if config.collapse.prompts:
        captions = training_prompts(config.collapse.prompts, clips=world.clips)
        encode_prompts(captions, few_prompts(config, data), text=text)

"""Videos for captions of the built-in world that no training sees: drawn ones, and those that a model makes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avd_jax.convert.layouts import student_settings
from avd_jax.data import shapes_world
from avd_jax.data.video import write_video
from avd_jax.data.world_clips import FIRST_HELD_OUT_CLIP
from avd_jax.errors import UserError
from avd_jax.experiments.videos import CaptionedVideo
from avd_jax.generation.run import generate, make_plan
from avd_jax.generation.settings import Job, Options, resolve
from avd_jax.parallel.mesh import make_mesh


@dataclass(frozen=True)
class Made:
    """What a model made: its videos in the order of the captions, and the seconds that one more of them takes.

    The clock runs from the end of the first batch, which waits for the compiler, to the end of the last but one. During
    the last nothing else is under way. NaN with fewer than three batches. Decoding and writing the file count.
    """

    videos: list[CaptionedVideo]
    seconds: float


def captions(count: int) -> list[str]:
    """Return the first held-out captions."""
    return [shapes_world.caption(FIRST_HELD_OUT_CLIP + i) for i in range(count)]


def drawn_videos(
    count: int, folder: Path, *, frames: int, height: int, width: int, fps: float, style: str = "painted"
) -> list[CaptionedVideo]:
    """Write what the first held-out captions describe as video files, if they are not there yet."""
    videos = []
    for i in range(count):
        file = folder / f"{style}_{i:04d}_{frames}x{height}x{width}.mp4"
        if not file.is_file():
            clip, _ = shapes_world.clip(FIRST_HELD_OUT_CLIP + i, frames=frames, height=height, width=width, style=style)
            write_video(file, clip, fps=fps)
        videos.append(CaptionedVideo(file, shapes_world.caption(FIRST_HELD_OUT_CLIP + i)))
    return videos


def ways_of_a_student(options: Options, steps: Sequence[int | None]) -> dict[str, Options]:
    """Return how a student makes videos, by name: at the full rate and, if it has half-rate steps, with them.

    Args:
      options: of the student.
      steps: how many it is to make, each in turn; None: as many as it was trained for.

    Raises:
      UserError: other steps than those it makes.
    """
    sets = {}
    if steps != [None] and not (student_settings(options.checkpoint) or {}).get("fewer_steps"):
        raise UserError("--student_steps: this student makes all steps that it was trained for; leave it out")
    for number in steps:
        one = replace(options, steps=number)
        settings = resolve(one)
        sets[f"student, {settings.steps} steps"] = replace(one, half_rate_steps=0)
        if half := settings.half_rate_steps:
            sets[f"student, {settings.steps} steps, {half} of them at half the frame rate"] = one
    return sets


def make_videos(
    options: Options,
    count: int,
    folder: Path,
    *,
    batch_size: int,
    on_progress: Callable[[int], object] = lambda done: None,
) -> Made:
    """Let a model make a video for each of the first held-out captions; those that are there are not made again.

    Caption number i is sampled with seed i, whatever the model: teacher and student start from the same noise.

    Raises:
      UserError: as for `make_plan` and `generate`.
    """
    settings = resolve(options, note=lambda text: None)
    jobs = [Job(caption, i) for i, caption in enumerate(captions(count))]
    plan = make_plan(settings, jobs, folder)
    ends: list[float] = []

    def progress(done: int) -> None:
        ends.append(time.monotonic())
        on_progress(done)

    on_progress(count - len(plan.todo))
    generate(plan, mesh=make_mesh(), batch_size=batch_size, command="", on_progress=progress)
    between = ((len(ends) - 1) // batch_size - 1) * batch_size
    seconds = (ends[batch_size + between - 1] - ends[batch_size - 1]) / between if between > 0 else math.nan
    return Made([CaptionedVideo(plan.videos[job], job.prompt) for job in jobs], seconds)

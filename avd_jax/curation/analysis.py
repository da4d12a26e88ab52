"""Everything that is measured of a video, in one pass over its frames and in bounded memory.

No framework is imported here: it runs in worker processes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2

from avd_jax.curation.clips import ClipCutter
from avd_jax.curation.cuts import CutFinder
from avd_jax.curation.measures import ClipMeasures, Tools
from avd_jax.curation.motion import EXPORT
from avd_jax.curation.pictures import Picture
from avd_jax.data.picture import display_matrix, is_on_its_side
from avd_jax.data.video_file import VideoFile, opened
from avd_jax.errors import UserError

CUT_OFF = 0.5  # seconds that a video may be shorter than its file says, or a fiftieth of it

# What each means is in settings.ANALYSIS_HELP, which --explain prints.
DEFAULTS = {
    "frames": 81,
    "fps": 16.0,
    "clips_per_scene": 0,
    "cuts": {
        "short_side": 36,
        "adaptive_threshold": 3.0,
        "min_content_val": 4.0,
        "window_width": 2,
        "min_scene_frames": 1,
        "quiet_chroma": 4,
        "trim_seconds": 0.0,
        "gradual": {
            "short_spans": (4, 6, 9, 13, 18),
            "step": 0.1,
            "long_spans": (4, 6, 9, 13, 19, 28, 42),
            "moving_spans": (4, 6, 10, 16, 24),
            "residual": 0.17,
            "sum": 1.05,
            "resemblance": 0.55,
            "around": 0.7,
            "moving_residual": 0.35,
            "moving_around": 1.0,
            "uneven": 0.25,
            "contrast": 9.0,
            "change": 6.0,
            "spread": 0.7,
            "plain": 2.0,
            "faded": 0.1,
        },
    },
    "looks": {"at": (1, 21, 41, 61), "of": 81, "light": 2.0},
    "colour": {"short_side": 24, "bins": 30, "base": 2.718281828459045, "floor": 3, "grey": 1.0},
    "sharpness": {"short_side": 240},
    "motion": {"short_side": 144, "still": 1.0, "preset": "ultrafast"},
    "codec_motion": True,
    "hash": {"pictures": 8},
}


def analyse(path: Path, settings: Mapping) -> dict:
    """Cut one video into clips and score them.

    Args:
      path: a video file.
      settings: as DEFAULTS.

    Returns:
      A dict that JSON can say: `error` (None, or one line: why the video cannot be used, and then nothing else counts),
      `video` (width and height as shown, fps, seconds, codec), `cuts` and `cuts_method`, `scenes` ([begin, end] in
      seconds), and `clips`: `start`, `end` (seconds), `frames`, `fps`, `too_short` (a scene without room for a clip;
      start and end are the scene's) and `scores`, by name: `value`, `method`, `size` and more.
    """
    cv2.setNumThreads(1)  # the runner has a process a core
    tools = Tools(settings)
    result = {"error": None, "video": None, "cuts": [], "scenes": [], "clips": []}
    result["cuts_method"] = CutFinder.method(settings["cuts"])
    try:
        # There is a process a core; and between its threads FFmpeg loses some motion vectors, others each time.
        with opened(path, EXPORT if settings["codec_motion"] else None, threads="NONE") as file:
            result |= _analysed(file, settings, tools)
    except UserError as error:
        result["error"] = str(error)
    except Exception as error:  # whatever a broken file provokes, the other videos go on
        result["error"] = " ".join(f"{path}: cannot be analysed ({type(error).__name__}: {error})".split())
    return result


def _analysed(file: VideoFile, settings: Mapping, tools: Tools) -> dict:
    pictures = _pictures(file)
    first = next(pictures, None)
    if first is None:
        raise UserError(f"{file.path}: has no frames.")
    frame = first.frame
    # In square pixels, but not turned yet.
    shape = (max(1, round(frame.width * file.pixel_aspect)), frame.height)
    rate = file.rate or settings["fps"]
    finder = CutFinder(settings["cuts"], shape, rate)
    cutter = ClipCutter(settings, lambda: ClipMeasures(tools, file, shape))
    for step in finder.steps(_chained(first, pictures)):
        cutter.add(step)
        last = step.picture.time
    for begin, end in finder.finish():
        cutter.end_before(begin, end)
    seconds = last + 1 / rate
    promised = file.promised()
    if promised and seconds < promised - max(CUT_OFF, 0.02 * promised):
        raise UserError(f"{file.path}: is cut off: {seconds:.2f} of {promised:.2f} s are there; get the file again.")
    cutter.finish(seconds)
    width, height = reversed(shape) if is_on_its_side(display_matrix(frame)) else shape
    video = {"width": width, "height": height, "fps": file.rate, "seconds": round(seconds, 6), "codec": file.codec}
    return {
        "video": video,
        "cuts": sorted(finder.cuts, key=lambda cut: cut["seconds"]),
        "scenes": cutter.scenes,
        "clips": cutter.rows(),
    }


def _pictures(file: VideoFile) -> Iterator[Picture]:
    for index, (time, frame) in enumerate(file.frames()):
        yield Picture(index, time, frame)


def _chained(first: Picture, rest: Iterator[Picture]) -> Iterator[Picture]:
    yield first
    yield from rest

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

DEFAULTS = {
    "frames": 81,  # of a clip, as the model takes them
    "fps": 16.0,  # frames per second of a clip; videos are resampled as when they are encoded
    "clips_per_scene": 0,  # most clips of one scene, evenly spread; 0: as many as fit back to back
    "cuts": {
        "short_side": 36,  # pixels of the pictures that are compared
        "adaptive_threshold": 3.0,  # a cut changes so many times as much as the frames around it; PySceneDetect's
        "min_content_val": 4.0,  # and at least so much, of 255; PySceneDetect's 15 misses half of the cuts in the dark
        "window_width": 2,  # frames on either side; PySceneDetect's
        "min_scene_frames": 1,  # PySceneDetect's 15 hides a second cut close behind the first
        "quiet_chroma": 4,  # levels of chroma below which a pixel counts as grey, whose hue is noise
        "trim_seconds": 0.0,  # left out on both sides of a cut
        "gradual": {
            "short_spans": (4, 6, 9, 13, 18),  # pictures from one side of a short transition to the other
            "step": 0.1,  # seconds between the pictures that are compared for a long one
            "long_spans": (4, 6, 9, 13, 19, 28, 42),  # such steps
            "moving_spans": (
                4,
                6,
                10,
                16,
                24,
            ),  # likewise, where the scenes may move
            "residual": 0.17,  # most that is no mixture, as a share of the difference between both sides
            "sum": 1.05,  # most that the two shares of a mixture are together
            "resemblance": 0.55,  # most correlation between both sides
            "around": 0.7,  # most that either side changes in itself, as a share of their difference
            "moving_residual": 0.35,  # the same two for spans in which the scenes move
            "moving_around": 1.0,
            "uneven": 0.25,  # of a fade: most by which its contrast is off an even course, as a share of the change
            "contrast": 9.0,  # levels that one side has at least
            "change": 6.0,  # levels by which most of the picture differs, from its mean
            "spread": 0.7,  # and so much of the mean difference, which a single thing that moves makes larger
            "plain": 2.0,  # levels of contrast below which a picture shows nothing: the end of a fade
            "faded": 0.1,  # or so much of the contrast of the other side: a title on black, say
        },
    },
    "looks": {
        # Counted from 0: of 81 frames these are every 20th, and the next, 81, is none. Scaled for other lengths.
        "at": (1, 21, 41, 61),
        "of": 81,
        "light": 2.0,  # dark pictures are made brighter, by so much at most
    },
    "colour": {
        "short_side": 24,  # pixels; so small, the noise of grey pixels averages out
        "bins": 30,  # of hue
        "base": 2.718281828459045,  # of the logarithm
        "floor": 3,  # levels of chroma (max - min of R'G'B') that count as grey
        "grey": 1.0,  # mean chroma above the floor that makes a picture half colourful
    },
    "sharpness": {"short_side": 240},  # pixels
    "motion": {
        "short_side": 144,  # pixels at which flow is computed; it is told in pixels at 720
        "still": 1.0,  # levels; where a picture changes by less, it is noise and counts as unmoved
        "preset": "ultrafast",  # of OpenCV's DIS flow: ultrafast, fast or medium
    },
    "codec_motion": True,
    "hash": {"pictures": 8},  # evenly spread over the clip, the first and the last among them
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

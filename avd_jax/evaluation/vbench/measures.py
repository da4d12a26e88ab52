"""The dimensions of VBench that are computed here, with the official definition; networks come in as callables.

| dimension | after | what |
| --- | --- | --- |
| temporal_flickering | `temporal_flickering.py` | (255 - mean difference of neighbouring frames) / 255, if static |
| subject_consistency | `subject_consistency.py` | consistency of DINO's features (`models/vit_features.py`) |
| background_consistency | `background_consistency.py` | the same of CLIP's |
| aesthetic_quality | `aesthetic_quality.py` | a tenth of the linear head's score, mean over frames |
| dynamic_degree | `dynamic_degree.py` | whether enough pairs of frames, 8 a second, move |
| the static filter | `static_filter.py` | whether hardly any pair of frames moves, nor the last frame from the first |

A pair's motion is the mean length of its longest flow vectors, and it moves from a share of the shorter side on.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avd_jax.data.video_file import opened
from avd_jax.errors import UserError
from avd_jax.models.vit_features import consistencies, linear_scores

FlowOf = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two uint8 frames [H W 3] -> flow [h w 2] in pixels
FeaturesOf = Callable[[np.ndarray], np.ndarray]  # uint8 frames [F H W 3] -> features [F D]
Row = dict[str, object]  # of a video in an official result file, but for its path

STATIC_VIDEOS = 5  # of a prompt, which the static filter keeps
_DYNAMIC_TOP, _DYNAMIC_LENGTH, _DYNAMIC_PAIRS = 0.05, 6 / 256, 4 / 16
_STATIC_TOP, _STATIC_LENGTH, _STATIC_PAIRS = 0.02, 3 / 256, 2 / 16
_DYNAMIC_FPS = 8


class TooSmallError(UserError):
    """Frames are too small for a network."""


@dataclass(frozen=True)
class Clip:
    """A video as the official tool sees it: uint8 frames [F H W 3], at so many frames a second."""

    frames: np.ndarray
    fps: float


def read_clip(path: Path) -> Clip:
    """Read a whole video with FFmpeg's own conversion to RGB, which is that of OpenCV and decord.

    Raises:
      UserError: it cannot be read, its frames change their size, or it has only one.
    """
    with opened(path) as file:
        frames = [frame.to_ndarray(format="rgb24") for _, frame in file.frames()]
        rate = file.rate
    if len({frame.shape for frame in frames}) > 1 or not rate:
        raise UserError(f"{path}: its frames change their size, or it does not state their rate; rewrite it as mp4.")
    if len(frames) < 2:
        raise UserError(
            f"{path}: has {len(frames)} frame, of which no dimension can be measured; it needs two at least"
        )
    return Clip(np.stack(frames), rate)


def flickering(clip: Clip) -> Row:
    """Return the row of temporal_flickering; on videos that are not static it is another figure."""
    pairs = itertools.pairwise(clip.frames)
    differences = [np.mean(np.abs(one.astype(np.int16) - other), dtype=np.float64) for one, other in pairs]
    return {"video_results": float((255 - np.mean(differences)) / 255)}


def consistency(clip: Clip, features: FeaturesOf) -> Row:
    """Return the row of subject_consistency (with DINO's features) or background_consistency (with CLIP's)."""
    found = consistencies(features(clip.frames))
    return {
        "video_results": float(found.mean()),
        "video_sim": float(found.sum()),
        "cnt_per_video": len(found),
    }


def aesthetic_quality(clip: Clip, features: FeaturesOf, *, weight: np.ndarray, bias: float) -> Row:
    """Return the row of aesthetic_quality, for CLIP ViT-L/14's features and the linear head's weight [D] and bias."""
    return {"video_results": float(np.mean(linear_scores(features(clip.frames), weight=weight, bias=bias)) / 10)}


def dynamic_degree(clip: Clip, flow: FlowOf) -> Row:
    """Return the row of dynamic_degree."""
    frames = clip.frames[:: max(1, round(clip.fps / _DYNAMIC_FPS))]
    threshold = _DYNAMIC_LENGTH * min(frames.shape[1:3])
    needed = round(_DYNAMIC_PAIRS * len(frames))
    if len(frames) < 2 or not needed:  # a pair is looked at before they are counted, and of two frames none must move
        return {"video_results": len(frames) > 1}
    return {"video_results": _at_least(needed, frames, flow, _DYNAMIC_TOP, threshold)}


def is_static(clip: Clip, flow: FlowOf) -> bool:
    """Return whether the static filter keeps a video for temporal_flickering."""
    frames = clip.frames
    threshold = _STATIC_LENGTH * min(frames.shape[1:3])
    allowed = round(_STATIC_PAIRS * len(frames))
    ends = ((frames[0], frames[-1]), (frames[-1], frames[0]))
    if any(longest(flow(*pair), _STATIC_TOP) > threshold * allowed * 2 for pair in ends):
        return False
    return not _at_least(allowed + 1, frames, flow, _STATIC_TOP, threshold)


def _at_least(count: int, frames: np.ndarray, flow: FlowOf, share: float, threshold: float) -> bool:
    """Return whether so many neighbouring pairs move; no further pair is looked at once there are enough."""
    moving = (None for pair in itertools.pairwise(frames) if longest(flow(*pair), share) > threshold)
    return len(list(itertools.islice(moving, count))) == count


def longest(flow: np.ndarray, share: float) -> float:
    """Return the mean length of the longest vectors of a flow [h w 2], of which there are so large a share."""
    lengths = np.sqrt(np.sum(np.square(flow, dtype=np.float32), axis=-1)).ravel()
    count = int(lengths.size * share)
    return float(np.mean(np.partition(lengths, -count)[-count:]))


def score(rows: Iterable[Mapping[str, object]]) -> float:
    """Return a dimension's score from its rows: the mean over videos, of consistencies that over all their frames."""
    rows = list(rows)
    if all("cnt_per_video" in row for row in rows):
        return sum(row["video_sim"] for row in rows) / sum(row["cnt_per_video"] for row in rows)
    return float(np.mean([row["video_results"] for row in rows]))

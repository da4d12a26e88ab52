"""How much a video moves and flickers. Videos are [F H W 3] in [-1, 1]."""

import itertools

import cv2
import numpy as np

from avd_jax.errors import UserError

FLOW_THRESHOLD = 6.0 / 256  # VBench's, of the picture's shorter side between two frames
FLOW_TOP = 0.05  # share of the pixels, those that move most, whose mean flow counts
FLOW_FPS = 8.0  # frames a second at which VBench looks
MOVING_FRAMES = 4 / 16  # share of the frames that must move


def temporal_variance(array: np.ndarray) -> float:
    """Return the variance along frames, mean over everything else (the argument of the paper's Eq. 8).

    Args:
      array: [F H W C], a video or latents.
    """
    return float(np.mean(np.var(array, axis=0)))


def flicker(video: np.ndarray) -> float:
    """Return VBench's temporal flickering, 1 - mean |x[f+1] - x[f]| of pixels in 0..1: 1 is a still picture."""
    _need_two_frames(video)
    return float(1 - np.mean(np.abs(np.diff(video, axis=0))) / 2)


def flow_dynamic_degree(video: np.ndarray, fps: float) -> float:
    """Return 1 if VBench's rule calls the video dynamic, else 0, with OpenCV's Farneback flow in RAFT's place.

    At about 8 frames a second, the mean flow of the 5 % of the pixels that move most must be above 6/256 of the shorter
    side in a quarter of the pairs of frames. The flow is smoother than RAFT's: small fast objects count for less.
    """
    _need_two_frames(video)
    step = max(1, min(round(fps / FLOW_FPS), len(video) - 1))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in to_uint8(video)[::step]]
    threshold = FLOW_THRESHOLD * min(video.shape[1:3])
    moving = [_top_flow(*pair) > threshold for pair in itertools.pairwise(grey)]
    return float(np.mean(moving) >= MOVING_FRAMES)


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Return the video's pixels as 0..255, rounded."""
    return np.clip(np.round((video + 1) * 127.5), 0, 255).astype(np.uint8)


def _top_flow(before: np.ndarray, after: np.ndarray) -> float:
    flow = cv2.calcOpticalFlowFarneback(
        before, after, None, pyr_scale=0.5, levels=3, winsize=9, iterations=3, poly_n=5, poly_sigma=1.1, flags=0
    )
    lengths = np.sort(np.hypot(flow[..., 0], flow[..., 1]), axis=None)
    return float(lengths[-max(1, round(FLOW_TOP * lengths.size)) :].mean())


def _need_two_frames(video: np.ndarray) -> None:
    if len(video) < 2:
        raise UserError(f"a video of {len(video)} frame has no motion to measure; give at least 2")

"""How much a clip moves: optical flow between its frames, and the motion that the codec itself has found."""

from collections.abc import Mapping

import av
import cv2
import numpy as np

from avd_jax.data.picture import side_data

EXPORT = {"flags2": "+export_mvs"}  # option of FFmpeg's decoders: motion vectors come along as side data
UNIT = 720  # motion is told in pixels of a picture whose shorter side has so many: the paper's smallest videos
# Of every 7 frames, 0 and 1 are measured against the one before, which is enough for a mean. Resampling makes steps of
# unequal length in turns (1 and 2 frames from 24 to 16 a second), of which a cycle of 7 meets all.
CYCLE, MEASURED, COMPARED = 7, (0, 1), (6, 0)
AROUND = (5, 5)  # pixels over which changes of luma are averaged
PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


class Flow:
    """Mean length of the optical flow between two pictures (Kroeger et al. 2016, dense inverse search)."""

    def __init__(self, settings: Mapping):
        self._still = settings["still"]
        self.method = (
            f"mean length of OpenCV's DIS flow ({settings['preset']}) between consecutive frames of the clip "
            f"({len(MEASURED)} of {CYCLE} pairs) at a shorter side of {settings['short_side']} pixels, 0 where "
            f"the luma around changes by less than {self._still} of 255, in pixels at a shorter side of {UNIT}"
        )
        self._flow = cv2.DISOpticalFlow_create(PRESETS[settings["preset"]])

    def between(self, before: np.ndarray, after: np.ndarray) -> float:
        """Return the mean flow between two pictures uint8 [height width], in pixels at a shorter side of 720."""
        flow = self._flow.calc(before, after, None)
        change = cv2.boxFilter(cv2.absdiff(before, after), cv2.CV_32F, AROUND)
        # In noise, flow finds motion; what moves changes the picture by more.
        moving = cv2.compare(change, self._still, cv2.CMP_GE)
        mean = cv2.mean(cv2.magnitude(flow[..., 0], flow[..., 1]), moving)[0]
        # OpenCV adds up in an order that depends on where in memory a picture lies; what is kept must not.
        return round(mean * cv2.countNonZero(moving) / before.size * UNIT / min(before.shape), 6)


CODEC_METHOD = (
    "mean length of the codec's motion vectors, each for the area of its block, to the picture it refers to, "
    f"over those of {len(MEASURED)} in {CYCLE} frames of the clip that have any, in pixels at a shorter side of {UNIT}"
)


def codec_motion(frame: av.VideoFrame) -> float | None:
    """Return the mean motion of a picture's blocks in pixels at a shorter side of 720; None if the codec tells none."""
    try:
        found = side_data(frame, "MOTION_VECTORS")
    except ValueError:  # a kind of side data that PyAV does not know hides the others
        found = None
    if found is None:
        return None
    vectors = found.to_ndarray()
    across = vectors["dst_x"].astype(np.float32) - vectors["src_x"]
    down = vectors["dst_y"].astype(np.float32) - vectors["src_y"]
    area = vectors["w"].astype(np.float32) * vectors["h"]
    total = float(area.sum())
    if not total:
        return None
    return float(np.hypot(across, down) @ area) / total * UNIT / min(frame.width, frame.height)

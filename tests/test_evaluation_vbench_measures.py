"""VBench's dimensions by their formulas: known answers, with flows and features that are made up."""

import cv2
import numpy as np
import pytest
from vbench_cases import write_noise

from avd_jax.data.video import write_video
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench import measures
from avd_jax.evaluation.vbench.measures import Clip


def still(frames, fps=8.0, size=(256, 300)):
    """Frames that are told apart by the value of their pixels, which is their number."""
    return Clip(np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, *size, 3), np.uint8), fps)


def flow_with(length, share=1.0, size=(256, 304)):
    flow = np.zeros((size[0] * size[1], 2), np.float32)
    flow[: int(len(flow) * share)] = (0.6 * length, -0.8 * length)
    return flow.reshape(*size, 2)


class Flow:
    """Flows by the numbers of the two frames; it remembers which pairs were asked for."""

    def __init__(self, **lengths):
        self.lengths, self.asked = lengths, []

    def __call__(self, first, second):
        pair = (int(first[0, 0, 0]), int(second[0, 0, 0]))
        self.asked.append(pair)
        return flow_with(self.lengths.get("_".join(map(str, ("f", *pair))), self.lengths.get("other", 0.0)))


def test_frames_are_those_of_opencv(tmp_path):
    write_noise(tmp_path / "a.mp4", 0, frames=5, fps=12.0)
    clip = measures.read_clip(tmp_path / "a.mp4")
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    theirs = [frame[..., ::-1] for ok, frame in iter(capture.read, (False, None)) if ok]
    np.testing.assert_array_equal(clip.frames, theirs)
    assert clip.fps == capture.get(cv2.CAP_PROP_FPS) == 12.0


def test_one_frame_is_no_video(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((1, 32, 32, 3)), fps=8)
    with pytest.raises(UserError, match=r"a\.mp4: has 1 frame"):
        measures.read_clip(tmp_path / "a.mp4")


def test_flickering():
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1], frames[2, :2] = 255, 255  # a change of 255 everywhere, then in half of the picture
    assert measures.flickering(Clip(frames, 8)) == {"video_results": pytest.approx(1 - 0.75)}


def test_consistency_and_aesthetics():
    features = np.array([[3, 0], [0, 2], [1, 1]])
    row = measures.consistency(still(3), lambda frames: features[frames[:, 0, 0, 0]])
    assert row == {
        "video_results": pytest.approx(np.sqrt(0.5) / 2),
        "video_sim": pytest.approx(np.sqrt(0.5)),
        "cnt_per_video": 2,
    }
    quality = measures.aesthetic_quality(still(3), lambda frames: features, weight=np.array([5.0, 0]), bias=1.0)
    assert quality["video_results"] == pytest.approx((6 + 1 + 1 + 5 * np.sqrt(0.5)) / 3 / 10)


def test_of_a_consistency_all_frames_count_alike():
    rows = [{"video_results": 1.0, "video_sim": 1.0, "cnt_per_video": 1}]
    rows += [{"video_results": 0.5, "video_sim": 1.5, "cnt_per_video": 3}]
    assert measures.score(rows) == 2.5 / 4
    assert measures.score([{"video_results": True}, {"video_results": False}]) == 0.5


def test_the_longest_vectors():
    assert measures.longest(flow_with(10.0, share=0.05), 0.05) == pytest.approx(10, rel=1e-3)
    assert measures.longest(flow_with(10.0, share=0.02), 0.05) == pytest.approx(4, rel=1e-3)


def test_a_video_moves_if_enough_pairs_do():
    """Of 8 frames 2 pairs, above 6/256 of the shorter side; no pair is looked at that changes nothing."""
    flow = Flow(f_1_2=6.01, f_4_5=6.01, f_6_7=50.0)
    assert measures.dynamic_degree(still(8), flow) == {"video_results": True}
    assert flow.asked == [(i, i + 1) for i in range(5)]
    assert measures.dynamic_degree(still(8), Flow(f_1_2=50.0, f_4_5=5.99)) == {"video_results": False}
    assert measures.dynamic_degree(still(2), Flow()) == {"video_results": True}, "round(2/4) is 0"


@pytest.mark.parametrize(("fps", "step"), [(8, 1), (11.9, 1), (12, 2), (16, 2), (20, 2), (24, 3), (4, 1)])
def test_motion_is_looked_at_8_times_a_second(fps, step):
    flow = Flow()
    measures.dynamic_degree(still(24, fps), flow)
    assert flow.asked[:3] == [(0, step), (step, 2 * step), (2 * step, 3 * step)]


def test_the_static_filter():
    """Of 16 frames 2 pairs may be above 3/256; the ends may differ by 4 times that."""
    assert measures.is_static(still(16), Flow(f_1_2=50.0, f_8_9=50.0))
    assert not measures.is_static(still(16), Flow(f_1_2=3.01, f_8_9=3.01, f_14_15=3.01))
    assert measures.is_static(still(16), Flow(f_1_2=3.01, f_8_9=3.01, f_14_15=2.99))
    assert measures.is_static(still(16), Flow(f_0_15=11.9, f_15_0=11.9))
    for ends in ("f_0_15", "f_15_0"):
        assert not measures.is_static(still(16), Flow(**{ends: 12.1}))

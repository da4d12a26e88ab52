"""What is seen of a frame: HDR, wide gamuts, untagged video, orientations, transparency."""

import av
import numpy as np
import pytest
from video_cases import BLUE, GREEN, RED, WHITE, Track, corners, write

from avd_jax.data import picture
from avd_jax.data.picture import display_matrix, upright
from avd_jax.data.video import frame_rate_and_size, read_video, read_whole_video
from avd_jax.errors import UserError

# BT.709's light in BT.2020's channels (BT.2087-0, M2).
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def codes(path, *, frames=1, height=96, width=96, fps=25, **kwargs):
    """Read a video as code values 0..255."""
    return (read_video(path, frames=frames, fps=fps, height=height, width=width, **kwargs) + 1) * 127.5


def pq(light):
    """Signal of light in cd/m2, by the formula of SMPTE ST 2084."""
    power = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light):
    """Signal of light in cd/m2 on a display of 1000, by BT.2100: without OOTF's luminance, so for greys only."""
    scene = (light / 1000) ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12,
        np.sqrt(3 * scene),
        0.17883277 * np.log(np.maximum(12 * scene, 1) - 0.28466892 + 1e-9) + 0.55991073,
    )


def light_chart(frames, size=96):
    """Return cd/m2 [F H W 3] in BT.709: green of 100, grey of 203, grey of 100, black; the centre of frame i 2i."""
    light = np.zeros((frames, size, size, 3))
    light[:, :32, :32, 1] = 100 / 0.7152
    light[:, :32, -32:] = 203
    light[:, -32:, :32] = 100
    light[:, 32:64, 32:64] = 2 * np.arange(frames)[:, None, None, None]
    return light


@pytest.mark.parametrize(
    ("signal", "transfer", "size"), [(pq, 16, 96), (pq, 16, 16), (hlg, 18, 96)], ids=["PQ", "PQ, shrunk", "HLG"]
)
def test_hdr_is_mapped_to_what_sdr_shows(tmp_path, signal, transfer, size):
    light = light_chart(20) @ TO_BT2020.T if signal is pq else light_chart(20)
    images = np.rint(65_535 * signal(light)).astype(np.uint16)
    track = Track(images, "libx264", "yuv420p10le", matrix=9, transfer=transfer, crf="4")
    video = codes(write(tmp_path / "hdr.mkv", track), frames=20, height=size, width=size)
    near, far, middle = size // 8, -size // 8, size // 2
    green, white, grey, black = video[0, [near, near, far, far], [near, far, near, far]]
    if signal is pq:
        assert max(green[0], green[2]) < green[1] / 2
        assert green[1] > 150
    assert (white >= 170).all()
    assert (white <= 250).all(), "there is room for what is brighter"
    assert (grey >= 150).all()
    assert (grey < white - 20).all()
    assert (black < 14).all()
    assert (np.diff(video[:, middle, middle, 1]) > 0).all()
    assert np.ptp(video[-1, middle, middle]) < 4


def test_bt2020_without_hdr(tmp_path):
    light = np.zeros((1, 96, 96, 3))
    light[:, :48] = (0.8, 0.1, 0.1)
    light[:, 48:] = 0.3
    images = np.rint(65_535 * (light @ TO_BT2020.T) ** (1 / 2.4)).astype(np.uint16)
    track = Track(images, "libx264", "yuv420p10le", matrix=9, transfer=14, crf="4")
    video = codes(write(tmp_path / "wide.mkv", track))
    np.testing.assert_allclose(video[0, 12, 48], 255 * np.array([0.8, 0.1, 0.1]) ** (1 / 2.4), atol=4)
    np.testing.assert_allclose(video[0, 84, 48], 255 * 0.3 ** (1 / 2.4), atol=4)


@pytest.mark.parametrize(
    ("height", "width", "matrix"), [(720, 1280, 1), (1280, 720, 1), (640, 480, 1), (576, 720, 5), (480, 854, 5)]
)
def test_untagged_video_is_bt709_if_it_is_hd(tmp_path, height, width, matrix):
    """Players guess so, too: the colour comes out right if the guess is the matrix that it was coded with."""
    image = np.zeros((2, height, width, 3), np.uint8)
    image[...] = (200, 60, 30)
    track = Track(image, matrix=matrix, preset="ultrafast", crf="10")
    track.add_to = untagged(track.add_to)
    path = write(tmp_path / "v.mp4", track)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.colorspace == 2
    np.testing.assert_allclose(codes(path)[0, 48, 48], (200, 60, 30), atol=4)


def untagged(add_to):
    def add(container):
        stream = add_to(container)
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 2
        return stream

    return add


ONE = 1 << 16
# (a, b, c, d) of each orientation, and which of red, green, blue, white comes where, in reading order.
ORIENTATIONS = {
    (1, 0, 0, 1): (RED, GREEN, BLUE, WHITE),
    (-1, 0, 0, 1): (GREEN, RED, WHITE, BLUE),
    (1, 0, 0, -1): (BLUE, WHITE, RED, GREEN),
    (-1, 0, 0, -1): (WHITE, BLUE, GREEN, RED),
    (0, 1, -1, 0): (BLUE, RED, WHITE, GREEN),
    (0, -1, 1, 0): (GREEN, WHITE, RED, BLUE),
    (0, 1, 1, 0): (RED, BLUE, GREEN, WHITE),
    (0, -1, -1, 0): (WHITE, GREEN, BLUE, RED),
}


@pytest.mark.parametrize(("matrix", "expected"), ORIENTATIONS.items(), ids=map(str, ORIENTATIONS))
def test_eight_orientations(tmp_path, matrix, expected):
    a, b, c, d = matrix
    x, y = 96 * (min(a, 0) + min(c, 0)), 96 * (min(b, 0) + min(d, 0))
    display = [a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, -x * ONE, -y * ONE, 1 << 30]
    path = write(tmp_path / "v.mp4", Track(corners(2), display=display))
    with av.open(str(path)) as container:
        assert display_matrix(next(container.decode(video=0))) == matrix
    for image in (codes(path)[0], (read_whole_video(path)[0][0] + 1) * 127.5):
        np.testing.assert_allclose(image[[8, 8, 88, 88], [8, 88, 8, 88]], expected, atol=12)


def test_every_pixel_goes_where_the_matrix_says():
    image = np.arange(6).reshape(2, 3, 1)
    for a, b, c, d in ORIENTATIONS:
        shown = {}
        for y, x in np.ndindex(2, 3):
            shown[b * x + d * y, a * x + c * y] = image[y, x, 0]
        expected = [shown[place] for place in sorted(shown)]
        assert upright(image, (a, b, c, d)).ravel().tolist() == expected


def test_the_size_is_that_which_is_shown(tmp_path):
    images = corners(2)[:, :64]
    turned = write(tmp_path / "t.mp4", Track(images, display=[0, ONE, 0, -ONE, 0, 0, 64 * ONE, 0, 1 << 30]))
    assert frame_rate_and_size(turned) == (25, 96, 64)
    with pytest.raises(UserError, match=r"gone\.mp4: cannot be read"):
        frame_rate_and_size(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("v.mov", "qtrle", "argb"), ("v.mkv", "ffv1", "yuva420p"), ("v16.mov", "prores_ks", "yuva444p10le")],
)
def test_what_is_transparent_is_black(tmp_path, name, codec, pix_fmt):
    images = np.concatenate([corners(2), np.full((2, 96, 96, 1), 255, np.uint8)], -1)
    images[:, 32:64, 32:64] = (255, 0, 255, 0)
    images[:, 40:56, 40:56, 3] = 128
    path = write(tmp_path / name, Track(images, codec, pix_fmt))
    for image in (codes(path)[0], (read_whole_video(path)[0][0] + 1) * 127.5):
        np.testing.assert_allclose(image[[8, 8, 88, 88], [8, 88, 8, 88]], (RED, GREEN, BLUE, WHITE), atol=12)
        np.testing.assert_allclose(image[36, 36], 0, atol=12)
        np.testing.assert_allclose(image[48, 48], (128, 0, 128), atol=12)


def test_transparency_that_cannot_be_read(tmp_path):
    images = np.full((2, 96, 96, 4), 128, np.uint8)
    path = write(tmp_path / "v.webm", Track(images, "libvpx-vp9", "yuva420p", matrix=0))
    with pytest.raises(UserError, match=r"v\.webm: has transparency, .* background"):
        codes(path)


def test_unknown_colours_are_refused(tmp_path):
    path = write(tmp_path / "v.mkv", Track(corners(2)))
    with av.open(str(path)) as source, av.open(str(tmp_path / "ycgco.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.height = stream.width = 96
        stream.pix_fmt, stream.codec_context.colorspace = "yuv420p", 8
        for frame in source.decode(video=0):
            frame.colorspace = 8
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"ycgco\.mkv: its colours .*matrix 8 .*; convert it to BT\.709"):
        codes(tmp_path / "ycgco.mkv")


def test_dolby_vision_without_another_layer_is_refused(tmp_path, monkeypatch):
    track = Track(corners(2))
    track.add_to = untagged(track.add_to)
    path = write(tmp_path / "dv.mp4", track)
    monkeypatch.setattr(picture, "_has_dolby_vision", lambda frame: True)
    with pytest.raises(UserError, match=r"dv\.mp4: its colours .*Dolby Vision"):
        codes(path)

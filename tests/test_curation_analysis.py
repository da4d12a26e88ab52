"""The one pass over a video: what is wrong with a clip shows in its own score, and clips keep to their scenes."""

import json
import subprocess
import sys
from pathlib import Path

import av
import curation_cases as made
import cv2
import numpy as np
import pytest
import video_cases as cases

from avd_jax.curation.analysis import DEFAULTS, analyse
from avd_jax.curation.hashes import SIDE, distance, perceptual_hash
from avd_jax.curation.pictures import Picture, shrunk, small_size
from avd_jax.curation.transitions import GradualFinder
from avd_jax.data.picture import display_matrix
from avd_jax.data.video import read_video
from avd_jax.data.video_file import opened

PAPER = {"colour": 0.6, "sharpness": 20.0, "motion": 0.2}
SMALLEST = (256, 144)  # stands for 1280x720


def analysed(path, **settings):
    result = analyse(path, {**DEFAULTS, **made.SETTINGS, **settings})
    json.dumps(result, allow_nan=False)
    return result


def rejected_by(result):
    """Return for each clip the first of the paper's stages that rejects it, or None."""
    if result["error"]:
        return [result["error"]]
    small = result["video"]["width"] < SMALLEST[0] or result["video"]["height"] < SMALLEST[1]
    return [
        "length"
        if clip["too_short"]
        else "resolution"
        if small
        else next((name for name, least in PAPER.items() if clip["scores"][name]["value"] < least), None)
        for clip in result["clips"]
    ]


FAULTS = {
    "natural": (made.scene(0), None),
    "natural, another": (made.scene(1, speed=1), None),
    "dark": ((made.scene(2) * 0.4).astype(np.uint8), None),
    "letterbox": (np.pad(made.scene(3)[:, 20:-20], ((0, 0), (20, 20), (0, 0), (0, 0))), None),
    "solid": (np.full((made.LAST, *made.SIZE, 3), (255, 0, 0), np.uint8), "colour"),
    "black": (np.zeros((made.LAST, *made.SIZE, 3), np.uint8), "colour"),
    "grey": (made.grey(made.scene(4)), "colour"),
    "blurred": (made.blurred(made.scene(5)), "sharpness"),
    "blurred in a letterbox": (
        np.pad(made.blurred(made.scene(6))[:, 20:-20], ((0, 0), (20, 20), (0, 0), (0, 0))),
        "sharpness",
    ),
    "still": (made.scene(7)[:1].repeat(made.LAST, 0), "motion"),
    "cut": (np.concatenate([made.scene(8, 14), made.scene(9, 14)]), "length"),
    "too short": (made.scene(10, 20), "length"),
    "too small": (made.scene(11, size=(72, 128)), "resolution"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_rejected_by_its_own_stage(tmp_path, name):
    images, stage = FAULTS[name]
    assert set(rejected_by(analysed(made.write(tmp_path / "a.mp4", images)))) == {stage}


@pytest.mark.parametrize("colour", [0, 255])
def test_no_clip_shows_a_fade(tmp_path, colour):
    plain = np.full_like(made.scene(0, 80), colour)
    fading = made.mixed(made.scene(0, 80), plain, 20, 70), made.mixed(plain, made.scene(1, 80), 20, 10)
    images = np.concatenate(fading)
    result = analysed(made.write(tmp_path / "a.mp4", images))
    assert rejected_by(result).count(None) >= 3
    # From 60 to 100 of 25 a second; the last frame of a fade can hardly be told.
    assert all(clip["end"] <= 2.4 or clip["start"] >= 3.96 for clip in result["clips"] if not clip["too_short"])


@pytest.mark.parametrize("length", [10, 25, 40])
def test_no_clip_shows_a_dissolve(tmp_path, length):
    images = made.mixed(made.scene(2, 160, speed=1), made.scene(3, 160, speed=1), length, 80)
    result = analysed(made.write(tmp_path / "a.mp4", images))
    assert {"gradual"} == {cut["detector"] for cut in result["cuts"]}
    middle = [clip for clip in result["clips"] if clip["start"] < 3.2 < clip["end"]]
    assert middle == []
    assert rejected_by(result).count(None) >= 3


def test_a_dissolve_of_still_scenes_costs_no_more_than_itself(tmp_path):
    images = made.mixed(made.scene(2, 160, speed=0), made.scene(3, 160, speed=0), 25, 80)
    (cut,) = analysed(made.write(tmp_path / "a.mp4", images))["cuts"]
    assert cut["seconds"] == pytest.approx(2.7, abs=0.25)
    assert cut["until"] == pytest.approx(3.7, abs=0.25)


def gradual(images, rate=25):
    """Return the transitions of pictures [F H W], as (begin, end) in seconds."""
    finder = GradualFinder(DEFAULTS["cuts"]["gradual"])
    small = [cv2.resize(image, (64, 36), interpolation=cv2.INTER_AREA) for image in images.astype(np.uint8)]
    found = [one for number, image in enumerate(small) for one in finder.add(number / rate, image)]
    return found + finder.finish()


def test_a_fade_may_end_in_a_title():
    """Text on black is not quite plain."""
    picture, title = made.scene(0, 40, speed=0)[..., 1], np.zeros((40, *made.SIZE), np.uint8)
    title[:, 70:74, 90:166:2] = 220
    images = made.mixed(picture[..., None], title[..., None], 12, 20)[..., 0]
    assert gradual(images)
    assert gradual(images[27:]) == []


@pytest.mark.parametrize("rate", [24, 60])
@pytest.mark.parametrize("through", [None, 0, 255])
@pytest.mark.parametrize("length", [2, 3, 6, 12, 60])
def test_transitions_of_every_length_are_found(length, through, rate):
    count = 40 + length
    before, after = (made.scene(seed, count, (288, 512), 1)[:, ::4, ::4, 1].astype(np.float32) for seed in (0, 1))
    share = (np.arange(1, length + 1) / (length + 1))[:, None, None]
    if through is None:
        between = [(1 - share) * before[40:] + share * after[:length]]
    else:
        between = [(1 - share) * before[40:] + share * through, (1 - share) * through + share * after[:length]]
    images = np.concatenate([before[:40], *between, after[length:]])
    found, first, last = gradual(images, rate), 40 / rate, (len(images) - 41) / rate
    room = 0.35 * (last - first)
    assert first - 1.0 < min(begin for begin, _ in found) <= first + room
    assert last - room <= max(end for _, end in found) < last + 0.6


@pytest.mark.parametrize("rate", [24, 60])
def test_what_moves_is_no_transition(rate):
    """At any speed; nor is a wave, whose pictures are mixtures of each other, nor what walks in front."""
    for speed in (1, 3, 6):
        assert gradual(made.scene(0, 60, size=(72, 128), speed=speed)[..., 1], rate) == [], speed
    for step in (0.05, 0.2, 0.6):
        waves = 128 + 100 * np.sin(np.arange(128) / 15 + step * np.arange(60)[:, None])
        assert gradual(np.broadcast_to(waves[:, None], (60, 72, 128)), rate) == [], step
    walking, walker = made.scene(0, 55, (72, 128), 0)[..., 1].copy(), made.scene(1, 1, (72, 128))[0, :, :40, 1]
    for number, image in enumerate(walking[:44]):
        image[:, 2 * number : 2 * number + 40] = walker
    assert gradual(walking, rate) == []


def test_natural_scenes_are_not_cut(tmp_path):
    """Motion, a zoom, light that changes, a flat object that passes: none is a cut, a fade or a dissolve."""
    still = made.scene(0, 60, speed=0)
    light = still * (0.75 + 0.25 * np.sin(np.arange(60) / 5))[:, None, None, None]
    passing = still.copy()
    for number, image in enumerate(passing):
        image[30:110, max(0, 8 * number - 100) : 8 * number] = (240, 240, 230)
    waves = 128 + 100 * np.sin((np.arange(256) + 4 * np.arange(60)[:, None]) / 15)
    waves = np.broadcast_to(waves[:, None, :, None], (60, *made.SIZE, 3))
    for number, images in enumerate((made.scene(1, 60, speed=9), light, passing, waves)):
        result = analysed(made.write(tmp_path / f"{number}.mp4", images.astype(np.uint8)))
        assert result["cuts"] == [], number


@pytest.mark.parametrize("at", [1, 2, 30, 58, 59])
def test_a_cut_is_found_wherever_it_is(tmp_path, at):
    images = np.concatenate([made.scene(0, at), made.scene(1, 60 - at)])
    result = analysed(made.write(tmp_path / "a.mp4", images))
    assert [cut["seconds"] for cut in result["cuts"]] == [pytest.approx(at / 25)]
    assert result["scenes"] == [[0, pytest.approx(at / 25)], [pytest.approx(at / 25), pytest.approx(60 / 25)]]


@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_is_no_cut(tmp_path, length):
    images = made.scene(0, 60, speed=1)
    for at in (15, 40):
        images[at : at + length] = 255
    assert analysed(made.write(tmp_path / "a.mp4", images))["cuts"] == []
    images[41:] = made.scene(1, 19, speed=1)  # here another scene follows
    assert analysed(made.write(tmp_path / "b.mp4", images))["cuts"] != []


def numbered(frames, cut):
    """Two scenes; the levels of two squares tell the frame's number, as digits to the base 12."""
    images = np.zeros((frames, 48, 64, 3), np.uint8)
    images[:, :, 32:] = (200, 60, 60)
    images[cut:] = (60, 60, 200)
    images[cut:, :16] = (30, 150, 30)
    for square, digit in enumerate(np.divmod(np.arange(frames), 12)):
        images[:, 24 + 12 * square : 34 + 12 * square, 4:14] = (10 + 20 * digit.astype(np.uint8))[:, None, None, None]
    return images


def numbers_of(video):
    """Return the numbers of `numbered` frames, read as [F H W 3] in [-1, 1]."""
    levels = [(video[:, top + 3 : top + 7, 7:11].mean((1, 2, 3)) + 1) * 127.5 for top in (24, 36)]
    high, low = (np.rint((level - 10) / 20) for level in levels)
    return 12 * high + low


@pytest.mark.parametrize("rate", [12, 24, 25, 30, 60])
def test_what_is_read_later_is_what_was_scored(tmp_path, rate):
    frames = min(round(4.2 * rate), 143)
    cut = round(0.6 * frames)
    path = made.write(tmp_path / "a.mp4", numbered(frames, cut), rate=rate, crf=1, first=7)
    result = analysed(path, frames=9, fps=16.0)
    clips = [clip for clip in result["clips"] if not clip["too_short"]]
    assert {clip["start"] < cut / rate for clip in clips} == {True, False}
    for clip in clips:
        video = read_video(path, frames=9, fps=16.0, height=48, width=64, start=clip["start"])
        numbers = numbers_of(video)
        first, end = (0, cut) if clip["start"] < cut / rate else (cut, frames)
        assert numbers.min() >= first
        assert numbers.max() < end
        assert first / rate <= clip["start"] < clip["end"] <= end / rate
        # The frames scored are those read: the hash of the last one is of the same picture.
        with opened(path) as file:
            frame = next(frame for time, frame in file.frames() if round(time * rate) == numbers[-1])
        size = small_size(64, 48, DEFAULTS["motion"]["short_side"])
        grey = shrunk(Picture(0, 0.0, frame).grey(size), (SIDE, SIDE))
        assert perceptual_hash(grey) == clip["scores"]["hash"]["value"][-1]


def write_at(path, images, times):
    """Write pictures at times in 50ths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=50, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *made.SIZE, "yuv420p"
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_picture_that_is_held_until_a_cut_is_read_as_it_was_scored(tmp_path):
    """As in recordings of a screen, where nothing happens for a while."""
    images = np.concatenate([made.scene(0, 40), made.scene(1, 40)])
    path = write_at(tmp_path / "a.mkv", images, [number if number < 40 else number + 22 for number in range(80)])
    clip = analysed(path)["clips"][0]
    assert not clip["too_short"]
    size = {"frames": 17, "fps": 16.0, "height": 32, "width": 32}
    video = read_video(path, start=clip["start"], end=clip["end"], **size)
    assert (video[-2] == video[-1]).all()


def test_times_that_vary(tmp_path):
    """Twice as slow in its second half; the first time stamp is not 0."""
    times = [100 + (number if number < 25 else 2 * number - 25) for number in range(50)]
    path = write_at(tmp_path / "a.mkv", made.scene(0, 50), times)
    result = analysed(path)
    assert rejected_by(result) == [None]
    assert result["scenes"][0][0] == 0
    read_video(path, frames=17, fps=16.0, height=32, width=32, start=result["clips"][0]["start"])


def test_as_shown(tmp_path):
    turned = made.write(tmp_path / "a.mp4", made.scene(0), display=[0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])
    video = analysed(turned)["video"]
    assert (video["width"], video["height"]) == (144, 256)
    assert video["codec"] == "h264"
    assert video["seconds"] == pytest.approx(made.LAST / 25)
    straight = analysed(made.write(tmp_path / "b.mp4", made.scene(0)))
    for name in ("motion", "sharpness", "colour"):
        one, other = (result["clips"][0]["scores"][name]["value"] for result in (analysed(turned), straight))
        assert one == pytest.approx(other, rel=0.02)


def test_clips_of_a_scene(tmp_path):
    path = made.write(tmp_path / "a.mp4", made.scene(0, 140, size=(72, 128)))
    every = [clip["start"] for clip in analysed(path)["clips"]]
    assert every == [0.0, 1.063, 2.126, 3.189, 4.252]
    assert [clip["start"] for clip in analysed(path, clips_per_scene=3)["clips"]] == [0.0, 2.126, 4.252]
    trimmed = analysed(path, cuts={**DEFAULTS["cuts"], "trim_seconds": 0.5})
    assert [clip["start"] for clip in trimmed["clips"]] == every  # neither end of a video is a cut


def test_another_encoding_has_the_same_hash(tmp_path):
    def hashes(name, images, crf):
        return analysed(made.write(tmp_path / name, images, crf=crf))["clips"][0]["scores"]["hash"]["value"]

    one = hashes("a.mp4", made.scene(0), 18)
    assert len(one) == 8
    assert distance(one, hashes("b.mp4", made.scene(0), 34)) <= 24
    assert distance(one, hashes("c.mp4", made.scene(1), 18)) > 150


def test_codec_motion_is_absent_where_the_codec_tells_none(tmp_path):
    # Each picture refers to the one before; otherwise vectors span several.
    track = {"bf": "0", "refs": "1"}
    moving = analysed(made.write(tmp_path / "a.mp4", made.scene(0), **track))["clips"][0]["scores"]["codec_motion"]
    assert moving["value"] == pytest.approx(2 * 720 / 144, rel=0.2)  # 2 pixels a frame
    other = cases.write(tmp_path / "b.mkv", cases.Track(made.scene(0), codec="ffv1", pix_fmt="yuv444p"))
    assert "codec_motion" not in analysed(other)["clips"][0]["scores"]


@pytest.mark.parametrize("rate", [24, 25, 30])
def test_motion_is_in_pixels_at_720_lines(tmp_path, rate):
    """2 pixels of 144 a source frame; resampling to 16 a second makes steps of 1 and 2 of them."""
    images = made.scene(0, 60)
    result = analysed(made.write(tmp_path / "a.mp4", images, rate=rate), frames=29)
    assert result["clips"][0]["scores"]["motion"]["value"] == pytest.approx(2 * 720 / 144 * rate / 16, rel=0.1)


def test_a_broken_video_is_one_line(tmp_path):
    whole = made.write(tmp_path / "a.mp4", made.scene(0, 60)).read_bytes()
    for name, data in {
        "empty.mp4": b"",
        "text.mp4": b"no video" * 100,
        "half.mp4": whole[: len(whole) // 2],
        "holed.mp4": whole[: len(whole) // 2] + bytes(2000) + whole[len(whole) // 2 + 2000 :],
    }.items():
        (tmp_path / name).write_bytes(data)
        result = analysed(tmp_path / name)
        assert str(tmp_path / name) in result["error"], name
        assert "\n" not in result["error"]
        assert result["clips"] == []
    assert "missing.mp4" in analysed(tmp_path / "missing.mp4")["error"]


def test_a_matroska_file_that_was_cut_off_is_no_short_video(tmp_path):
    whole = made.write(tmp_path / "a.mkv", made.scene(0, 100, speed=1), g="25")
    assert analysed(whole)["error"] is None
    cut = tmp_path / "b.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "b.mkv: is cut off: " in analysed(cut)["error"]
    assert "of 4.00 s are there" in analysed(cut)["error"]


def test_no_frame_is_kept(tmp_path):
    """PyAV's `side_data` makes a frame hold itself, and each is megabytes."""
    path = made.write(tmp_path / "a.mp4", made.scene(0))
    with opened(path) as file:
        frame = next(frame for _, frame in file.frames())
    before = sys.getrefcount(frame)
    display_matrix(frame)
    assert sys.getrefcount(frame) == before


def test_it_imports_no_framework():
    code = "import sys, avd_jax.curation.analysis; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

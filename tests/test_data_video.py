"""Video files: round trips, resampling, cropping, and what is wrong with a file said in one line."""

import os
import subprocess
import sys
import threading

import av
import numpy as np
import pytest
from PIL import Image

from avd_jax.data import atomic
from avd_jax.data import video as video_io
from avd_jax.errors import UserError


def waves(frames=9, height=48, width=64):
    y, x = np.mgrid[0:height, 0:width]
    images = [
        np.stack([np.sin((x + 4 * i) / 15), np.cos((y + 2 * i) / 11), np.sin((x + y) / 23 + i / 5)], -1)
        for i in range(frames)
    ]
    return 0.9 * np.stack(images).astype(np.float32)


def grey_levels(frames, height=32, width=32):
    """Frame i is uniform with a level that tells i."""
    levels = np.linspace(-0.9, 0.9, frames, dtype=np.float32)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)), levels


def psnr(a, b):
    return 10 * np.log10(4.0 / np.mean((a - b) ** 2))


def read(path, frames=9, fps=16, height=48, width=64, **kwargs):
    return video_io.read_video(path, frames=frames, fps=fps, height=height, width=width, **kwargs)


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    original = waves()
    video_io.write_video(path, original, fps=16)
    again = read(path)
    assert again.shape == original.shape
    assert again.dtype == np.float32
    assert psnr(original, again) > 35
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]
    assert video_io.duration(path) == pytest.approx(9 / 16)


def test_the_same_video_is_the_same_file_whatever_lies_in_memory(tmp_path):
    """Each process finds other bytes in the memory that malloc gives it (glibc does so when asked)."""
    np.save(tmp_path / "waves.npy", waves(frames=17))
    code = (
        "import sys, numpy as np\n"
        "from avd_jax.data.video import write_video\n"
        "write_video(sys.argv[2], np.load(sys.argv[1]), fps=16)\n"
    )
    files = [tmp_path / f"{byte}.mp4" for byte in (1, 85, 170)]
    for file in files:
        command = [sys.executable, "-c", code, str(tmp_path / "waves.npy"), str(file)]
        subprocess.run(command, check=True, env=os.environ | {"MALLOC_PERTURB_": file.stem})
    assert len({file.read_bytes() for file in files}) == 1


def test_browsers_play_what_is_written(tmp_path):
    for quality in (0, 10):
        path = tmp_path / f"{quality}.mp4"
        video_io.write_video(path, waves(), fps=12.5, quality=quality)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream))
            assert (stream.codec.name, stream.profile, frame.format.name) == ("h264", "High", "yuv420p")
            assert stream.average_rate == 12.5
            assert stream.frames == 9
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat"), "the index must come first, for playing while loading"
    assert (tmp_path / "10.mp4").stat().st_size > 2 * (tmp_path / "0.mp4").stat().st_size


@pytest.mark.parametrize("colour", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (0.2, -0.3, 0.7)])
def test_colours_survive(tmp_path, colour):
    video = np.broadcast_to(np.float32(colour), (3, 32, 32, 3))
    video_io.write_video(tmp_path / "c.mp4", video, fps=8, quality=10)
    np.testing.assert_allclose(read(tmp_path / "c.mp4", 3, 8, 32, 32), video, atol=0.03)


def test_odd_sizes_values_outside_and_nan(tmp_path):
    video = np.full((2, 31, 45, 3), 7.0, np.float32)
    video[:, :, :20] = -9.0
    video[:, :, 40:] = np.nan
    video_io.write_video(tmp_path / "odd.mp4", video, fps=8, quality=10)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (32, 46)
    again = read(tmp_path / "odd.mp4", 2, 8, 32, 46)
    np.testing.assert_allclose(again[:, :, :17], -1, atol=0.05)
    np.testing.assert_allclose(again[:, :, 23:37], 1, atol=0.05)
    np.testing.assert_allclose(again[:, :, 43:], 0, atol=0.05)


@pytest.mark.parametrize(
    ("fps", "start", "nearest"),
    [
        (25.0, 0.0, [0, 1, 2, 3, 4]),
        (12.5, 0.0, [0, 2, 4, 6, 8]),
        (50.0, 0.0, [0, 0, 1, 1, 2]),  # a tie goes to the earlier frame
        (10.0, 0.0, [0, 2, 5, 7, 10]),
        (25.0, 0.2, [5, 6, 7, 8, 9]),
        (25.0, 1.6, [40, 41, 42, 43, 44]),
    ],
)
def test_frames_nearest_in_time(tmp_path, fps, start, nearest):
    video, levels = grey_levels(60)
    video_io.write_video(tmp_path / "levels.mp4", video, fps=25, quality=10)
    clip = read(tmp_path / "levels.mp4", 5, fps, 32, 32, start=start)
    # Levels are 0.03 apart.
    np.testing.assert_allclose(clip.mean((1, 2, 3)), levels[nearest], atol=0.012)


def test_last_frame_lasts_one_period_and_no_longer(tmp_path):
    video, levels = grey_levels(10)
    video_io.write_video(tmp_path / "v.mp4", video, fps=10, quality=10)
    clip = read(tmp_path / "v.mp4", 20, 20, 32, 32)
    assert clip[-1].mean() == pytest.approx(levels[-1], abs=0.02)
    with pytest.raises(UserError, match=r"v\.mp4: too short: .*21 frames.*only 20"):
        read(tmp_path / "v.mp4", 21, 20, 32, 32)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 64), (48, 48), (16, 80)])
def test_aspect_ratio_is_kept_and_the_centre_cut_out(tmp_path, height, width):
    y, x = np.mgrid[0:96, 0:128]
    disc = np.where((y - 47.5) ** 2 + (x - 63.5) ** 2 < 12**2, 1.0, -1.0)
    video = np.broadcast_to(disc[None, :, :, None], (2, 96, 128, 3))
    video_io.write_video(tmp_path / "disc.mp4", video, fps=8, quality=10)
    image = read(tmp_path / "disc.mp4", 1, 8, height, width)[0, :, :, 0] > 0
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    diameter = 24 * max(height / 96, width / 128)
    assert len(rows) == pytest.approx(diameter, abs=1.5)
    assert len(columns) == pytest.approx(diameter, abs=1.5)
    assert rows.mean() == pytest.approx((height - 1) / 2, abs=0.6)
    assert columns.mean() == pytest.approx((width - 1) / 2, abs=0.6)


def test_shrinking_is_antialiased(tmp_path):
    checkers = np.where(np.indices((128, 128)).sum(0) % 2, 1.0, -1.0)
    # Left to right through the yuv420p chroma unharmed: luma is stored at full resolution.
    video = np.broadcast_to(checkers[None, :, :, None], (1, 128, 128, 3))
    video_io.write_video(tmp_path / "c.mp4", video, fps=8, quality=10)
    small = read(tmp_path / "c.mp4", 1, 8, 24, 24)
    assert np.abs(small - small.mean()).max() < 0.1


def test_rotation_flag_is_honoured(tmp_path):
    image = np.full((32, 64, 3), 16, np.uint8)
    image[:, :32, 0] = 240  # the left half is red
    for degrees in (0, 90, 180, -90):
        path = tmp_path / f"{degrees}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
            stream.set_display_rotation(degrees)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with av.open(str(path)) as container:
            turned = next(container.decode(video=0)).rotation
        assert abs(turned) == abs(degrees)
        height, width = (32, 64) if degrees in (0, 180) else (64, 32)
        expected = np.rot90(image[:, :, 0] > 100, turned // 90)
        found = video_io.read_video(path, frames=1, fps=8, height=height, width=width)[0, :, :, 0] > 0
        assert np.mean(found == expected) > 0.95


def test_pixels_that_are_not_square(tmp_path):
    y, x = np.mgrid[0:64, 0:64]
    ellipse = np.where(((y - 31.5) / 20) ** 2 + ((x - 31.5) / 10) ** 2 < 1, 255, 0).astype(np.uint8)
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([ellipse] * 3, -1), format="rgb24")))
        container.mux(stream.encode(None))
    circle = read(path, 1, 8, 64, 128)[0, :, :, 0] > 0
    rows, columns = np.flatnonzero(circle.any(1)), np.flatnonzero(circle.any(0))
    assert len(rows) == pytest.approx(40, abs=2)
    assert len(columns) == pytest.approx(40, abs=2)


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "noise":
        generator = np.random.default_rng(0)
        data = bytearray(data)
        for at in generator.integers(len(data) // 4, len(data) * 3 // 4, 30):
            data[at : at + 20] = generator.bytes(20)
        return bytes(data)
    return {"empty": b"", "half": data[: len(data) // 2], "text": b"not a video\n" * 50}[kind]


@pytest.mark.parametrize("kind", ["empty", "half", "text", "noise"])
def test_damaged_files_are_named(tmp_path, kind):
    generator = np.random.default_rng(0)
    video_io.write_video(tmp_path / "v.mp4", generator.uniform(-1, 1, (9, 48, 64, 3)), fps=16)
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "bad.mp4").write_bytes(damaged(data, kind))
    with pytest.raises(UserError, match=r"bad\.mp4: ") as caught:
        read(tmp_path / "bad.mp4")
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_sound_only(tmp_path):
    with pytest.raises(UserError, match="none"):
        read(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"sound\.mp4: has no video"):
        read(path)
    with pytest.raises(UserError, match=r"sound\.mp4: has no video"):
        video_io.duration(path)


def test_unwritable_path_and_wrong_arrays(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        video_io.write_video(tmp_path / "file" / "v.mp4", waves(), fps=8)
    with pytest.raises(UserError, match="cannot be written"):
        video_io.contact_sheet([waves()], tmp_path / "file" / "v.png")
    with pytest.raises(ValueError, match="F H W 3"):
        video_io.write_video(tmp_path / "v.mp4", waves()[None], fps=8)
    with pytest.raises(ValueError, match="quality"):
        video_io.write_video(tmp_path / "v.mp4", waves(), fps=8, quality=11)
    with pytest.raises(ValueError, match="caption"):
        video_io.contact_sheet([waves()], tmp_path / "v.png", ["one", "two"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_killed_writer_leaves_no_file(tmp_path):
    code = (
        "import os, sys, numpy as np\n"
        "from avd_jax.data import atomic\n"
        "with atomic.replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "v.mp4")]).returncode == -9
    assert not (tmp_path / "v.mp4").exists()
    video_io.write_video(tmp_path / "v.mp4", waves(), fps=8)
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_writers_of_one_file_take_turns(tmp_path):
    """Else one of them renames what the other is at, and this one ends with an error."""
    path, begun, order = tmp_path / "v.txt", threading.Event(), []

    def second():
        begun.wait(60)
        with atomic.replacing(path) as temporary:
            order.append(path.read_text())
            temporary.write_text("second")

    other = threading.Thread(target=second)
    other.start()
    with atomic.replacing(path) as temporary:
        temporary.write_text("first")
        begun.set()
        other.join(0.5)  # it is waiting, or has yet to begin
        assert order == []
    other.join(60)
    assert order == ["first"]
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["v.txt"]


def test_contact_sheet(tmp_path):
    video, levels = grey_levels(11, 40, 80)
    short = np.full((2, 40, 40, 3), 1.0)
    captions = ["", "a caption long enough to need " + "many words " * 30]
    video_io.contact_sheet([video, short], tmp_path / "s.png", captions, columns=3, thumbnail_height=40)
    sheet = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
    shown = (levels[[0, 5, 10]] + 1) * 127.5
    for column, level in enumerate(shown):
        left = 4 + column * 84
        np.testing.assert_allclose(sheet[10:30, left + 5 : left + 75], level, atol=2)
    plain = tmp_path / "plain.png"
    video_io.contact_sheet([video, short], plain, columns=3, thumbnail_height=40)
    assert Image.open(plain).height < sheet.shape[0] - 3 * 18, "a long caption takes several lines"
    dark = (sheet < 60).all(-1).sum()
    assert dark > 400, "captions and frame numbers are drawn"

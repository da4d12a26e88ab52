"""Video files to arrays in [-1, 1] and back, and contact sheets to look at many videos at once.

Decoding and encoding are FFmpeg's, through PyAV; scaling is Pillow's, which filters properly when it shrinks.
"""

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from avd_jax.data.atomic import replacing
from avd_jax.data.picture import display_matrix, is_on_its_side, shown
from avd_jax.data.video_file import VideoFile, opened
from avd_jax.errors import UserError

BT709 = 1  # FFmpeg's number of the HDTV matrix, primaries and transfer curve
LIMITED_RANGE = 1
ROUNDING = 0.0015  # seconds; times in containers and lists are in milliseconds, and a length is a difference of two
TIE = 1e-6  # seconds; keeps the choice between two equally near frames free of rounding


def read_video(
    path: str | os.PathLike,
    *,
    frames: int,
    fps: float,
    height: int,
    width: int,
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """Read one clip, resampled in time and space.

    Frame i is the source frame nearest to `start + i / fps`, the earlier one of two equally near. It is scaled to
    cover `height` x `width` with its aspect ratio kept (non-square pixels and display matrices are honoured) and the
    centre is cut out. Its colours are BT.709's, see `picture.shown`; interlaced video is deinterlaced.

    Args:
      path: a video file with at least one video stream.
      frames: number of frames of the clip.
      fps: frames per second of the clip.
      height: pixels.
      width: pixels.
      start: seconds after the first frame of the video.
      end: seconds likewise. With it only the frames from `start` on and before `end` are taken, so that a scene
        before or behind is not seen, however slow the video is. The last of them stays until the end.

    Returns:
      float32 [frames height width 3] in [-1, 1].

    Raises:
      UserError: the file is missing, not a video, damaged in what is decoded for the clip, or ends before it does.
    """
    clip = np.empty((frames, height, width, 3), np.uint8)
    filled = 0
    last = pixels = None
    with opened(path) as file:
        times = start + np.arange(frames) / fps
        period = 1 / (file.rate or fps)
        source = file.frames(start)
        if end is not None:
            source = ((time, frame) for time, frame in source if time > start - ROUNDING)  # both may be rounded
        for frame in _nearest(source, times, period, np.inf if end is None else end - ROUNDING):
            if frame is not last:
                last, pixels = frame, _scaled(frame, file, height, width)
            clip[filled] = pixels
            filled += 1
    if filled < frames:
        raise UserError(
            f"{path}: too short: a clip of {frames} frames at {fps:g} fps from {start:g} s on "
            f"finds only {filled} of its frames."
        )
    video = clip.astype(np.float32)
    # In place: at full size each copy is 400 MB.
    video /= 127.5
    video -= 1.0
    return video


def read_whole_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Read every frame of a video at its own rate and size, the right way up; pixels that are not square stay so.

    Returns:
      float32 [F H W 3] in [-1, 1], and the frames per second.

    Raises:
      UserError: the file is missing, not a video, damaged, or of frames of several sizes.
    """
    with opened(path) as file:
        frames = [shown(frame, file.tags, path) for _, frame in file.frames()]
        rate = file.rate
    if not frames or not rate:
        raise UserError(f"{path}: has no frames, or does not state their rate; rewrite it as mp4.")
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path}: its frames change their size; rewrite it with one size.")
    return np.stack(frames).astype(np.float32) / 127.5 - 1.0, rate


def duration(path: str | os.PathLike) -> float:
    """Return the seconds from the first frame of the video to the end of the last (UserError if it has no times)."""
    with opened(path) as file:
        length = file.length()
    if length <= 0:
        raise UserError(f"{path}: its frames have no time stamps; rewrite it as mp4.")
    return length


def frame_rate_and_size(path: str | os.PathLike) -> tuple[float, int, int]:
    """Return (frames per second, height, width) of a video as it is shown: the right way up, of square pixels."""
    with opened(path) as file:
        frame = next((frame for _, frame in file.frames()), None)
        if frame is None or not file.rate:
            raise UserError(f"{path}: has no frames, or does not state their rate; rewrite it as mp4.")
        height, width = frame.height, max(1, round(frame.width * file.pixel_aspect))
        if is_on_its_side(display_matrix(frame)):
            height, width = width, height
        return file.rate, height, width


def write_video(path: str | os.PathLike, video: np.ndarray, *, fps: float, quality: int = 8) -> None:
    """Write an H.264 mp4 that browsers play; the file appears only when it is complete.

    Odd sizes grow by one repeated row or column, which the chroma subsampling of H.264 demands.

    Args:
      path: the file to write; missing folders are made.
      video: [F H W 3] in [-1, 1]; values outside are clipped, NaN becomes mid-grey.
      fps: frames per second.
      quality: 0 (worst) to 10 (visually lossless).

    Raises:
      UserError: the path cannot be written.
      ValueError: the array is not a video, or the quality is out of range.
    """
    pixels = _to_uint8(video)
    if not 0 <= quality <= 10:
        raise ValueError(f"quality is 0..10, not {quality}")
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    # x264 leaves the profile that browsers know when its rate factor is 0, so 1 is the best.
    crf = max(1, round(5.1 * (10 - quality)))
    # x264's macroblock tree reads memory that nobody wrote if the width is no multiple of 128 pixels: with it the
    # same video becomes another file each time.
    encoding = {"crf": str(crf), "profile": "high", "x264-params": "mbtree=0"}
    try:
        with replacing(path) as temporary:
            options = {"movflags": "+faststart"}
            with av.open(os.fspath(temporary), "w", format="mp4", options=options) as container:
                stream = container.add_stream("libx264", rate=rate, options=encoding)
                stream.height, stream.width = pixels.shape[1:3]
                stream.pix_fmt = "yuv420p"
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = BT709
                context.color_range = LIMITED_RANGE
                converter = VideoReformatter()  # prepared once: `frame.reformat` does it for each frame
                for image in pixels:
                    rgb = av.VideoFrame.from_ndarray(image, format="rgb24")
                    yuv = converter.reformat(rgb, format="yuv420p", dst_colorspace="ITU709")
                    container.mux(stream.encode(yuv))
                container.mux(stream.encode(None))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error


def contact_sheet(
    videos: Sequence[np.ndarray],
    path: str | os.PathLike,
    captions: Sequence[str] | None = None,
    *,
    columns: int = 6,
    thumbnail_height: int = 160,
) -> None:
    """Write a PNG with one row a video: evenly spread frames, the first and last among them, under the caption.

    Args:
      videos: arrays [F H W 3] in [-1, 1]; sizes and lengths may differ.
      path: the PNG to write; missing folders are made.
      captions: one a video, wrapped to the width of its row; None for no captions.
      columns: most frames a row; a shorter video shows each frame once.
      thumbnail_height: pixels.

    Raises:
      UserError: the path cannot be written.
      ValueError: there are no videos, or not one caption for each.
    """
    if not videos or (captions is not None and len(captions) != len(videos)):
        raise ValueError(f"{len(videos)} videos with {'no' if captions is None else len(captions)} captions")
    rows = [
        _sheet_row(_to_uint8(video), "" if captions is None else captions[i], columns, thumbnail_height)
        for i, video in enumerate(videos)
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    try:
        with replacing(path) as temporary:
            sheet.save(temporary, format="PNG", compress_level=1)  # the usual 6 takes half of the time of a sheet
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error


def _nearest(
    decoded: Iterator[tuple[float, av.VideoFrame]], times: np.ndarray, period: float, end: float = np.inf
) -> Iterator[av.VideoFrame]:
    """Yield for each of the ascending `times` the frame nearest to it, of those up to `end`; stop when they end.

    The last frame of a file stays on screen for `period` seconds, and one that another follows until then.
    """
    filled, before, before_time = 0, None, -np.inf
    for now, frame in decoded:
        if now > end:
            period = max(period, end - before_time)
            break
        while filled < len(times) and now + TIE >= times[filled]:
            yield before if times[filled] - before_time <= now - times[filled] + TIE else frame
            filled += 1
        if filled == len(times):
            return
        before, before_time = frame, now
    while filled < len(times) and times[filled] < before_time + period - TIE:
        yield before
        filled += 1


def _scaled(frame: av.VideoFrame, file: VideoFile, height: int, width: int) -> np.ndarray:
    """Return uint8 [height width 3]: the frame as it is shown, scaled to cover this size, and the centre cut out."""
    on_its_side = is_on_its_side(display_matrix(frame))
    needed = (width, height) if on_its_side else (height, width)
    # Half as large again is left for the filter below.
    shrink = max(1.0, min(frame.height / needed[0], frame.width / needed[1]) / 1.5)
    pixels = shown(frame, file.tags, file.path, shrink=shrink)
    pixel_aspect = 1 / file.pixel_aspect if on_its_side else file.pixel_aspect
    source_height, source_width = pixels.shape[:2]
    box_width = min(source_width, source_height * (width / height) / pixel_aspect)
    box_height = min(source_height, source_width * pixel_aspect / (width / height))
    left, top = (source_width - box_width) / 2, (source_height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _to_uint8(video: np.ndarray) -> np.ndarray:
    pixels = np.asarray(video, np.float32)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"a video is [F H W 3], not {pixels.shape}")
    return np.rint((np.clip(np.nan_to_num(pixels, nan=0.0), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def _sheet_row(pixels: np.ndarray, caption: str, columns: int, thumbnail_height: int) -> Image.Image:
    gap, size = 4, 14
    font = ImageFont.load_default(size)
    line = size + 4
    chosen = np.unique(np.rint(np.linspace(0, len(pixels) - 1, columns)).astype(int))
    width = max(1, round(thumbnail_height * pixels.shape[2] / pixels.shape[1]))
    # Narrow rows still leave room to read a caption.
    row_width = max(gap + len(chosen) * (width + gap), 480 if caption else 0)
    lines = _wrapped(caption, font, row_width - 2 * gap)
    row = Image.new("RGB", (row_width, gap + len(lines) * line + thumbnail_height + line + gap), "white")
    draw = ImageDraw.Draw(row)
    for i, text in enumerate(lines):
        draw.text((gap, gap + i * line), text, fill="black", font=font)
    top = gap + len(lines) * line
    for column, index in enumerate(chosen):
        left = gap + column * (width + gap)
        thumbnail = Image.fromarray(pixels[index]).resize((width, thumbnail_height), Image.Resampling.LANCZOS)
        row.paste(thumbnail, (left, top))
        draw.text((left, top + thumbnail_height), f"frame {index}", fill="dimgray", font=font)
    return row


def _wrapped(text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines

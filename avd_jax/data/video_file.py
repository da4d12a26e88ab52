"""Video files opened, their stream chosen, and its frames in the order of their times: sound, deinterlaced.

What a frame looks like is `picture.py`'s matter, and which frames make a clip `video.py`'s.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import av
from av.filter import Graph
from av.stream import Disposition

from avd_jax.errors import UserError
from avd_jax.paths import any_path, is_bucket

SEEK_MARGIN = 1.0  # seconds; containers seek by decoding time, which runs ahead of the time of display
REORDERED = 16  # frames; decoders hold back fewer before they show one
H264_SLICE, H264_IDR_SLICE = 1, 5  # ITU-T H.264, table 7-1
TAIL = 10.0  # seconds; the end of a file is looked for from here on
STILL = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
COUNTED_PACKETS = 300  # of all video tracks together; a track with one picture by then is a cover
PREVIEW = 4  # a track with so many times fewer pixels than another is its preview
# FFmpeg patches over damage by default and tells nobody; with these its decoders stop instead.
# Titles are not used, so an encoding that is not UTF-8 stops nothing. PyAV 19 takes any and has no such argument.
_ANY_TITLE = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}


class Damaged(UserError):
    """A frame is damaged, or seems so because decoding began in the middle."""


@dataclass(frozen=True)
class Tags:
    """What a container says of its colours, in FFmpeg's numbers (ITU-T H.273); 2 is unspecified, 0 as a range too."""

    matrix: int
    primaries: int
    transfer: int
    range: int


class VideoFile:
    """An open file and the video in it that a player shows.

    Attributes:
      path: the file, as messages name it.
      tags: colours as the container states them.
      pixel_aspect: width of a pixel over its height.
      rate: frames per second, or None if the file does not tell.
      codec: FFmpeg's name of the video's codec.
    """

    def __init__(self, path: str | os.PathLike, decoder: Mapping[str, str] | None = None, threads: str = "AUTO"):
        """Open the file; `opened` closes it, and turns FFmpeg's errors into a UserError.

        Args:
          path: the file.
          decoder: options for FFmpeg's decoder beside those that make it strict.
          threads: of the decoder, in PyAV's words; NONE is one.
        """
        self.path = path
        self._threads = threads
        self._decoder_options = {**(decoder or {}), **STRICT}
        self._container = self._stream = None
        self._open()
        context = self._stream.codec_context
        self.tags = Tags(context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        self.pixel_aspect = float(self._stream.sample_aspect_ratio or 1)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate = float(rate) if rate else None
        self.codec = self._stream.codec.canonical_name
        if self._stream.metadata.get("alpha_mode") == "1" and self._stream.codec.name in ("vp8", "vp9"):
            # Their alpha is a second video beside the first, which FFmpeg's own decoders pass over.
            raise UserError(f"{path}: has transparency, which cannot be read; put it on a background first.")

    def frames(self, start: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield (seconds after the first frame of the video, frame) in order, from shortly before `start` on.

        Raises:
          UserError: a frame is damaged or has no time stamp.
        """
        origin = self._origin()
        for first, judged in self._entries(start, origin):
            ready, held = False, None
            try:
                for time, frame in self._timed(self._decode(first, judged), origin):
                    # Of the frames before the start, the last one may be the nearest to it.
                    if not ready and time < start:
                        held = (time, frame)
                        continue
                    if held is not None:
                        yield held
                    ready, held = True, None
                    yield time, frame
            except Damaged:
                if ready or first is None:
                    raise
            else:
                if held is not None:
                    yield held
                if ready or held is not None:
                    return

    def length(self) -> float:
        """Return how many seconds the video lasts, from its first frame to the end of its last.

        Without a length in the header (Matroska has none for a track, a live recording none at all), the time stamps
        at the end of the file tell. 0 if it has no time stamps.
        """
        stream, container = self._stream, self._container
        if stream.duration and stream.duration > 0 and not self._is_fragmented():
            return float(stream.duration * stream.time_base)
        origin = self._origin()
        tail = (container.duration or 0) / av.time_base - TAIL
        if origin is not None and tail > 0 and self._seek(int(tail / stream.time_base)):
            times = self._packet_times()
            if times is not None and times[1] > origin:
                return times[1] - origin
        self._open()
        times = self._packet_times()
        return 0.0 if times is None else times[1] - (times[0] if origin is None else origin)

    def promised(self) -> float | None:
        """Return how many seconds a Matroska file says that the video lasts; None if it does not say, or is another.

        Other kinds of files are seen to be damaged where they were cut off; this one just ends.
        """
        stream, container = self._stream, self._container
        if "matroska" not in container.format.name:
            return None
        told = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if told:
            end = 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3])
        elif len(container.streams) == 1 and container.duration:
            end = container.duration / av.time_base
        else:
            return None  # the whole file's length may be that of its sound
        return end - max(self._origin() or 0.0, 0.0)

    def close(self) -> None:
        """Close the file."""
        if self._container is not None:
            self._container.close()

    def _open(self, threads: str | None = None) -> None:
        index = None if self._stream is None else self._stream.index
        self.close()
        self._container = _open(self.path)
        self._stream = self._container.streams[_shown_stream(self._container, self.path) if index is None else index]
        self._stream.thread_type = threads or self._threads
        self._stream.codec_context.options = self._decoder_options
        self._moved = self._decoding = False

    def _origin(self) -> float | None:
        """Return the time stamp of the first frame, in seconds, or None if the header does not tell."""
        stream = self._stream
        return None if stream.start_time is None else float(stream.start_time * stream.time_base)

    def _entries(self, start: float, origin: float | None) -> Iterator[tuple[int | None, int | None]]:
        """Yield where to begin decoding for `start`: (key frame, key frame from which damage counts).

        Both are time stamps in the stream's units; None is the beginning of the file. A decoder that begins in the
        middle may miss pictures of before, and call that damage. So a failure is tried again from the key frame before,
        whose errors do not count until all is as in one go, and at last from the beginning.
        """
        unit = self._stream.time_base
        margin = SEEK_MARGIN if not self.rate else max(SEEK_MARGIN, REORDERED / self.rate)
        latest = int((start + (origin or 0.0)) / unit)
        if start > margin:
            key = self._key_frame(latest - int(margin / unit))
            if key is not None and key <= latest:
                yield key, key
                before = self._key_frame(key - 1)
                if before is not None and before < key:
                    yield before, key
        yield None, None

    def _key_frame(self, latest: int) -> int | None:
        """Return the time stamp of the key frame that a seek to `latest` finds, or None."""
        if not self._seek(latest):
            return None
        return next((_stamp(packet) for packet in self._container.demux(self._stream) if packet.is_keyframe), None)

    def _seek(self, stamp: int) -> bool:
        self._moved = True
        try:
            self._container.seek(stamp, stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def _is_fragmented(self) -> bool:
        """Whether it is an mp4 in fragments, whose header states the length of the first one, or none."""
        return "mp4" in self._container.format.name and not self._stream.frames

    def _packet_times(self) -> tuple[float, float] | None:
        """Return the first time stamp and the end of the last one, in seconds, of what is left to read."""
        unit, first, last, last_duration = self._stream.time_base, None, None, 0
        for packet in self._container.demux(self._stream):
            stamp = _stamp(packet)
            if stamp is None:
                continue
            first = stamp if first is None else min(first, stamp)
            if last is None or stamp >= last:
                last, last_duration = stamp, packet.duration or 0
        if last is None:
            return None
        period = 1 / self.rate if self.rate else float(last_duration * unit)
        return float(first * unit), float(last * unit) + period

    def _decode(self, first: int | None, judged: int | None) -> Iterator[av.VideoFrame]:
        """Yield sound frames from the key frame `first` on; what comes before the key frame `judged` may be damaged.

        Frames that come behind `first` in the file and before it in time lean on what the seek has passed over. So do
        those at the beginning of a file that was cut out of a longer one there.
        """
        # With a thread a frame, an error would be told of a later packet, and take the frames behind it along; with a
        # thread a slice, FFmpeg's H.264 decoder marks nothing.
        threads = self._threads if first == judged else "NONE"
        if self._decoding or threads != self._threads or (first is None and self._moved):
            self._open(threads)
        self._decoding = True
        if first is not None and not self._seek(first):
            raise Damaged(f"{self.path}: cannot be searched.")
        begun, counts, seen = first is None, first == judged, "at its beginning"
        for packet in self._container.demux(self._stream):
            stamp = _stamp(packet)
            if packet.size and stamp is not None:
                if first is None:
                    counts = not self._leans_back(packet)
                    first, judged = (-math.inf, -math.inf) if counts else (stamp, math.inf)
                    self._stream.thread_type = self._threads if counts else "NONE"
                elif packet.is_keyframe and judged == math.inf:
                    judged = stamp
                begun |= packet.is_keyframe
                if not begun or stamp < first:
                    continue
                counts |= packet.is_keyframe and stamp >= judged
            try:
                frames = packet.decode()
            except av.InvalidDataError as error:
                if counts:
                    raise Damaged(f"{self.path}: damaged {seen}; get the file again.") from error
                continue
            for frame in frames:
                seen = seen if frame.time is None else f"near {frame.time:.2f} s"
                if not frame.is_corrupt:
                    yield frame
                elif judged is None or frame.pts is None or frame.pts >= judged:
                    raise Damaged(f"{self.path}: damaged {seen}; get the file again.")
            if packet.is_corrupt and counts:
                raise Damaged(f"{self.path}: damaged {seen}; get the file again.")

    def _leans_back(self, packet: av.Packet) -> bool:
        """Whether a key frame is one that pictures before it may be needed for: H.264 without an IDR slice."""
        context = self._stream.codec_context
        if context.name != "h264":
            return False
        data, header = bytes(packet), context.extradata or b""
        if header[:1] != b"\x01":  # Annex B: each unit comes behind 00 00 01
            kinds = [unit[0] & 31 for unit in data.split(b"\0\0\1")[1:] if unit]
        else:  # ISO 14496-15: each unit comes behind its length
            kinds, at, size = [], 0, (header[4] & 3) + 1
            while at + size < len(data):
                kinds.append(data[at + size] & 31)
                at += size + int.from_bytes(data[at : at + size], "big")
        return H264_SLICE in kinds and H264_IDR_SLICE not in kinds

    def _timed(self, frames: Iterable[av.VideoFrame], origin: float | None) -> Iterator[tuple[float, av.VideoFrame]]:
        for frame in _deinterlaced(frames, self._stream, self.path):
            if frame.time is None:
                raise UserError(f"{self.path}: its frames have no time stamps; rewrite it as mp4.")
            origin = frame.time if origin is None else origin
            yield frame.time - origin, frame


@contextmanager
def opened(
    path: str | os.PathLike, decoder: Mapping[str, str] | None = None, threads: str = "AUTO"
) -> Iterator[VideoFile]:
    """Open a video file for as long as the context lasts; arguments as `VideoFile`'s.

    Raises:
      UserError: the file is missing, not a video, damaged, or what reading it raises.
    """
    file = None
    try:
        file = VideoFile(path, decoder, threads)
        yield file
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a video ({error.strerror or error}).") from error
    finally:
        if file is not None:
            file.close()


def _stamp(packet: av.Packet) -> int | None:
    return packet.dts if packet.pts is None else packet.pts


def _open(path: str | os.PathLike):
    # FFmpeg would take what stands before a colon in a relative name for a protocol.
    source = any_path(path).open("rb") if is_bucket(path) else os.path.abspath(path)
    return av.open(source, **_ANY_TITLE)


def _shown_stream(container, path: str | os.PathLike) -> int:
    """Return the index of the video track that a player shows: no cover, marked as default, the largest picture."""
    tracks = [track for track in container.streams.video if not track.disposition & STILL]
    if not tracks:
        raise UserError(f"{path}: has no video{', only a cover' if container.streams.video else ' stream'}.")
    tracks = [track for track in tracks if track.codec_context is not None]
    if not tracks:
        raise UserError(f"{path}: its video has a codec that FFmpeg does not know; convert it to H.264.")
    if len(tracks) > 1:
        moving = _moving(path, {track.index for track in tracks})
        tracks = [track for track in tracks if track.index in moving] or tracks
    areas = {track.index: track.width * track.height for track in tracks}
    # A player takes the default track; yet much smaller than another, it is a preview that was left the default.
    shown = [track for track in tracks if areas[track.index] * PREVIEW > max(areas.values())] or tracks
    return max(
        shown, key=lambda track: (bool(track.disposition & Disposition.default), areas[track.index], -track.index)
    ).index


def _moving(path: str | os.PathLike, indices: set[int]) -> set[int]:
    """Return those of the tracks that have more than one picture."""
    counts = dict.fromkeys(indices, 0)
    with _open(path) as container:
        tracks = [track for track in container.streams.video if track.index in indices]
        for number, packet in enumerate(container.demux(*tracks)):
            counts[packet.stream_index] += bool(packet.size)
            if min(counts.values()) > 1 or number > COUNTED_PACKETS:
                break
    return {index for index, count in counts.items() if count > 1}


def _deinterlaced(frames: Iterable[av.VideoFrame], stream, path: str | os.PathLike) -> Iterator[av.VideoFrame]:
    """Pass frames on; from the first that is marked as interlaced on, fill up the lines of its first field.

    The filter is FFmpeg's bwdif, a frame for a frame. Frames that are not marked keep every row.
    """
    graph, kind = None, None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if stream.codec.name == "hevc":
            raise UserError(f"{path}: interlaced HEVC, whose fields are pictures of their own; deinterlace it first.")
        if kind != (kind := (frame.format.name, frame.width, frame.height)):
            yield from _pushed(graph, None)
            graph = _deinterlacer(frame, stream)
        yield from _pushed(graph, frame)
    yield from _pushed(graph, None)


def _deinterlacer(frame: av.VideoFrame, stream) -> Graph:
    graph = Graph()
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={frame.time_base}"
        f":colorspace={frame.colorspace}:range={frame.color_range}",
    )
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _pushed(graph: Graph | None, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """Give a frame to the graph, or None at the end, and yield what comes out."""
    if graph is None:
        return
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return

"""Small videos of the kinds that users bring, made with PyAV."""

from fractions import Fraction

import av
import av.filter
import numpy as np
from av.video.reformatter import VideoReformatter

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(frames=50, size=96):
    """Return uint8 [F H W 3]: corners red, green, blue, white in reading order, and frame i has a centre 16 + 4i."""
    images = np.full((frames, size, size, 3), 16, np.uint8)
    third = size // 3
    images[:, :third, :third], images[:, :third, -third:] = RED, GREEN
    images[:, -third:, :third], images[:, -third:, -third:] = BLUE, WHITE
    centre = np.minimum(16 + 4 * np.arange(frames), 255).astype(np.uint8)
    images[:, third : 2 * third, third : 2 * third] = centre[:, None, None, None]
    return images


def noise(frames=50, size=96):
    """Return uint8 [F H W 3]: coloured noise that moves, which leaves a coder no frame without residuals."""
    noise = np.random.default_rng(0).integers(0, 255, (size // 8, size // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(noise, (3 * i, 5 * i), (0, 1)) for i in range(frames)])


def write(path, *tracks, metadata=None, **options):
    """Write a video file of one or more tracks, see `Track`; `options` are the container's."""
    with av.open(str(path), "w", options=options) as container:
        container.metadata.update(metadata or {})
        streams = [track.add_to(container) for track in tracks]
        for index in range(max(len(track.images) for track in tracks)):
            for track, stream in zip(tracks, streams, strict=True):
                if index < len(track.images):
                    container.mux(stream.encode(track.frame(index)))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


class Track:
    """One track of pictures.

    Args:
      images: uint8 or uint16 [F H W C]: R'G'B', with alpha if C is 4.
      codec: FFmpeg's name of the encoder.
      pix_fmt: as it is coded.
      matrix, primaries, transfer: tags, numbers of ITU-T H.273; the matrix is also that of the conversion, 0: untagged
        and BT.601.
      display: nine integers of a display matrix.
      first: time stamp of the first frame, in frames.
      attached: whether it is marked as a cover.
      fields: "tff" or "bff", which field of an interlaced frame comes first.
      options: the encoder's.
    """

    def __init__(
        self,
        images,
        codec="libx264",
        pix_fmt="yuv420p",
        *,
        rate=25,
        matrix=1,
        primaries=None,
        transfer=None,
        display=None,
        first=0,
        attached=False,
        fields=None,
        **options,
    ):
        self.images, self.codec, self.pix_fmt, self.rate = images, codec, pix_fmt, rate
        self.tags = (matrix, primaries or matrix, transfer or matrix) if matrix else None
        self.converter = VideoReformatter()
        self.display, self.first, self.attached, self.fields = display, first, attached, fields
        self.options = ({"crf": "1"} if codec in ("libx264", "libx265") else {}) | options
        if codec == "libx265":
            self.options["x265-params"] = "log-level=none"

    def add_to(self, container):
        stream = container.add_stream(self.codec, rate=self.rate, options=self.options)
        stream.height, stream.width = self.images.shape[1:3]
        stream.pix_fmt = self.pix_fmt
        context = stream.codec_context
        if self.codec == "mpeg4":
            context.bit_rate = 2_000_000
        if self.tags:
            context.colorspace, context.color_primaries, context.color_trc = self.tags
            context.color_range = 1
        if self.display:
            stream.set_display_matrix(self.display)
        if self.attached:
            stream.disposition = av.stream.Disposition.attached_pic
        return stream

    def frame(self, index):
        image = self.images[index]
        kind = {(1, 3): "rgb24", (1, 4): "rgba", (2, 3): "rgb48le"}[image.dtype.itemsize, image.shape[-1]]
        frame = av.VideoFrame.from_ndarray(image, format=kind)
        if frame.format.name != self.pix_fmt:
            matrix = self.tags[0] if self.tags else 5
            frame = self.converter.reformat(frame, format=self.pix_fmt, dst_colorspace=matrix)
        if self.tags:
            frame.colorspace, frame.color_primaries, frame.color_trc = self.tags
        frame.pts = self.first + index
        return frame if self.fields is None else _with_fields(frame, self.fields)


def _with_fields(frame, fields):
    """Mark a frame as interlaced, which only a filter can do."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setfield", fields), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()

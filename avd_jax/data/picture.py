"""A decoded frame as it is meant to be seen: its colours in BT.709, on black, and the right way up."""

import os

import av
import numpy as np
from av.sidedata.sidedata import SideData, SideDataContainer

from avd_jax.data import colour_transfer
from avd_jax.data.video_file import Tags
from avd_jax.errors import UserError

# Numbers of ITU-T H.273, which are FFmpeg's.
BT709, BT470BG, SMPTE170M, BT2020_NCL, IPT_C2 = 1, 5, 6, 9, 15
UNSTATED = (2, 0, 3)  # unspecified, or reserved
SHOWN_MATRICES = frozenset({BT709, 4, BT470BG, SMPTE170M, 7, BT2020_NCL, 10})  # that FFmpeg's scaler knows
MATRIX_OF_PRIMARIES = {BT709: BT709, BT470BG: BT470BG, SMPTE170M: SMPTE170M, colour_transfer.BT2020: BT2020_NCL}
HD_WIDTH, SD_HEIGHT = 1280, 576  # untagged video from this width on, or above this height, is HD, as players have it
UNIT = 1 << 16  # of a display matrix, whose numbers are 16.16 fixed point


def shown(frame: av.VideoFrame, tags: Tags, path: str | os.PathLike, *, shrink: float = 1.0) -> np.ndarray:
    """Return uint8 [H W 3], the frame in BT.709 R'G'B', the right way up.

    HDR and wide gamuts are mapped (`colour_transfer.py`); what is transparent shows black. Untagged video is BT.709 if
    it is HD and BT.601 if not.

    Args:
      frame: as the decoder gives it.
      tags: of the container; what the frame itself says comes first.
      path: the file, as messages name it.
      shrink: 1 or more; HDR and wide gamuts come so many times smaller, which saves most of their cost.

    Raises:
      UserError: colours are coded in a way that is not known here.
    """
    primaries = tags.primaries if frame.color_primaries in UNSTATED else frame.color_primaries
    transfer = tags.transfer if frame.color_trc in UNSTATED else frame.color_trc
    _tag(frame, tags, primaries, transfer, path)
    depth, letter = (16, "le") if _is_mapped(primaries, transfer) else (8, "")
    size = {}
    if depth == 16 and shrink > 1:
        size = {"width": max(1, round(frame.width / shrink)), "height": max(1, round(frame.height / shrink))}
        size["interpolation"] = "AREA"
    transparent = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    names = {(8, False): "rgb24", (8, True): "rgba", (16, False): "rgb48", (16, True): "rgba64"}
    pixels = frame.to_ndarray(format=names[depth, transparent] + letter, **size)
    colours = pixels[..., :3]
    if depth == 16:
        colours = colour_transfer.to_bt709(colours, transfer=transfer, primaries=primaries)
    if transparent:
        most = np.iinfo(pixels.dtype).max
        opacity = pixels[..., 3:].astype(np.float32) / most
        colours = np.rint(colours * opacity).astype(np.uint8)
    return upright(colours, display_matrix(frame))


def side_data(frame: av.VideoFrame, kind: str) -> SideData | None:
    """Return what comes with a frame beside its pixels, by FFmpeg's name, or None.

    `frame.side_data` says the same, but from then on the frame and it hold each other in memory, for good.

    Raises:
      ValueError: it has side data of a kind that PyAV does not know.
    """
    return SideDataContainer(frame).get(kind)


def display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """Return (a, b, c, d) of the frame's display matrix: pixel (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        data = side_data(frame, "DISPLAYMATRIX")
    except ValueError:
        # A kind of side data that PyAV does not know hides the others; the angle is all that it tells then.
        angle = np.deg2rad(frame.rotation)
        return np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    numbers = np.frombuffer(bytes(data), np.int32) / UNIT
    return tuple(map(float, numbers[[0, 1, 3, 4]]))


def is_on_its_side(matrix: tuple[float, float, float, float]) -> bool:
    """Whether the matrix turns rows into columns."""
    a, b, c, d = map(abs, matrix)
    return b + c > a + d


def upright(pixels: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Turn and mirror a picture [H W C] as the display matrix says, by the nearest of the eight orientations."""
    a, b, c, d = matrix
    if is_on_its_side(matrix):
        # The shown x is c y, the shown y is b x.
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _is_mapped(primaries: int, transfer: int) -> bool:
    return colour_transfer.is_hdr(transfer) or colour_transfer.is_wide(primaries)


def _has_dolby_vision(frame: av.VideoFrame) -> bool:
    """Whether Dolby Vision's mapping comes with the frame; without other tags that is profile 5, coded in IPT."""
    try:
        return side_data(frame, "DOVI_RPU_BUFFER") is not None
    except ValueError:
        return False


def _tag(frame: av.VideoFrame, tags: Tags, primaries: int, transfer: int, path: str | os.PathLike) -> None:
    """Write the frame's matrix and range on it, for FFmpeg's scaler, where it does not state them."""
    if frame.color_range == 0 and tags.range:
        frame.color_range = tags.range
    if frame.format.is_rgb or frame.format.has_palette:
        return
    # 0 is R'G'B', which a frame that is not cannot have.
    matrix = tags.matrix if frame.colorspace in UNSTATED else frame.colorspace
    if matrix in UNSTATED:
        if colour_transfer.is_hdr(transfer):
            matrix = BT2020_NCL
        elif transfer in UNSTATED and _has_dolby_vision(frame):
            matrix = IPT_C2
        elif primaries in MATRIX_OF_PRIMARIES:
            matrix = MATRIX_OF_PRIMARIES[primaries]
        else:
            matrix = BT709 if frame.width >= HD_WIDTH or frame.height > SD_HEIGHT else BT470BG
    if matrix not in SHOWN_MATRICES:
        raise UserError(
            f"{path}: its colours are coded in a way that is not supported (matrix {matrix} of ITU-T H.273, such as "
            f"Dolby Vision's or YCgCo); convert it to BT.709."
        )
    frame.colorspace = matrix

"""A small picture of a clip, made in a worker process."""

import base64

from avd_jax.curation.captioning import jpeg
from avd_jax.data.video import read_video
from avd_jax.errors import UserError


def thumbnail(path: str, seconds: float, size: list[int], width: int) -> str | None:
    """Return the frame at a time as a JPEG in base64, or None if it cannot be read any more.

    Args:
      path: of the video.
      seconds: after its first frame.
      size: width and height of the video as it is shown.
      width: pixels of the picture.
    """
    height = max(1, round(width * size[1] / size[0]))
    try:
        picture = read_video(path, frames=1, fps=1.0, height=height, width=width, start=seconds)[0]
    except UserError:
        return None
    return base64.b64encode(jpeg(picture, quality=75)).decode()

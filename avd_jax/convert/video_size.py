"""The size of the videos that weights were made for, in a file beside them; Wan's own weights have no such file."""

from collections.abc import Mapping
from pathlib import Path

from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.layouts import read_json
from avd_jax.convert.saving import write_json
from avd_jax.errors import UserError
from avd_jax.paths import any_path

VIDEO_FILE = "avd_video.json"
_FIELDS = ("frames", "height", "width", "fps")


def write_video_size(folder: str | Path, size: Mapping[str, float]) -> None:
    """Write `frames`, `height`, `width` and `fps` to `folder`, which holds the weights."""
    write_json(any_path(folder) / VIDEO_FILE, {name: size[name] for name in _FIELDS})


def video_size(path: str | Path | None) -> dict[str, float]:
    """Return the size that weights were made for, in the fields that `write_video_size` takes.

    Args:
      path: a folder of weights, that of its transformer, or a file in one of them; None is none.

    Returns:
      An empty dict for weights that do not say.

    Raises:
      UserError: the file is damaged.
    """
    if path is None:
        return {}
    path = any_path(path)
    folder = path.parent if path.is_file() else path
    for place in (folder, *([folder.parent] if folder.name == WAN_DIT.component else [])):
        file = place / VIDEO_FILE
        if file.is_file():
            size = read_json(file)
            for name in _FIELDS:
                value = size.get(name)
                if isinstance(value, bool) or not isinstance(value, (int, float) if name == "fps" else int):
                    raise UserError(f"{file}: {name}={value!r} is no size; restore the file, or remove it")
            return {name: size[name] for name in _FIELDS}
    return {}

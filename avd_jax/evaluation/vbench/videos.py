"""Which videos a suite wants: their folders, their names, and the seed that each is made from."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import Info, Suite


@dataclass(frozen=True)
class Video:
    """One file that the official tool looks for.

    Attributes:
      folder: in which it lies.
      name: of the file.
      prompt: of the suite, after which it is named.
      index: 0, 1, ... among the videos of the prompt.
      row: number of the prompt's entry in the list.
    """

    folder: str
    name: str
    prompt: str
    index: int
    row: int


def folders_of(suite: Suite, dimensions: Iterable[str]) -> dict[str, None]:
    """Return the folders of some dimensions, each once, in the suite's order."""
    return dict.fromkeys(suite.folders[name] for name in dimensions)


def wanted(suite: Suite, info: Info, limits: Mapping[str, int | None]) -> list[Video]:
    """Return every video that the official tool looks for.

    Args:
      suite: which one.
      info: its list of prompts.
      limits: folder -> of how many prompts, the first of the list; None for all.

    Raises:
      UserError: a prompt after which no file can be named, or two of one folder with the same file name.
    """
    videos: dict[tuple[str, str], Video] = {}
    seen: dict[str, dict[str, None]] = {folder: {} for folder in limits}
    for number, row in enumerate(info.rows):
        for folder in folders_of(suite, row.dimensions):
            if folder not in limits or row.prompt in seen[folder]:
                continue
            if limits[folder] is not None and len(seen[folder]) >= limits[folder]:
                continue
            seen[folder][row.prompt] = None
            for index in range(suite.samples_in(folder)):
                video = Video(folder, suite.file_name(row.prompt, index), row.prompt, index, number)
                other = videos.setdefault((folder, video.name), video)
                if other is not video:
                    raise UserError(
                        f"{info.path}: {other.prompt[:60]!r} and another prompt of {folder} begin alike, so that both "
                        f"would be {video.name!r}; get the suite's own list"
                    )
    return list(videos.values())


def video_seed(run_seed: int, prompt: str, index: int) -> int:
    """Return the seed of a video, 0..2^32 - 1: whoever makes it, in whatever order, makes it from the same noise.

    Args:
      run_seed: of the whole export.
      prompt: of the suite, not what it was extended to.
      index: among the videos of the prompt.
    """
    digest = hashlib.sha256(f"{run_seed}\0{index}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")

"""Folders of videos matched with each other: which video of one shows what a video of another shows."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from avd_jax.convert.layouts import read_json
from avd_jax.errors import UserError
from avd_jax.experiments.videos import videos_in

# `file_stem`'s hash of the prompt and what may follow it: the seed, and the hash of the settings.
_OUR_NAME = re.compile(r"(?:\d+_)?(?P<slug>.*)-[0-9a-f]{10}(?:-\d+)?(?:-[0-9a-f]{8})?")
_NUMBERED = re.compile(r"(?P<prompt>.*\S)-\d{1,3}")  # as VBench names its videos


@dataclass(frozen=True)
class Shown:
    """A video and what it shows.

    Attributes:
      file: the video.
      name: of the file below its folder, without the suffix.
      prompt: empty if nobody says.
      seed: None if nobody says.
    """

    file: Path
    name: str
    prompt: str = ""
    seed: int | None = None

    @property
    def text(self) -> str:
        """What to print as the prompt; if nobody says, the file's name tells it."""
        if self.prompt:
            return self.prompt
        last = self.name.rpartition("/")[2]
        if ours := _OUR_NAME.fullmatch(last):
            return ours["slug"].replace("_", " ").strip() or last
        numbered = _NUMBERED.fullmatch(last)
        return numbered["prompt"] if numbered else last


@dataclass
class Row:
    """The videos of several sets that show the same: name of the set -> video."""

    videos: dict[str, Shown] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt."""
        return next((video.prompt for video in self.videos.values() if video.prompt), self._first.text)

    @property
    def seed(self) -> int | None:
        """The seed, if one of the videos says so."""
        return next((video.seed for video in self.videos.values() if video.seed is not None), None)

    @property
    def key(self) -> tuple[str, int | None, str]:
        """What tells this row from the others, whatever the order of the sets and however many there are."""
        return self.text, self.seed, min(video.name for video in self.videos.values()) if self.seed is None else ""

    @property
    def _first(self) -> Shown:
        return next(iter(self.videos.values()))


def read_set(folder: Path) -> list[Shown]:
    """Return the videos below a folder with the prompt and seed that the JSON beside each says.

    Raises:
      UserError: as `videos_in`; or two of them have the same prompt and seed.
    """
    found: list[Shown] = []
    seen: dict[tuple[str, int | None], Path] = {}
    for video in videos_in(folder):
        name = video.file.relative_to(folder).with_suffix("").as_posix()
        shown = with_record(Shown(video.file, name, video.caption))
        other = seen.setdefault((shown.prompt, shown.seed), video.file)
        if shown.seed is not None and other != video.file:
            raise UserError(
                f"{folder}: {other.name} and {video.file.name} have the same prompt and seed; give a folder that holds "
                "the videos of one method"
            )
        if found and found[-1].name == name:
            raise UserError(f"{folder}: {found[-1].file.name} and {video.file.name} have the same name; remove one")
        found.append(shown)
    return found


def with_record(video: Shown) -> Shown:
    """Return a video with the seed that the JSON beside it says."""
    record = video.file.with_suffix(".json")
    seed = read_json(record).get("seed") if record.is_file() else None
    return replace(video, seed=seed) if isinstance(seed, int) else video


def matched(sets: Mapping[str, Sequence[Shown]]) -> list[Row]:
    """Return a row for each thing that is shown, in the order of the first set, then of the others.

    Videos match if prompt and seed are the same. If one of them has no seed, the file name decides, and then the prompt
    alone.
    """
    rows: list[Row] = []
    by_seed: dict[tuple[str, int], Row] = {}
    by_name: dict[str, list[Row]] = defaultdict(list)
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for name, videos in sets.items():
        for video in videos:
            row = by_seed.get((video.prompt, video.seed))
            if row is None or name in row.videos:
                alike = [*by_name[video.name], *(by_prompt[video.prompt] if video.prompt else ())]
                fitting = (row for row in alike if name not in row.videos and None in (row.seed, video.seed))
                row = next(fitting, None)
            if row is None:
                rows.append(row := Row())
            row.videos[name] = video
            if video.seed is not None:
                by_seed[video.prompt, video.seed] = row
            by_name[video.name].append(row)
            if video.prompt:
                by_prompt[video.prompt].append(row)
    return rows

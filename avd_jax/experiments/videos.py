"""Videos with captions in files, and the metrics of each."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from avd_jax.convert.layouts import read_json
from avd_jax.data.captions import VIDEO_SUFFIXES, read_captions
from avd_jax.data.records import check_text, printable
from avd_jax.data.video import read_whole_video
from avd_jax.errors import UserError
from avd_jax.evaluation.suite import measure

CAPTIONS_FILE = "captions.jsonl"
AT_ONCE = 2  # videos that are measured: on two cores 1.4 times as fast as one by one, for twice the memory


@dataclass(frozen=True)
class CaptionedVideo:
    """A file and what it should show; the caption is empty if nobody says."""

    file: Path
    caption: str


def videos_in(folder: Path, captions: Path | None = None) -> list[CaptionedVideo]:
    """Return the videos below a folder in the order of their names.

    Captions come from `captions`, or from `captions.jsonl` in the folder, or from the JSON that scripts/generate.py
    writes beside each video; videos without any are measured as far as that goes.

    Raises:
      UserError: there is no such folder, no video in it, or captions that cannot be read or name no file, or a name
        or a prompt that is no UTF-8.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder of videos")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise UserError(f"{folder}: holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))})")
    for file in files:
        check_text(printable(str(file)), "its name", str(file.relative_to(folder)))
    if captions is None and (folder / CAPTIONS_FILE).is_file():
        captions = folder / CAPTIONS_FILE
    if captions is None:
        return [CaptionedVideo(file, _recorded_prompt(file)) for file in files]
    rows = read_captions(captions, folder)
    if part := next((row for row in rows if row.start is not None or row.end is not None), None):
        raise UserError(f"{part.where}: speaks of a part of {part.name}; whole videos are measured, so cut it out")
    texts = {row.name: row.caption for row in rows}
    missing = [name for name in texts if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{captions}: names {missing[0]}, which is not in {folder}")
    return [CaptionedVideo(file, texts.get(str(file.relative_to(folder)), "")) for file in files]


def measure_videos(
    videos: Sequence[CaptionedVideo], on_progress: Callable[[int], object] = lambda done: None
) -> list[dict[str, float]]:
    """Return the metrics of each video (see `evaluation.suite.measure`), read from its file.

    Args:
      videos: of which a few are in memory at a time.
      on_progress: called with the number of further videos that are measured.

    Raises:
      UserError: naming a file that cannot be read or measured.
    """
    with ThreadPoolExecutor(AT_ONCE) as threads:
        rows = []
        for row in threads.map(_measured, videos):
            rows.append(row)
            on_progress(1)
        return rows


def _measured(video: CaptionedVideo) -> dict[str, float]:
    pixels, fps = read_whole_video(video.file)
    try:
        return measure(pixels, video.caption, fps=fps)
    except UserError as error:
        raise UserError(f"{video.file}: {error}") from error


def _recorded_prompt(file: Path) -> str:
    record = file.with_suffix(".json")
    if not record.is_file():
        return ""
    prompt = read_json(record).get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f"{record}: has no text 'prompt'; restore it, or give --captions")
    check_text(str(record), "the prompt", prompt)
    return prompt

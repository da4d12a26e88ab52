"""What a call of scripts/encode.py encodes: videos with captions, prompts, or a world of shapes, as one job."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avd_jax.data import world_clips
from avd_jax.data.captions import read_captions, without_caption
from avd_jax.data.encode_sets import encode_prompts, encode_shapes_world, encode_videos
from avd_jax.data.inputs import by_size, check_clip_size, clips_of, read_sizes
from avd_jax.data.prompts import read_prompts
from avd_jax.data.set_finish import WHOLE, Part, Summary
from avd_jax.errors import UserError
from avd_jax.paths import any_path


@dataclass(frozen=True)
class Job:
    """One or more sets to encode.

    Attributes:
      encode: called with what `encode_videos` takes beside clips, folder and size; of prompts without `vae` and
        `batch_size`. Returns folder -> how its set came out.
      records: how many, if none is left out.
      texts: that the user wrote.
      left_out: folder -> reasons, one for each video or row that gives no clip of its set.
    """

    encode: Callable[..., dict[Path, Summary]]
    records: int
    texts: list[str] = field(default_factory=list)
    left_out: dict[Path, list[str]] = field(default_factory=dict)


def world_job(out: str | os.PathLike, clips: int, prompts: int | None, *, style: str | None, **size) -> Job:
    """Return the job of the built-in world; see `encode_shapes_world`, None being no prompts, and `painted`."""
    check_clip_size(**{key: size[key] for key in ("frames", "height", "width")}, prefix="--")
    given = {"clips": clips, "prompts": prompts or 0, "style": style or "painted", **size}
    records = clips + len(world_clips.training_prompts(given["prompts"], clips=clips))
    return Job(lambda **how: encode_shapes_world(out, **given, **how), records)


def prompts_job(path: str | os.PathLike, out: str | os.PathLike) -> Job:
    """Return the job of a file of prompts, each different one once."""
    texts = list(dict.fromkeys(read_prompts(path)))
    return Job(lambda **how: {any_path(out): encode_prompts(texts, out, **how)}, len(texts), texts)


def videos_job(
    captions: str | None,
    videos: str | None,
    out: str | os.PathLike,
    *,
    frames: int,
    fps: float,
    height: int,
    width: int,
    sizes: str | None = None,
    clips_per_video: int = 1,
) -> Job:
    """Return the job of a list of captions.

    Args:
      captions: see `read_captions`.
      videos: folder of the videos; None: names are relative to the list's own folder.
      out: folder of the set.
      frames: of each clip.
      fps: frames per second of each clip.
      height: pixels.
      width: pixels.
      sizes: of several sets instead, see `read_sizes`: each lies in `out/480x832`, for the videos whose aspect ratio is
        nearest to it (see `by_size`). A size that no video goes to has none.
      clips_per_video: see `clips_of`.

    Raises:
      UserError: names the line of the list that is wrong, or there is nothing to encode.
    """
    check_clip_size(frames=frames, height=height, width=width, prefix="--")
    folder, out = any_path(captions).parent if videos is None else videos, any_path(out)
    rows = read_captions(captions, folder)
    work, left_out = {}, {}
    chosen_for = by_size(rows, folder, read_sizes(sizes, frames=frames)) if sizes else {(height, width): rows}
    for (height, width), chosen in chosen_for.items():
        size = {"frames": frames, "fps": fps, "height": height, "width": width}
        clips, reasons = clips_of(chosen, folder, **size, clips_per_video=clips_per_video)
        place = out / f"{height}x{width}" if sizes else out
        left_out[place] = reasons
        if clips:
            work[place] = clips, size
    if not work:
        raise UserError(f"{captions or videos}: gives no clip; the first: {next(filter(None, left_out.values()))[0]}")
    if videos is not None:
        where = captions or "a .txt beside it"
        left_out[next(iter(work))] += [f"{name}: has no caption in {where}." for name in without_caption(folder, rows)]

    def encode(**how) -> dict[Path, Summary]:
        return {place: encode_videos(clips, place, **size, **how) for place, (clips, size) in work.items()}

    texts = list(dict.fromkeys(row.caption for row in rows))
    return Job(encode, sum(len(clips) for clips, _ in work.values()), texts, left_out)


def report(
    summaries: Mapping[Path, Summary], part: Part = WHOLE, left_out: Mapping[Path, Sequence[str]] | None = None
) -> str:
    """Return what to tell of the sets: how many records, what was left out and why, and what is still to be done."""
    lines, left_out = [], left_out or {}
    for folder in dict.fromkeys([*summaries, *left_out]):
        summary = summaries.get(folder, Summary(0, {}))
        reasons = [*summary.skipped.values(), *left_out.get(folder, ())]
        if reasons or folder in summaries:
            todo = "" if summary.finished else f"; this is part {part}, --merge makes one set of all"
            if not (summary.finished or summary.written or reasons):
                todo += "; nothing fell to it, a smaller --shard_size gives every machine some"
            lines.append(f"{folder}: {summary.written} written, {len(reasons)} skipped{todo}")
            lines += [f"  skipped {reason}" for reason in reasons]
    return "\n".join(lines)

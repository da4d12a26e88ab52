"""Videos of all prompts of VBench or VBench-2.0, under the names and in the folders that the official tools look for.

Every host makes its share of the videos by itself, on its own devices, and writes them. A video's noise is that of the
export's seed, the suite's prompt and the number of the sample, so that who makes it, and when, changes nothing. Its
record is written first, then the video beside the folders, and at last it is moved into them: they never hold anything
but whole videos. See `manifest.py` for what lies where.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from avd_jax.data.atomic import replacing, write_text
from avd_jax.data.prompts import read_prompts
from avd_jax.data.video import write_video
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench import manifest
from avd_jax.evaluation.vbench.suites import Info, Suite
from avd_jax.evaluation.vbench.videos import Video, video_seed, wanted
from avd_jax.generation.run import Opened, check_writable, environment, open_for, reporting, sample
from avd_jax.generation.sampling import generation_mesh
from avd_jax.generation.settings import MAX_SEED, Job, Settings, to_record
from avd_jax.parallel.hosts import barrier, from_first, is_first, share_of
from avd_jax.parallel.mesh import filled_up

BITS_PER_PIXEL = 0.5  # of films at write_video's quality, from 0.3 to 0.8


@dataclass(frozen=True)
class Export:
    """What is to be made, and where it goes.

    Attributes:
      out: the folder of the export.
      suite, info: whose prompts.
      limits: folder -> of how many prompts, the first; None for all.
      model: its name in the paths.
      seed: of the whole export.
      extended: what each entry of the list is sampled from, in its order; None for the prompts themselves.
      prompt_file: what these were read from, and a hash of them, for the manifest.
    """

    out: Path
    suite: Suite
    info: Info
    limits: Mapping[str, int | None]
    model: str
    seed: int = 0
    extended: Sequence[str] | None = None
    prompt_file: Mapping[str, str] | None = None

    def __post_init__(self):
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed {self.seed}: give a whole number from 0 to {MAX_SEED}")
        if not self.model or self.model in (".", "..") or "/" in self.model:
            raise UserError(f"--name {self.model!r}: give a name of the model that can be a folder's")

    def jobs(self) -> dict[Job, list[Video]]:
        """Return each video to sample with the files that it becomes: a prompt may be in several folders."""
        jobs: dict[Job, list[Video]] = {}
        for video in wanted(self.suite, self.info, self.limits):
            text = video.prompt if self.extended is None else self.extended[video.row]
            jobs.setdefault(Job(text, video_seed(self.seed, video.prompt, video.index)), []).append(video)
        return jobs

    def file(self, video: Video) -> Path:
        """Return where a video goes."""
        return manifest.videos_folder(self.out, self.model) / video.folder / video.name

    def record_file(self, video: Video) -> Path:
        """Return where its record goes."""
        return self.out / "records" / self.model / video.folder / f"{video.name.removesuffix('.mp4')}.json"

    def is_there(self, videos: Sequence[Video]) -> bool:
        """Return whether all files of a job are there; they are whole if they are."""
        return all(self.file(video).is_file() and self.record_file(video).is_file() for video in videos)


def extended_prompts(info: Info, path: str, order: str | None) -> tuple[list[str], dict[str, str]]:
    """Return what each entry of a list is sampled from, and what the manifest says of it.

    Args:
      info: the suite's list.
      path: extended prompts, as many as `order` has, or else as the list has entries, and in that order.
      order: the suite's prompts in the order of `path`; None for the list's.

    Raises:
      UserError: other numbers of prompts, or one that is missing.
    """
    texts = read_prompts(path)
    prompts = read_prompts(order) if order else [row.prompt for row in info.rows]
    if len(texts) != len(prompts):
        raise UserError(
            f"--prompt_file {path}: has {len(texts)} prompts, {order or info.path} has {len(prompts)}; give one for "
            "each of them, or with --prompt_order the suite's prompts in the order of this file"
        )
    digest = hashlib.sha256(json.dumps([prompts, texts]).encode()).hexdigest()[:16]
    about = {"file": str(path), "order": str(order or info.path), "digest": digest}
    if order is None:
        return texts, about
    found = dict(zip(prompts, texts, strict=True))
    missing = next((row.prompt for row in info.rows if row.prompt.strip() not in found), None)
    if missing is not None:
        raise UserError(
            f"--prompt_order {order}: lacks {missing[:60]!r} of {info.path}; give a list with all of its prompts"
        )
    return [found[row.prompt.strip()] for row in info.rows], about


def describe(export: Export, settings: Settings | None, *, seconds: float | None, hosts: int) -> str:
    """Return the plan as text: how many videos, how long, how large.

    Args:
      export: what is to be made.
      settings: of the videos; None if they are not known.
      seconds: that a host takes for a video; None for what an earlier part of the export measured.
      hosts: that share the work.
    """
    jobs, suite = export.jobs(), export.suite
    files = [video for videos in jobs.values() for video in videos]
    todo = sum(not export.is_there(videos) for videos in jobs.values())
    shown = f"{suite.title}: {len(files)} files of {len(jobs)} videos, {len(jobs) - todo} of them there"
    lines = [f"{shown}; in {manifest.videos_folder(export.out, export.model)}"]
    for folder in export.limits:
        prompts = len({video.prompt for video in files if video.folder == folder})
        samples = suite.samples_in(folder)
        names = ", ".join(name for name, other in suite.folders.items() if other == folder)
        lines.append(f"  {folder}: {prompts} prompts x {samples} = {prompts * samples} ({names})")
    if settings is not None:
        sizes = [export.file(video).stat().st_size for video in files[:2000] if export.file(video).is_file()]
        guess = settings.frames * settings.height * settings.width * BITS_PER_PIXEL / 8
        size = sum(sizes) / len(sizes) if sizes else guess
        source = "as those that are there" if sizes else "a guess"
        lines.append(f"{manifest.shape_of({'settings': asdict(settings)})}, {settings.solver}, {settings.steps} steps")
        lines.append(f"disk: {size * len(files) / 1e9:.3g} GB, {size / 1e6:.2g} MB a video ({source})")
    if seconds is None:
        seconds = (manifest.read(export.out) or {}).get("seconds_a_video")
    if seconds is None:
        lines.append("hours: not known; give --seconds_a_video, or make a few with --limit 1, which measures it")
    else:
        hours = todo * seconds / hosts / 3600
        lines.append(f"hours: {hours:.2f} for {todo} videos, {seconds:.3g} s a video on each of {hosts} hosts")
    return "\n".join(lines)


def files_of(export: Export) -> list[dict]:
    """Return every file of an export with its prompts, seed and folder, as JSON takes it."""
    return [
        {"file": str(export.file(video)), "prompt": video.prompt, "sampled_from": job.prompt, "seed": job.seed}
        for job, videos in export.jobs().items()
        for video in videos
    ]


def run(
    export: Export,
    settings: Settings,
    *,
    batch_size: int,
    command: str,
    fsdp: int,
    seq: int | None,
    prompt_cache: str | None,
    vae_gib: float,
    on_start: Callable[[int, int], object] = lambda there, share: None,
    on_progress: Callable[[int], object] = lambda done: None,
    note: Callable[[str], object] = print,
) -> int:
    """Make the videos that are not there yet, on several hosts each its share, and return how many this host made.

    Args:
      export: what.
      settings: how.
      batch_size: videos that a host samples together.
      command: what the user typed.
      fsdp, seq: as for `generation_mesh`, of a host's devices.
      prompt_cache, vae_gib: as for `generate`.
      on_start: called with the number of videos that are there, and that of this host's share.
      on_progress: called with the number of further videos that are done.
      note: gets what the user should know.

    Raises:
      UserError: another export is in the folder, it cannot be written, the hosts do not share it, or as `sample`.
    """
    jobs = export.jobs()
    opened = open_for(settings, [job.prompt for job in jobs])
    about = _begin(export, opened, command)
    there = from_first(np.asarray([export.is_there(videos) for videos in jobs.values()]))
    todo = [job for job, is_there in zip(jobs, there, strict=True) if not is_there]
    mine = share_of(todo)
    on_start(len(jobs) - len(todo), len(mine))
    for text in opened.notes:
        note(text)
    heads, devices = opened.parts.transformer.config.num_heads, jax.local_devices()
    mesh = generation_mesh(len(mine), heads, fsdp=fsdp, seq=seq, devices=devices)
    size = filled_up(min(batch_size, len(mine)), mesh)
    made_with = {"fingerprints": opened.fingerprints, "command": command} | environment(mesh, size)
    ends: list[float] = []
    for job, pixels in sample(opened, mine, mesh=mesh, size=size, prompt_cache=prompt_cache, vae_gib=vae_gib):
        _write(export, settings, job, jobs[job], pixels, made_with)
        ends.append(time.monotonic())
        on_progress(1)
        # While the first batch is written the compiler's time is over, and the second one is under way.
        if len(ends) == 2 * size and is_first():
            seconds = (ends[-1] - ends[size - 1]) / size
            about["seconds_a_video"] = seconds
            _write_manifest(export.out, about)
            hours = seconds * (len(mine) - len(ends)) / 3600
            note(f"{seconds:.3g} s a video, {hours:.2f} hours to go")
    barrier("vbench export")
    if is_first():
        _finish(export, jobs)
    return len(mine)


def _begin(export: Export, opened: Opened, command: str) -> dict:
    """Write what is known before the first video, and return it."""
    info, settings, suite = export.info, opened.settings, export.suite
    listed = {"digest": info.digest, "entries": len(info.rows), "difference": info.other_version}
    about = {
        "suite": suite.name,
        "list": listed,
        "model": export.model,
        "seed": export.seed,
        "prompt_file": None if export.prompt_file is None else dict(export.prompt_file),
        "settings": asdict(settings),
        "settings_digest": settings.digest(opened.fingerprints),
        "fingerprints": opened.fingerprints,
        "prompts": dict(export.limits),
        "command": command,
    }
    about = manifest.continued(export.out, about)
    lines = manifest.commands(suite, export.model, about["prompts"])
    about["official_commands"] = lines
    if is_first():
        check_writable(export.out)
        with reporting(export.out):
            _write_manifest(export.out, about)
            manifest.write_script(export.out, suite, lines)
            for folder in export.limits:
                (manifest.videos_folder(export.out, export.model) / folder).mkdir(parents=True, exist_ok=True)
        _check_letters(export)
    return about


def _write_manifest(out: Path, about: Mapping) -> None:
    write_text(out / manifest.NAME, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _check_letters(export: Export) -> None:
    """Raise a UserError if the disk takes two names for one, as macOS's takes those that differ in case."""
    files = [export.file(video) for videos in export.jobs().values() for video in videos]
    alike: dict[str, Path] = {}
    for file in files:
        other = alike.setdefault(str(file).casefold(), file)
        if other != file and (export.out / manifest.NAME.upper()).exists():
            raise UserError(
                f"{export.out}: this disk takes {other.name!r} and {file.name!r} for one; give another --out"
            )


def _write(
    export: Export, settings: Settings, job: Job, videos: Sequence[Video], pixels: np.ndarray, made_with: Mapping
) -> None:
    partial = export.out / "partial" / f"{job.seed}-{hashlib.sha256(job.prompt.encode()).hexdigest()[:16]}"
    with reporting(export.out):
        for video in videos:
            named = {"suite": export.suite.name, "suite_prompt": video.prompt, "index": video.index}
            record = to_record(settings, job) | named | made_with
            write_text(export.record_file(video), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_video(partial / "0.mp4", pixels, fps=settings.fps)
        for number in range(1, len(videos)):
            with replacing(partial / f"{number}.mp4") as temporary:
                shutil.copyfile(partial / "0.mp4", temporary)
        for number, video in enumerate(videos):
            export.file(video).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / f"{number}.mp4", export.file(video))
        shutil.rmtree(partial, ignore_errors=True)


def _finish(export: Export, jobs: Mapping[Job, Sequence[Video]]) -> None:
    missing = sum(not export.is_there(videos) for videos in jobs.values())
    if missing:
        raise UserError(
            f"--out {export.out}: {missing} videos of other hosts are not on this disk; give a folder that all share"
        )
    shutil.rmtree(export.out / "partial", ignore_errors=True)

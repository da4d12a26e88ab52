"""A run of generation: texts, latents, pixels, files; it resumes where an earlier run of the same command stopped.

Beside `<prompt>-<hash of it>-<seed>-<hash of the settings>.mp4` lies a `.json` with everything that makes the video
again. Other settings or other weights give another name, so nothing is overwritten, and a video that is there is not
made again. The `.json` comes first and the video appears only once it is complete: if a video is there, both are whole.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from avd_jax.data.atomic import write_text
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT, file_stem
from avd_jax.data.tokenizer import TEXT_LENGTH
from avd_jax.data.video import contact_sheet, read_video, write_video
from avd_jax.errors import UserError
from avd_jax.generation.pipeline import LatentsShape, latents_shape
from avd_jax.generation.prompt_cache import PromptCache, cache_key
from avd_jax.generation.sampling import sample_videos
from avd_jax.generation.settings import Job, Settings, to_record
from avd_jax.generation.weights import Parts, open_parts
from avd_jax.models.low_bit import check_device
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.parallel.hosts import from_first, is_first
from avd_jax.parallel.memory import fitting
from avd_jax.parallel.mesh import filled_up
from avd_jax.paths import any_path, is_bucket

SHEET_ROWS = 12
THUMBNAIL_HEIGHT = 160
_PACKAGES = ("avd_jax", "jax", "jaxlib", "flax", "av")


@dataclass(frozen=True)
class Opened:
    """Weights opened for some settings; everything that can be checked before the work has been.

    Attributes:
      settings: of all videos.
      parts: opened weights.
      fingerprints: component -> what identifies its weights.
      shape: (F, H, W, C) of the latents of a video.
      notes: what the user should know: prompts that are cut.
    """

    settings: Settings
    parts: Parts
    fingerprints: dict[str, str]
    shape: LatentsShape
    notes: list[str]


@dataclass(frozen=True)
class Plan(Opened):
    """What there is to do.

    Attributes:
      videos: every video that is asked for -> its file.
      todo: those that are not there yet.
    """

    videos: dict[Job, Path]
    todo: list[Job]


def open_for(settings: Settings, texts: Sequence[str], *, fingerprints: Mapping[str, str] | None = None) -> Opened:
    """Open the weights.

    Args:
      settings: from `resolve` or `from_record_file`.
      texts: the prompts.
      fingerprints: what the weights must be, to make a video again; None for any.

    Raises:
      UserError: weights that are missing or do not fit, a size that the networks cannot make, or devices without
        numbers of the settings' weights_dtype.
    """
    if settings.weights_dtype:
        check_device(settings.weights_dtype, jax.devices()[0])
    parts = open_parts(settings)
    configs = {"dit": parts.transformer.config, "vae": parts.vae.config}
    shape = latents_shape(frames=settings.frames, height=settings.height, width=settings.width, **configs)
    found = parts.fingerprints()
    for component, expected in (fingerprints or {}).items():
        if found.get(component) != expected:
            source = settings.checkpoint if settings.checkpoint and component == "transformer" else settings.weights
            raise UserError(f"{source}: this is not the {component} that made the video; name the same weights")
    notes: list[str] = []
    if settings.negative_prompt not in (None, WAN_NEGATIVE_PROMPT):
        texts = [*texts, settings.negative_prompt]
    parts.tokenizer.tell_what_is_cut(texts, min(TEXT_LENGTH, parts.transformer.config.text_len), notes.append)
    return Opened(settings, parts, found, shape, notes)


def make_plan(
    settings: Settings, jobs: Sequence[Job], out: Path, *, fingerprints: Mapping[str, str] | None = None
) -> Plan:
    """Open the weights and see what is missing in `out`.

    Args:
      settings: from `resolve` or `from_record_file`.
      jobs: the videos, each once.
      out: folder for the files; it need not be there yet. On several hosts it is on a disk that all of them share.
      fingerprints: what the weights must be, to make a video again; None for any.

    Raises:
      UserError: weights that are missing or do not fit, or a size that the networks cannot make.
    """
    out = any_path(out)
    opened = open_for(settings, [job.prompt for job in jobs], fingerprints=fingerprints)
    videos = {job: video_file(out, opened, job) for job in jobs}
    missing = [not (video.is_file() and _record_of(video).is_file()) for video in videos.values()]
    todo = [job for job, lacks in zip(videos, from_first(np.asarray(missing)), strict=True) if lacks]
    return Plan(**vars(opened), videos=videos, todo=todo)


def video_file(out: Path, opened: Opened, job: Job) -> Path:
    """Return the file of a video: its name says prompt, seed, and by a hash settings and weights."""
    return out / f"{file_stem(job.prompt, job.seed)}-{opened.settings.digest(opened.fingerprints)}.mp4"


def generate(
    plan: Plan,
    *,
    mesh: Mesh,
    batch_size: int,
    command: str,
    prompt_cache: str | Path | None = None,
    vae_gib: float = MEMORY_GIB,
    on_progress: Callable[[int], object] = lambda done: None,
    on_step: Callable[[], object] | None = None,
) -> None:
    """Make the videos that are to do, and contact sheets of all. On several hosts all work, and the first one writes.

    Args:
      plan: from `make_plan`.
      mesh: its data and fsdp axes share out each batch, its fsdp axis the transformer's parameters, its seq axis a
        video's tokens.
      batch_size: videos to sample together, rounded up to a multiple of the mesh's batch shards. One program serves
        all batches; the last is filled up and the surplus dropped.
      command: what the user typed, for the record.
      prompt_cache: folder in which the prompts' embeddings are kept for other calls; None or an empty text: nowhere.
      vae_gib: GiB of a device that decoding may take, in as many tiles as that needs.
      on_progress: called with the number of further videos that are done.
      on_step: called after every denoising step of a batch, `steps` times in all, from another thread.

    Raises:
      UserError: a folder that cannot be written, a full disk, a size that does not fit into memory, or values that are
        not finite.
    """
    settings, videos, todo = plan.settings, plan.videos, plan.todo
    if todo and is_first():
        check_writable(videos[todo[0]].parent)
    size = filled_up(min(batch_size, len(todo)), mesh)
    made_with = {"fingerprints": plan.fingerprints, "command": command} | environment(mesh, size)
    work = {"mesh": mesh, "size": size, "prompt_cache": prompt_cache, "vae_gib": vae_gib, "on_step": on_step}
    for job, pixels in sample(plan, todo, **work):
        if is_first():
            write_with_record(videos[job], pixels, settings, job, made_with)
        on_progress(1)
    if is_first():
        _write_sheets(plan)


def sample(
    opened: Opened,
    jobs: Sequence[Job],
    *,
    mesh: Mesh,
    size: int,
    prompt_cache: str | Path | None = None,
    vae_gib: float = MEMORY_GIB,
    on_step: Callable[[], object] | None = None,
) -> Iterator[tuple[Job, np.ndarray]]:
    """Yield each job with its video [F H W 3], nominally in [-1, 1].

    Args:
      opened: from `open_for`, or a plan.
      jobs: what to make.
      mesh, prompt_cache, vae_gib, on_step: as for `generate`.
      size: videos to sample together, a multiple of the mesh's batch shards.

    Raises:
      UserError: a size that does not fit into memory, or values that are not finite.
    """
    if not jobs:
        return
    settings, cache = opened.settings, None
    if prompt_cache:
        made_by = {"tokenizer": opened.fingerprints["tokenizer"], "dtype": settings.dtype}
        cache = PromptCache(any_path(prompt_cache), cache_key(opened.parts.text_encoder, **made_by))
    what = f"{settings.frames} frames of {settings.height}x{settings.width}, {size} at once"
    with fitting(what, "give smaller --frames, --height, --width or --batch_size", mesh):
        work = {"mesh": mesh, "size": size, "cache": cache, "on_step": on_step, "vae_gib": vae_gib}
        yield from sample_videos(settings, opened.parts, opened.shape, jobs, **work)


def write_with_record(video: Path, pixels: np.ndarray, settings: Settings, job: Job, made_with: Mapping) -> None:
    """Write a video, and before it the record beside it: what `to_record` says, and what it was made with."""
    with reporting(video):
        record = json.dumps(to_record(settings, job) | made_with, indent=2, ensure_ascii=False)
        write_text(_record_of(video), record + "\n")
        write_video(video, pixels, fps=settings.fps)


def check_writable(out: Path) -> None:
    """Make the folder and try it: better known now than after minutes of work."""
    with reporting(out):
        if is_bucket(out):
            (out / ".writable").write_bytes(b"")
            (out / ".writable").unlink(missing_ok=True)  # another host may have done so
            return
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def steps(plan: Plan, *, mesh: Mesh, batch_size: int) -> int:
    """Return how many denoising steps of a batch `generate` makes."""
    size = filled_up(min(batch_size, len(plan.todo)), mesh)
    return -(-len(plan.todo) // size) * plan.settings.steps if plan.todo else 0


def environment(mesh: Mesh, size: int) -> dict:
    """Return what a record says of where its video was made, in batches of `size`."""
    devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
    versions = {name: _version(name) for name in _PACKAGES}
    return {"versions": versions, "devices": devices, "mesh": dict(mesh.shape), "batch_size": size}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # the code is on PYTHONPATH


class _Thumbnails(Sequence):
    """Videos of a sheet, each read back small only when it is drawn."""

    def __init__(self, videos: Sequence[Path], settings: Settings):
        self._videos, self._settings = videos, settings

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> np.ndarray:
        settings = self._settings
        width = round(THUMBNAIL_HEIGHT * settings.width / settings.height)
        size = {"frames": settings.frames, "fps": settings.fps, "height": THUMBNAIL_HEIGHT, "width": width}
        try:
            return read_video(self._videos[index], **size)
        except UserError:
            again = "remove it, and the same command makes it again"
            raise UserError(f"{self._videos[index]}: cannot be read for the contact sheet; {again}") from None


def _write_sheets(plan: Plan) -> None:
    """Write one PNG for every few videos, named by a hash of their names, if it is not there yet."""
    jobs = list(plan.videos)
    for first in range(0, len(jobs), SHEET_ROWS):
        rows = jobs[first : first + SHEET_ROWS]
        files = [plan.videos[job] for job in rows]
        digest = hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest()[:8]
        sheet = files[0].with_name(f"sheet-{digest}.png")
        if sheet.is_file() and set(plan.todo).isdisjoint(rows):
            continue
        captions = [f"{job.prompt} (seed {job.seed})" for job in rows]
        with reporting(sheet):
            contact_sheet(_Thumbnails(files, plan.settings), sheet, captions, thumbnail_height=THUMBNAIL_HEIGHT)


def _record_of(video: Path) -> Path:
    return video.with_suffix(".json")


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an error of the system while `path` is written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error

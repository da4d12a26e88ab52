"""A run of generation: texts, latents, pixels, files; it resumes where an earlier run of the same command stopped.

Beside `<prompt>-<hash of it>-<seed>-<hash of the settings>.mp4` lies a `.json` with everything that makes the video
again. Other settings or other weights give another name, so nothing is overwritten, and a video that is there is not
made again. The `.json` comes first and the video appears only once it is complete: if a video is there, both are whole.
"""

import gc
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from avd_jax.convert.weights import load_module, lossless_dtype
from avd_jax.data.atomic import write_text
from avd_jax.data.encoding import text_encoder, video_decoder
from avd_jax.data.latents import pad_prompt_embeds
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT, file_stem
from avd_jax.data.tokenizer import TEXT_LENGTH
from avd_jax.data.video import contact_sheet, read_video, write_video
from avd_jax.errors import UserError
from avd_jax.generation.pipeline import (
    HalfRateSampling,
    LatentsShape,
    StudentSampler,
    latents_shape,
    make_teacher_sampler,
    sample_keys,
)
from avd_jax.generation.settings import Job, Settings, to_record
from avd_jax.generation.weights import Parts, open_parts
from avd_jax.models.functional import denoiser
from avd_jax.models.placement import Placement
from avd_jax.parallel.memory import fitting
from avd_jax.parallel.mesh import BATCH_AXES, batch_sharding, filled_up, replicated
from avd_jax.parallel.rules import spec_for
from avd_jax.paths import local_path

SHEET_ROWS = 12
THUMBNAIL_HEIGHT = 160
_PACKAGES = ("avd_jax", "jax", "jaxlib", "flax", "av")


@dataclass(frozen=True)
class Plan:
    """What there is to do; everything that can be checked before the work has been.

    Attributes:
      settings: of all videos.
      parts: opened weights.
      fingerprints: component -> what identifies its weights.
      shape: (F, H, W, C) of the latents of a video.
      videos: every video that is asked for -> its file.
      todo: those that are not there yet.
      notes: what the user should know: prompts that are cut.
    """

    settings: Settings
    parts: Parts
    fingerprints: dict[str, str]
    shape: LatentsShape
    videos: dict[Job, Path]
    todo: list[Job]
    notes: list[str]


def make_plan(
    settings: Settings, jobs: Sequence[Job], out: Path, *, fingerprints: Mapping[str, str] | None = None
) -> Plan:
    """Open the weights and see what is missing in `out`, a folder that is made.

    Args:
      settings: from `resolve` or `from_record_file`.
      jobs: the videos, each once.
      out: folder for the files.
      fingerprints: what the weights must be, to make a video again; None for any.

    Raises:
      UserError: weights that are missing or do not fit, a size that the networks cannot make, or a folder that cannot
        be written.
    """
    out = local_path(out)
    parts = open_parts(settings)
    configs = {"dit": parts.transformer.config, "vae": parts.vae.config}
    shape = latents_shape(frames=settings.frames, height=settings.height, width=settings.width, **configs)
    found = parts.fingerprints()
    for component, expected in (fingerprints or {}).items():
        if found.get(component) != expected:
            source = settings.checkpoint if settings.checkpoint and component == "transformer" else settings.weights
            raise UserError(f"{source}: this is not the {component} that made the video; name the same weights")
    digest = settings.digest(found)
    videos = {job: out / f"{file_stem(job.prompt, job.seed)}-{digest}.mp4" for job in jobs}
    todo = [job for job, video in videos.items() if not (video.is_file() and _record_of(video).is_file())]
    with _reporting(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # better known now than after minutes of work
            pass
    notes: list[str] = []
    texts = [job.prompt for job in jobs]
    if settings.negative_prompt not in (None, WAN_NEGATIVE_PROMPT):
        texts.append(settings.negative_prompt)
    parts.tokenizer.tell_what_is_cut(texts, min(TEXT_LENGTH, parts.transformer.config.text_len), notes.append)
    return Plan(settings, parts, found, shape, videos, todo, notes)


def generate(
    plan: Plan,
    *,
    mesh: Mesh,
    batch_size: int,
    command: str,
    on_progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Make the videos that are to do, and contact sheets of all.

    Args:
      plan: from `make_plan`.
      mesh: its data and fsdp axes share out each batch, its fsdp axis the transformer's parameters.
      batch_size: videos to sample together, rounded up to a multiple of the mesh's batch shards. One program serves
        all batches; the last is filled up and the surplus dropped.
      command: what the user typed, for the record.
      on_progress: called with the number of further videos that are done.

    Raises:
      UserError: a full disk, a size that does not fit into memory, or values that are not finite.
    """
    settings, videos, todo = plan.settings, plan.videos, plan.todo
    size = filled_up(min(batch_size, len(todo)), mesh)
    made_with = {"fingerprints": plan.fingerprints, "command": command} | _environment(mesh, size)
    what = f"{settings.frames} frames of {settings.height}x{settings.width}, {size} at once"
    with fitting(what, "give smaller --frames, --height, --width or --batch_size", mesh):
        for job, pixels in _sample(plan, mesh, size) if todo else ():
            with _reporting(videos[job]):
                record = json.dumps(to_record(settings, job) | made_with, indent=2, ensure_ascii=False)
                write_text(_record_of(videos[job]), record + "\n")
                write_video(videos[job], pixels, fps=settings.fps)
            on_progress(1)
    _write_sheets(plan)


def _sample(plan: Plan, mesh: Mesh, size: int) -> Iterator[tuple[Job, np.ndarray]]:
    """Yield each job that is to do with its video [F H W 3], nominally in [-1, 1]."""
    settings, parts, shape, jobs = plan.settings, plan.parts, plan.shape, plan.todo
    texts = _encode_texts(settings, parts, jobs)
    gc.collect()  # the text encoder is larger than the transformer, and its modules are cycles of references
    dtype = jnp.dtype(settings.dtype)
    dit = load_module(parts.transformer, dtype, lambda path, leaf: NamedSharding(mesh, spec_for(path, leaf, mesh)))
    # The VAE is float32, as Wan runs it.
    decode = video_decoder(load_module(parts.vae, jnp.float32, lambda path, leaf: replicated(mesh)))
    dit.placement = Placement(mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq")
    network, params = denoiser(dit)

    def padded(text: str) -> np.ndarray:
        return pad_prompt_embeds(texts[text], parts.transformer.config.text_len)

    def conditions(embeds: np.ndarray, sharding: NamedSharding) -> dict:
        return jax.device_put({"prompt_embeds": embeds}, sharding)

    if settings.solver == "student":
        half_rate = None
        if settings.half_rate_steps:
            interpolator = load_module(parts.interpolator, dtype, lambda path, leaf: replicated(mesh))
            half_rate = HalfRateSampling(settings.half_rate_steps, settings.half_rate_positions, interpolator)
        sampler = StudentSampler(network, shape, timesteps=settings.timesteps, half_rate=half_rate)
        negative = ()
    else:
        guidance = {"shift": settings.shift, "guidance_scale": settings.guidance_scale}
        sampler = make_teacher_sampler(network, shape, num_steps=settings.steps, **guidance)
        negative = (conditions(padded(settings.negative_prompt), replicated(mesh)),)

    def start(batch: list[Job]) -> jax.Array:
        rows = batch + batch[-1:] * (size - len(batch))
        keys = jax.device_put(sample_keys([job.seed for job in rows]), batch_sharding(mesh))
        texts = conditions(np.stack([padded(job.prompt) for job in rows]), batch_sharding(mesh))
        return decode(sampler(params, keys, texts, *negative))

    batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    running = start(batches[0])
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        # The device works on the next batch while this one is written.
        done, running = running, start(following) if following else None
        for row, job in enumerate(batch):
            pixels = np.asarray(done[row])
            if not np.isfinite(pixels).all():
                raise UserError(
                    f"{job.prompt[:60]!r}, seed {job.seed}: not finite; try --dtype float32, or check the weights"
                )
            yield job, pixels


def _encode_texts(settings: Settings, parts: Parts, jobs: Sequence[Job]) -> dict[str, np.ndarray]:
    """Return text -> embeddings [L_i text_dim] of its own tokens; the text encoder is freed on return."""
    texts = dict.fromkeys(job.prompt for job in jobs)
    if settings.negative_prompt is not None:
        texts[settings.negative_prompt] = None
    dtype = jnp.dtype(settings.dtype)
    umt5 = load_module(parts.text_encoder, dtype, param_dtype=lossless_dtype(parts.text_encoder, dtype))
    encoder = text_encoder(umt5, parts.tokenizer)
    # One at a time: a batch's last bits would depend on what else the run generates.
    return {text: encoder.encode([text])[0] for text in texts}


def _environment(mesh: Mesh, size: int) -> dict:
    devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
    versions = {name: _version(name) for name in _PACKAGES}
    return {"versions": versions, "devices": devices, "batch_size": size}


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
        return read_video(
            self._videos[index], frames=settings.frames, fps=settings.fps, height=THUMBNAIL_HEIGHT, width=width
        )


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
        with _reporting(sheet):
            contact_sheet(_Thumbnails(files, plan.settings), sheet, captions, thumbnail_height=THUMBNAIL_HEIGHT)


def _record_of(video: Path) -> Path:
    return video.with_suffix(".json")


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error

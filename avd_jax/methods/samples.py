"""Sample videos of a run: the student's for fixed prompts, each beside the teacher's for the same prompt and noise.

Every host samples and decodes, so that all know the same; the first one writes.
"""

import hashlib
import json
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from avd_jax import convert
from avd_jax.data.atomic import replacing
from avd_jax.data.encoding import video_decoder
from avd_jax.data.latents import EncodedSet, LatentsInfo, pad_prompt_embeds
from avd_jax.data.mixture import named_sets
from avd_jax.data.prompts import file_stem
from avd_jax.data.video import contact_sheet, write_video
from avd_jax.errors import UserError
from avd_jax.evaluation.suite import measure
from avd_jax.generation.pipeline import HalfRateSampling, StudentSampler, make_teacher_sampler, sample_keys
from avd_jax.methods.meters import Meters
from avd_jax.methods.students import Student
from avd_jax.methods.transformers import as_conditions
from avd_jax.models.functional import Denoiser, Params
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.hosts import from_first, is_first, to_host
from avd_jax.parallel.memory import fitting
from avd_jax.parallel.mesh import filled_up, replicated
from avd_jax.paths import on_disk
from avd_jax.training.method import Frozen, Surroundings


class SampleWriter:
    """Writes `samples/step_<n>/*.mp4` and a contact sheet `samples/step_<n>.png`; feeds TensorBoard and the meters."""

    def __init__(
        self,
        config,
        student: Student,
        teacher: Denoiser,
        teacher_parts: Mapping[str, Frozen],
        model: WanDiTConfig,
        info: LatentsInfo,
        mesh: Mesh,
        surroundings: Surroundings,
        frozen: Mapping,
        meters: Meters,
    ):
        """Choose the prompts and compile the samplers; the teacher's latents are made once and kept in the workdir.

        Args:
          config: of `config.FIELDS`.
          student: how it is run.
          teacher: its network.
          teacher_parts: `teacher` and `negative`, loaded for the teacher's samples if the run does not hold them.
          model: sizes of both.
          info: of the first set of latents: the size and frame rate of samples.
          mesh: to sample on.
          surroundings: where to write.
          frozen: what the run holds.
          meters: which are fed with every sample.
        """
        self._config, self._info, self._writer, self._meters = config, info, surroundings.writer, meters
        self._folder = surroundings.workdir / "samples"
        self._captions, embeds = _first_prompts(config, model.text_len)
        rows = np.arange(filled_up(len(self._captions), mesh)) % len(self._captions)  # a share for every shard
        self._keys, self._conditions = sample_keys(rows), as_conditions(embeds[rows])
        self._decode = _decoder(config, mesh)
        half_rate = None
        if student.half_rate_steps:
            module = student.interpolator.module(frozen["interpolator"])
            half_rate = HalfRateSampling(student.half_rate_steps, student.half_rate_positions, module)
        self._mesh = mesh
        self._student = StudentSampler(
            student.network, student.shape, timesteps=student.timesteps, half_rate=half_rate, mesh=mesh
        )
        self._teacher_videos = None
        if config.sample.teacher_steps:
            self._teacher_videos = self._decode(self._teacher_latents(teacher, teacher_parts, frozen))
        self._teacher_rows = self._measure(self._teacher_videos or [], self._captions)
        clips = EncodedSet(named_sets(config.data.latents)[0].path, "latents")
        real = [clips[i] for i in range(min(len(self._captions), len(clips)))]
        videos = self._decode(np.stack([clip["latents"] for clip in real]).astype(np.float32))
        self._real_rows = self._measure(videos, [clip["caption"] for clip in real])
        meters.expect_samples(self._real_rows[0])

    def write(self, step: int, params: Params) -> None:
        """Sample the student with the parameters that it has at `step`."""
        videos = self._decode(self._first(self._student(params, self._keys, self._conditions)))
        fps, name = self._info.fps, f"step_{step:06d}"
        rows, labels = [], []
        for i, (caption, video) in enumerate(zip(self._captions, videos, strict=True)):
            if is_first():
                write_video(self._folder / name / f"{i}_{file_stem(caption)}.mp4", video, fps=fps)
            self._writer.video(f"samples/{i}", step, video, fps)
            rows.append(video)
            labels.append(f"student, step {step}: {caption}")
            if self._teacher_videos is not None:
                rows.append(self._teacher_videos[i])
                labels.append(f"teacher, {self._config.sample.teacher_steps}x2 steps: {caption}")
        if is_first():
            contact_sheet(rows, self._folder / f"{name}.png", captions=labels)
        rows = self._measure(videos, self._captions)
        self._writer.record(step, self._meters.after_samples(step, rows, self._teacher_rows, self._real_rows))
        self._writer.message(f"samples of step {step}: {self._folder / name}.png")

    def _first(self, latents: jax.Array) -> np.ndarray:
        """Return the latents of the prompts, without those that fill the shards up."""
        return to_host(latents)[: len(self._captions)]

    def _measure(self, videos: list[np.ndarray], captions: list[str]) -> list[dict[str, float]]:
        fps = self._info.fps
        return [measure(video, caption, fps=fps) for video, caption in zip(videos, captions, strict=False)]

    def _teacher_latents(self, teacher: Denoiser, parts: Mapping[str, Frozen], frozen: Mapping) -> np.ndarray:
        config, sample, shape = self._config, self._config.sample, self._info.latents_shape
        made_with = [config.init_from, config.teacher_dtype, config.guidance_scale, self._captions]
        made_with += [sample.teacher_steps, sample.teacher_shift, shape, *filter(None, [config.init_lora])]
        digest = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:12]
        path = self._folder / f"teacher_latents_{digest}.npy"  # other settings, other latents
        if from_first(path.exists()):
            try:
                with on_disk(path) as local:
                    return np.load(local)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it, it is made again") from error
        self._writer.message(f"sampling the teacher: {len(self._captions)} videos, {sample.teacher_steps}x2 steps each")
        sampler = make_teacher_sampler(
            teacher,
            shape,
            num_steps=sample.teacher_steps,
            shift=sample.teacher_shift,
            guidance_scale=config.guidance_scale,
            mesh=self._mesh,
        )
        params, negative = (frozen[name] if name in frozen else parts[name].load() for name in ("teacher", "negative"))
        latents = self._first(sampler(params, self._keys, self._conditions, negative))
        if is_first():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, latents)
        return latents


def _first_prompts(config, text_len: int) -> tuple[list[str], np.ndarray]:
    """Return the first prompts of the run's first set and their embeddings [N text_len text_dim]."""
    kind, text = ("prompts", "text") if config.data.prompts else ("latents", "caption")
    prompts = EncodedSet(named_sets(config.data.prompts or config.data.latents)[0].path, kind)
    records = [prompts[i] for i in range(min(config.sample.prompts, len(prompts)))]
    embeds = [pad_prompt_embeds(record["prompt_embeds"], text_len) for record in records]
    return [record[text] for record in records], np.stack(embeds)


def own_device(mesh: Mesh, process: int) -> Mesh:
    """Return a mesh of the first device of `mesh` that belongs to a process.

    TPU compilers take programs for one device or for a whole slice, and refuse those for some of its devices.
    """
    return Mesh(np.array([device for device in mesh.devices.flat if device.process_index == process][:1]), ("one",))


def _decoder(config, mesh: Mesh):
    """Return a function from latents [N F h w C] to videos [N F H W 3]; the VAE is on a device only while it runs.

    Every host decodes all videos, since it looks at all of them.
    """
    try:
        vae = convert.load_vae(config.sample.vae or config.init_from)
    except UserError as error:
        raise UserError(f"config.sample.vae: {error}; or set sample_every=0 to train without samples") from error
    graphdef, state = nnx.split(vae)
    own = own_device(mesh, jax.process_index())
    run = video_decoder(nnx.merge(graphdef, jax.device_get(state)), memory_gib=config.sample.vae_gib)

    def decode(latents: np.ndarray) -> list[np.ndarray]:
        what = f"decoding samples of {'x'.join(map(str, latents.shape[1:4]))} latents"
        with fitting(what, "set config.sample.vae_gib lower, or sample_every=0 to train without samples", own):
            return [np.asarray(run(jax.device_put(one[None], replicated(own))))[0] for one in latents]

    return decode

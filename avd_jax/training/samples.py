"""Sample videos of a run: the student's for fixed prompts, each beside the teacher's for the same prompt and noise.

Every host samples and decodes, so that all know the same; the first one writes.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax import convert
from avd_jax.data.atomic import replacing
from avd_jax.data.encoding import video_decoder
from avd_jax.data.latents import EncodedSet, pad_prompt_embeds
from avd_jax.data.prompts import file_stem
from avd_jax.data.video import contact_sheet, write_video
from avd_jax.errors import UserError
from avd_jax.evaluation.suite import measure
from avd_jax.generation.pipeline import make_student_sampler, make_teacher_sampler, sample_keys
from avd_jax.parallel.hosts import from_first, is_first, to_host
from avd_jax.parallel.mesh import filled_up
from avd_jax.training.meters import Meters
from avd_jax.training.metrics import MetricsWriter, NoMetrics
from avd_jax.training.run import Run
from avd_jax.training.state import TrainState


class SampleWriter:
    """Writes `samples/step_<n>/*.mp4` and a contact sheet `samples/step_<n>.png`; feeds TensorBoard and the meters."""

    def __init__(self, run: Run, workdir: Path, writer: MetricsWriter | NoMetrics, meters: Meters):
        """Choose the prompts and compile the samplers; the teacher's latents are made once and kept in the workdir."""
        config, shape = run.config, run.info.latents_shape
        self._run, self._writer, self._meters, self._folder = run, writer, meters, workdir / "samples"
        self._captions, embeds = _first_prompts(run, config.sample.prompts)
        rows = np.arange(filled_up(len(self._captions), run.mesh)) % len(self._captions)  # a share for every shard
        self._keys, self._embeds = sample_keys(rows), embeds[rows]
        self._decode = _decoder(config.sample.vae or config.init_from)
        self._student = make_student_sampler(
            run.networks.student, shape, timesteps=config.student.timesteps, half_rate=run.half_rate
        )
        self._teacher_videos = self._decode(self._teacher_latents()) if config.sample.teacher_steps else None
        self._teacher_rows = self._measure(self._teacher_videos or [], self._captions)
        clips = EncodedSet(run.latents_dir, "latents")
        real = [clips[i] for i in range(min(len(self._captions), len(clips)))]
        videos = self._decode(np.stack([clip["latents"] for clip in real]).astype(np.float32))
        self._real_rows = self._measure(videos, [clip["caption"] for clip in real])
        meters.expect_samples(self._real_rows[0])

    def write(self, step: int, state: TrainState) -> None:
        """Sample the student as it is at `step` (its EMA where one is kept)."""
        params = state.generator if state.ema is None else state.ema
        videos = self._decode(self._first(self._student(params, self._keys, self._embeds)))
        fps, name = self._run.info.fps, f"step_{step:06d}"
        rows, labels = [], []
        for i, (caption, video) in enumerate(zip(self._captions, videos, strict=True)):
            if is_first():
                write_video(self._folder / name / f"{i}_{file_stem(caption)}.mp4", video, fps=fps)
            self._writer.video(f"samples/{i}", step, video, fps)
            rows.append(video)
            labels.append(f"student, step {step}: {caption}")
            if self._teacher_videos is not None:
                rows.append(self._teacher_videos[i])
                labels.append(f"teacher, {self._run.config.sample.teacher_steps}x2 steps: {caption}")
        if is_first():
            contact_sheet(rows, self._folder / f"{name}.png", captions=labels)
        rows = self._measure(videos, self._captions)
        self._writer.record(step, self._meters.after_samples(step, rows, self._teacher_rows, self._real_rows))
        self._writer.message(f"samples of step {step}: {self._folder / name}.png")

    def _first(self, latents: jax.Array) -> np.ndarray:
        """Return the latents of the prompts, without those that fill the shards up."""
        return to_host(latents)[: len(self._captions)]

    def _measure(self, videos: list[np.ndarray], captions: list[str]) -> list[dict[str, float]]:
        fps = self._run.info.fps
        return [measure(video, caption, fps=fps) for video, caption in zip(videos, captions, strict=False)]

    def _teacher_latents(self) -> np.ndarray:
        run, sample = self._run, self._run.config.sample
        made_with = [run.config.init_from, run.config.teacher_dtype, run.config.guidance_scale, self._captions]
        made_with += [sample.teacher_steps, sample.teacher_shift, run.info.latents_shape]
        digest = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:12]
        path = self._folder / f"teacher_latents_{digest}.npy"  # other settings, other latents
        if from_first(path.exists()):
            try:
                return np.load(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it, it is made again") from error
        self._writer.message(f"sampling the teacher: {len(self._captions)} videos, {sample.teacher_steps}x2 steps each")
        teacher = make_teacher_sampler(
            run.networks.teacher,
            run.info.latents_shape,
            num_steps=sample.teacher_steps,
            shift=sample.teacher_shift,
            guidance_scale=run.config.guidance_scale,
        )
        negative = run.frozen.negative_prompt_embeds
        latents = self._first(teacher(run.frozen.teacher, self._keys, self._embeds, negative))
        if is_first():
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, latents)
        return latents


def _first_prompts(run: Run, count: int) -> tuple[list[str], np.ndarray]:
    """Return the first prompts of the run's data and their embeddings [N text_len text_dim]."""
    prompts = EncodedSet(run.prompts_dir or run.latents_dir, "prompts" if run.prompts_dir else "latents")
    records = [prompts[i] for i in range(min(count, len(prompts)))]
    embeds = [pad_prompt_embeds(record["prompt_embeds"], run.model_config.text_len) for record in records]
    return [record["text" if run.prompts_dir else "caption"] for record in records], np.stack(embeds)


def _decoder(weights: str):
    """Return a function from latents [N F h w C] to videos [N F H W 3]; the VAE is on the device only while it runs."""
    try:
        vae = convert.load_vae(weights)
    except UserError as error:
        raise UserError(f"config.sample.vae: {error}; or set sample_every=0 to train without samples") from error
    graphdef, state = nnx.split(vae)
    decode = video_decoder(nnx.merge(graphdef, jax.device_get(state)))
    return lambda latents: [np.asarray(decode(jnp.asarray(one)[None]))[0] for one in latents]

"""A run put together from its config: mesh, networks, frozen inputs, data, and the compiled steps."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from avd_jax import convert
from avd_jax.convert.architectures import INTERPOLATOR, WAN_DIT
from avd_jax.convert.weights import load_module, open_weights
from avd_jax.data.encoding import encode_shapes_world, text_encoder, video_encoder
from avd_jax.data.latents import (
    EncodedSet,
    LatentsInfo,
    read_metadata,
    read_negative_prompt_embeds,
    set_fingerprint,
)
from avd_jax.data.pipeline import training_batches
from avd_jax.diffusion.student import check_half_rate
from avd_jax.errors import UserError
from avd_jax.generation.pipeline import HalfRateSampling
from avd_jax.generation.weights import fingerprint
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.hosts import BatchRows, barrier, batch_rows, is_first
from avd_jax.parallel.memory import parameter_sharding
from avd_jax.parallel.mesh import make_mesh, replicated
from avd_jax.parallel.rules import sharding_table
from avd_jax.training.cost import fake_score_updates
from avd_jax.training.networks import Networks, Params, apply_of, make_networks
from avd_jax.training.objectives import Frozen
from avd_jax.training.shipping import write_interpolator
from avd_jax.training.state import Optimizers, TrainState, abstract_state, init_state, make_optimizers
from avd_jax.training.steps import Step, compile_step, make_fake_score_step, make_generator_step


@dataclass(frozen=True)
class Run:
    """Everything that stays the same during a run.

    Attributes:
      config: as given, validated.
      mesh: of all devices.
      rows: those of each global batch that this host reads and holds.
      model_config: sizes of the three networks.
      info: what the latents set holds: the clips' size and frame rate.
      prompts_dir: the set whose first prompts are sampled.
      inputs: field -> what identifies the weights or the set that its path leads to.
      networks, optimizers, frozen: see their classes.
      half_rate: how the student's first steps are made, where not like the others.
      abstract: the state's shapes, dtypes and shardings.
      generator_step, fake_score_step: the compiled updates.
    """

    config: object
    mesh: Mesh
    rows: BatchRows
    model_config: WanDiTConfig
    info: LatentsInfo
    latents_dir: Path
    prompts_dir: Path | None
    inputs: dict[str, str]
    networks: Networks
    optimizers: Optimizers
    frozen: Frozen
    half_rate: HalfRateSampling | None
    abstract: TrainState
    generator_step: Step
    fake_score_step: Step

    def init_state(self) -> TrainState:
        """Start from the teacher's weights."""
        params = _load_params(self.config.init_from, "float32", self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        init = jax.jit(lambda params: init_state(self.config, self.optimizers, params), out_shardings=shardings)
        return init(params)

    def batches(self) -> grain.DatasetIterator:
        """Iterate over the data from its beginning, one batch a cycle (see `training_batches`)."""
        return training_batches(
            self.latents_dir,
            self.prompts_dir,
            batch_size=self.config.batch_size,
            prompt_batches=fake_score_updates(self.config) + 1,
            seed=self.config.seed,
            text_len=self.model_config.text_len,
            rows=self.rows.rows,
        )

    def student_settings(self) -> dict:
        """Return what the student's checkpoints say about how to sample it."""
        config, info = self.config, self.info
        return {
            "timesteps": [float(t) for t in config.student.timesteps],
            "num_steps": len(config.student.timesteps),
            "shift": float(config.score.shift),
            "guidance_scale": float(config.guidance_scale),
            "frames": info.frames,
            "height": info.height,
            "width": info.width,
            "fps": float(info.fps),
            "half_rate_steps": config.half_rate.steps,
            "half_rate_positions": config.half_rate.positions,
        }

    def architecture(self) -> dict:
        """Return the networks' name and sizes, as checkpoints record them."""
        return {"name": "wan_dit", "config": dataclasses.asdict(self.model_config)}


def build_run(config, workdir: Path) -> Run:
    """Check the config against weights, data and devices, and build the run; nothing is compiled yet.

    Raises:
      UserError: naming the field that does not fit.
    """
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size // config.accumulation_steps)
    model_config = convert.dit_config(config.init_from)
    latents_dir, prompts_dir = _data_folders(config, workdir)
    info = _checked_info(latents_dir, model_config, config.init_from)
    if prompts_dir:
        EncodedSet(prompts_dir, "prompts")  # a wrong folder is to be named before the weights are read

    half_rate = _half_rate(config, info, workdir)
    apply, interpolator = apply_of(half_rate.interpolator) if half_rate else (None, None)
    networks, optimizers = make_networks(config, model_config, mesh, apply), make_optimizers(config)
    abstract = abstract_state(config, optimizers, networks.student.abstract_params(), mesh)
    if is_first():
        print(f"mesh {dict(mesh.shape)}", flush=True)
        if table := sharding_table(abstract.generator):
            print(f"large leaves of a network, its moments and its EMA:\n{table}", flush=True)
    negative = read_negative_prompt_embeds(prompts_dir or latents_dir, model_config.text_len)
    frozen = Frozen(
        teacher=_load_params(config.init_from, config.teacher_dtype, mesh, config.teacher_memory),
        negative_prompt_embeds=jax.device_put(jnp.asarray(negative), replicated(mesh)),
        interpolator=jax.device_put(interpolator, replicated(mesh)),
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    generator_step = make_generator_step(config, networks, optimizers)
    fake_score_step = make_fake_score_step(config, networks, optimizers, latents_shape=info.latents_shape)
    return Run(
        config=config,
        mesh=mesh,
        rows=batch_rows(mesh, config.batch_size),
        model_config=model_config,
        info=info,
        latents_dir=latents_dir,
        prompts_dir=prompts_dir,
        inputs=_inputs(config, latents_dir, prompts_dir),
        networks=networks,
        optimizers=optimizers,
        frozen=frozen,
        half_rate=half_rate,
        abstract=abstract,
        generator_step=compile_step(generator_step, shardings, mesh),
        fake_score_step=compile_step(fake_score_step, shardings, mesh),
    )


def _half_rate(config, info: LatentsInfo, workdir: Path) -> HalfRateSampling | None:
    """Open the interpolator, if one is named, and leave a copy with the run, for its student to find."""
    settings = config.half_rate
    if not settings.interpolator:
        return None
    weights, channels = open_weights(settings.interpolator, INTERPOLATOR), info.latents_shape[-1]
    if weights.config.channels != channels:
        raise UserError(
            f"config.half_rate.interpolator={settings.interpolator}: takes latents of {weights.config.channels} "
            f"channels, the set has {channels}; use the one that was trained for this VAE"
        )
    check_half_rate(settings.steps, num_steps=len(config.student.timesteps), frames=info.latents_shape[0])
    interpolator = load_module(weights, jnp.float32)
    if is_first():
        write_interpolator(interpolator, workdir)
    return HalfRateSampling(settings.steps, settings.positions, interpolator) if settings.steps else None


def _inputs(config, latents_dir: Path, prompts_dir: Path | None) -> dict[str, str]:
    weights = fingerprint(open_weights(config.init_from, WAN_DIT, "generator"))
    found = {"init_from": weights, "data.latents": set_fingerprint(latents_dir)}
    if config.half_rate.interpolator:
        found["half_rate.interpolator"] = fingerprint(open_weights(config.half_rate.interpolator, INTERPOLATOR))
    return found | ({"data.prompts": set_fingerprint(prompts_dir)} if prompts_dir else {})


def _load_params(path: str, dtype: str, mesh: Mesh, memory: str = "device") -> Params:
    sharding = partial(parameter_sharding, mesh=mesh, memory=memory)
    dit = convert.load_dit(path, dtype=jnp.dtype(dtype), sharding=sharding)
    return nnx.to_pure_dict(nnx.state(dit))


def _data_folders(config, workdir: Path) -> tuple[Path, Path | None]:
    if config.data.latents:
        return Path(config.data.latents), Path(config.data.prompts) if config.data.prompts else None
    world, weights = config.data.shapes_world, config.init_from
    folder = workdir / "data"
    if is_first():
        encode_shapes_world(
            folder,
            vae=video_encoder(convert.load_vae(weights)),
            text=text_encoder(convert.load_umt5(weights), convert.load_tokenizer(weights)),
            clips=world.clips,
            prompts=world.prompts,
            frames=world.frames,
            fps=world.fps,
            height=world.height,
            width=world.width,
        )
    barrier("shapes_world")
    return folder / "latents", folder / "prompts"


def _checked_info(latents_dir: Path, model: WanDiTConfig, weights: str) -> LatentsInfo:
    info = read_metadata(latents_dir)
    if not isinstance(info, LatentsInfo):
        raise UserError(f"config.data.latents={latents_dir}: is a set of prompts, not of latents")
    *sizes, channels = info.latents_shape
    if channels != model.in_dim or info.text_dim != model.text_dim:
        raise UserError(
            f"config.data.latents={latents_dir}: has {channels} channels and text_dim {info.text_dim}, the model of "
            f"init_from={weights} takes {model.in_dim} and {model.text_dim}; encode the videos with its weights"
        )
    if any(size % patch for size, patch in zip(sizes, model.patch_size, strict=True)):
        raise UserError(
            f"config.data.latents={latents_dir}: the model's patch {model.patch_size} does not divide latents of "
            f"{tuple(sizes)}; encode with a height and width that are multiples of 16"
        )
    return info

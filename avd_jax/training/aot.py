"""The programs of a run, to be compiled ahead of time for devices that are not there (`capacity/compiling.py`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.capacity.compiling import Report, compile_program
from avd_jax.capacity.program import Program
from avd_jax.convert import dit_config
from avd_jax.data.latents import read_metadata
from avd_jax.errors import UserError
from avd_jax.generation.pipeline import LatentsShape, latents_shape, make_student_sampler
from avd_jax.models.attention import check_heads
from avd_jax.models.wan_dit import WAN_MODELS, WanDiTConfig
from avd_jax.models.wan_vae import WanVAE, WanVAEConfig
from avd_jax.parallel.compiler import convolution_options
from avd_jax.parallel.memory import parameter_sharding
from avd_jax.parallel.mesh import BATCH_AXES, filled_up, make_mesh, replicated
from avd_jax.parallel.rules import dotted
from avd_jax.training.networks import Network, make_network, make_networks, make_placement
from avd_jax.training.objectives import Frozen
from avd_jax.training.state import abstract_state, make_optimizers
from avd_jax.training.steps import compile_step, make_fake_score_step, make_generator_step

PROGRAMS = ("generator_step", "fake_score_step", "student_sample", "vae_decode", "forward")


@dataclass(frozen=True)
class Plan:
    """What is to be compiled for.

    Attributes:
      config: of a training run; weights and data need not be there.
      model: sizes of the networks.
      latents_shape: of a clip, (F, H, W, C).
      mesh: of the devices to compile for.
    """

    config: object
    model: WanDiTConfig
    latents_shape: LatentsShape
    mesh: Mesh

    def program(self, name: str) -> Program:
        """Return one of PROGRAMS."""
        return getattr(self, f"_{name}")()

    def _generator_step(self) -> Program:
        batch = {"latents": self._latents(), "caption_embeds": self._embeds(), "prompt_embeds": self._embeds()}
        return self._step("generator_step", make_generator_step(self.config, *self._trained()), batch)

    def _fake_score_step(self) -> Program:
        step = make_fake_score_step(self.config, *self._trained(), latents_shape=self.latents_shape)
        return self._step("fake_score_step", step, {"prompt_embeds": self._embeds()})

    def _trained(self):
        return make_networks(self.config, self.model, self.mesh), make_optimizers(self.config)

    def _step(self, name: str, step: Callable, batch: dict) -> Program:
        networks, optimizers = self._trained()
        state = abstract_state(self.config, optimizers, networks.student.abstract_params(), self.mesh)
        negative = self._array((self.model.text_len, self.model.text_dim), "bfloat16")
        frozen = Frozen(self._params(networks.teacher, memory=self.config.teacher_memory), negative)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=replicated(self.mesh))
        trips = (len(self.config.student.timesteps) - 1) / 2
        return Program(name, compile_step(step, shardings, self.mesh), (state, frozen, batch, key), dynamic_trips=trips)

    def _student_sample(self) -> Program:
        network = make_networks(self.config, self.model, self.mesh).student
        sampler = make_student_sampler(network, self.latents_shape, timesteps=self.config.student.timesteps)
        count = filled_up(self.config.sample.prompts, self.mesh)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=replicated(self.mesh))
        embeds = self._array((count, self.model.text_len, self.model.text_dim), "float32")
        return Program("student_sample", sampler, (self._params(network), keys, embeds))

    def _vae_decode(self) -> Program:
        one = NamedSharding(Mesh(self.mesh.devices.flat[:1], ("one",)), PartitionSpec())
        channels = self.latents_shape[-1]
        config = WanVAEConfig(z_dim=channels, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)
        vae = nnx.eval_shape(lambda: WanVAE(config, nnx.Rngs(0)))
        graphdef, state = nnx.split(vae)
        shaped = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one))
        latents = jax.ShapeDtypeStruct((1, *self.latents_shape), jnp.float32)

        @partial(jax.jit, compiler_options=convolution_options(self.mesh.devices.flat[0].platform))
        def decode(state, latents):
            return nnx.merge(graphdef, state).decode(latents)

        return Program("vae_decode", decode, shaped((state, latents)))

    def _forward(self) -> Program:
        """Return one evaluation of the transformer on one example with half-precision weights."""
        network = make_network(
            self.model,
            dtype="bfloat16",
            param_dtype="bfloat16",
            remat="none",
            placement=make_placement(self.config, self.mesh),
        )
        latents = self._array((1, *self.latents_shape), "float32")
        embeds = self._array((1, self.model.text_len, self.model.text_dim), "bfloat16")
        args = self._params(network), latents, self._array((1,), "float32"), embeds
        return Program("forward", jax.jit(lambda params, *inputs: network(params, *inputs)), args)

    def _params(self, network: Network, *, memory: str = "device"):
        def shaped(keys, leaf):
            sharding = parameter_sharding(dotted(keys), leaf.shape, self.mesh, memory=memory)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(shaped, network.abstract_params())

    def _latents(self) -> jax.ShapeDtypeStruct:
        return self._array((self.config.batch_size, *self.latents_shape), "bfloat16", BATCH_AXES)

    def _embeds(self) -> jax.ShapeDtypeStruct:
        shape = self.config.batch_size, self.model.text_len, self.model.text_dim
        return self._array(shape, "bfloat16", BATCH_AXES)

    def _array(self, shape, dtype: str, *axes) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    def compile(self, name: str, *, topology: str) -> tuple[Report, str]:
        """Compile one of PROGRAMS; see `compile_program`."""
        return compile_program(self.program(name), mesh=self.mesh, batch_size=self.config.batch_size, topology=topology)


def make_plan(config, devices: Sequence[jax.Device], *, frames: int, height: int, width: int) -> Plan:
    """Return what to compile for a training config on some devices.

    Args:
      config: `init_from` and `data.latents` give the sizes where they are set, else `model` and the next arguments do.
      devices: from `tpu_devices`, or real ones.
      frames, height, width: of the videos.

    Raises:
      UserError: naming the field that is missing or that does not fit the devices.
    """
    if config.init_from:
        model = dit_config(config.init_from)
    elif config.model in WAN_MODELS:
        model = WAN_MODELS[config.model]
    else:
        raise UserError(f"config.model={config.model!r}: set it to one of {', '.join(WAN_MODELS)}, or set init_from")
    if config.data.latents:
        shape = read_metadata(Path(config.data.latents)).latents_shape
    else:
        shape = latents_shape(frames=frames, height=height, width=width, dit=model, vae=WanVAEConfig())
    mesh = make_mesh(**config.mesh, batch_size=config.batch_size // config.accumulation_steps, devices=devices)
    check_heads(model.num_heads, mesh.shape["seq"])
    return Plan(config, model, shape, mesh)

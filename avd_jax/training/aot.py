"""The programs of a run compiled ahead of time for devices that are not there: does it fit, and what does it cost.

The TPU compiler is a library that runs on any CPU; what it reports of memory is what the real run will need.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
from avd_jax.parallel.topology import memory_gib
from avd_jax.training.flops import jaxpr_flops
from avd_jax.training.hlo import profile
from avd_jax.training.networks import Network, make_network, make_networks, make_placement
from avd_jax.training.objectives import Frozen
from avd_jax.training.state import abstract_state, make_optimizers
from avd_jax.training.steps import compile_step, make_fake_score_step, make_generator_step

GIB, MIB = 2**30, 2**20

PROGRAMS = ("generator_step", "fake_score_step", "student_sample", "vae_decode", "forward")


@dataclass(frozen=True)
class Program:
    """A program and the shapes and shardings of its arguments.

    Attributes:
      function: jitted.
      dynamic_trips: expected length of the loop whose length is drawn at random (the student's rollout).
    """

    name: str
    function: Callable
    args: tuple
    dynamic_trips: float = 1


@dataclass(frozen=True)
class Report:
    """What the compiler says about one program; GiB and cycles are a device's, FLOPs all devices' together.

    Attributes:
      total_gib: arguments, temporaries, results that reuse no argument, and code.
      flops: of one run, see `training/flops.py`.
      cycles: the compiler's estimate without attention kernels and collectives.
      collective_gib: kind -> GiB.
      fits: whether it compiled, within the limit.
      error: the compiler's message where memory did not suffice; then only the total is known.
    """

    program: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    argument_gib: float | None
    temporary_gib: float | None
    total_gib: float
    limit_gib: float
    fits: bool
    code_mib: float | None
    flops: float
    cycles: int | None
    collective_gib: dict[str, float] = field(default_factory=dict)
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""

    def as_dict(self) -> dict:
        """Return the report as JSON takes it, rounded."""
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return rounded | {"collective_gib": {kind: round(gib, 3) for kind, gib in self.collective_gib.items()}}

    def as_text(self) -> str:
        """Return the report as a few lines for people."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [f"{self.program} on {self.topology}, mesh {mesh}, batch {self.batch_size}: {verdict}"]
        if self.error:
            return f"{lines[0]}\n  memory      {self.total_gib:.2f} GiB a device of {self.limit_gib:g}\n  {self.error}"
        moved = ", ".join(f"{kind} {gib:.2f}" for kind, gib in self.collective_gib.items()) or "none"
        cycles = f"{self.cycles:,} (without attention kernels and collectives)" if self.cycles else "no estimate"
        lines += [
            f"  memory      {self.total_gib:.2f} GiB a device of {self.limit_gib:g}: "
            f"arguments {self.argument_gib:.2f}, temporaries {self.temporary_gib:.2f}, code {self.code_mib:.0f} MiB",
            f"  work        {self.flops:.3e} FLOPs on all devices; {cycles} cycles a device",
            f"  collectives {moved} (GiB a device)",
            f"  compiled in {self.compile_seconds:.0f} s, after {self.trace_seconds:.0f} s of tracing",
        ]
        return "\n".join(lines)


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
        return Program(name, compile_step(step, shardings, self.mesh), (state, frozen, batch, key), trips)

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
        """Compile one of PROGRAMS.

        Returns:
          (report, text): and the compiled HLO, empty where memory did not suffice.

        Raises:
          UserError: the program does not fit the mesh.
        """
        program = self.program(name)
        device = self.mesh.devices.flat[0]
        start = time.monotonic()
        traced = program.function.trace(*program.args)
        lowered = traced.lower(lowering_platforms=(device.platform,))
        trace_seconds = time.monotonic() - start
        about = {
            "program": name,
            "topology": topology,
            "mesh": dict(self.mesh.shape),
            "batch_size": self.config.batch_size,
            "limit_gib": memory_gib(device),
            "flops": jaxpr_flops(traced.jaxpr, dynamic_trips=program.dynamic_trips),
            "trace_seconds": trace_seconds,
        }
        start = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return _does_not_fit(about, error, time.monotonic() - start), ""
        text, seconds = compiled.as_text(), time.monotonic() - start
        memory, found = compiled.memory_analysis(), profile(text, dynamic_trips=program.dynamic_trips)
        code = memory.generated_code_size_in_bytes
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + code) / GIB
        report = Report(
            **about,
            argument_gib=memory.argument_size_in_bytes / GIB,
            temporary_gib=memory.temp_size_in_bytes / GIB,
            total_gib=total,
            fits=total <= about["limit_gib"],
            code_mib=code / MIB,
            cycles=found.cycles or None,
            collective_gib={kind: size / GIB for kind, size in found.collective_bytes.items()},
            compile_seconds=seconds,
        )
        return report, text


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


def _does_not_fit(about: dict, error: Exception, seconds: float) -> Report:
    text = " ".join(str(error).split())
    used = re.search(r"Used ([\d.]+)([KMGT]) of", text)
    if not used:
        raise error
    total = float(used[1]) * 1024 ** ("KMGT".index(used[2]) - 2)
    unknown = {"argument_gib": None, "temporary_gib": None, "code_mib": None, "cycles": None}
    return Report(**about, **unknown, total_gib=total, fits=False, compile_seconds=seconds, error=text[:300])

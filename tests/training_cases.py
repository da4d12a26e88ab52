"""Tiny networks, weights and sets to train on; helpers of the test_training_* and test_scripts_train files."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_cases import write_all

from avd_jax.convert import dit_rules
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.engine import source_shapes
from avd_jax.data import latents as sets
from avd_jax.data.set_writer import SetWriter
from avd_jax.fields import flatten
from avd_jax.losses.adaptive_regression import LossHistory
from avd_jax.methods import adapters, distillation, transformers
from avd_jax.methods.avd import RECIPE, method
from avd_jax.methods.avd.config import default_config
from avd_jax.methods.avd.terms import fake_score_update, generator_update
from avd_jax.methods.students import Student
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.mesh import make_mesh, replicated
from avd_jax.training import assembly, trainer
from avd_jax.training.method import Method, Trained
from avd_jax.training.optimizers import constant
from avd_jax.training.state import TrainState, init_state
from avd_jax.training.update import make_step, passes_of

DIT = WanDiTConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=32, text_dim=16, text_len=8
)
LATENTS_SHAPE = 3, 4, 4, 4


def make_config(**fields):
    """Return the default config in float32 with some fields set; dots in a field's name are written as `__`."""
    config = default_config()
    settings = {"compute_dtype": "float32", "teacher_dtype": "float32", "remat": "none"} | fields
    for name, value in settings.items():
        *parents, leaf = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config


def linear_params(seed: int = 0, channels: int = 4) -> dict:
    """Return parameters of `linear_network`."""
    rng = np.random.default_rng(seed)
    return {
        "mix": jnp.asarray(0.4 * rng.standard_normal((channels, channels)), jnp.float32),
        "time": jnp.asarray(rng.standard_normal(channels), jnp.float32),
        "text": jnp.asarray(rng.standard_normal(channels), jnp.float32),
    }


def linear_network(params, latents, timesteps, conditions):
    """Return a velocity that is linear in everything but the timestep's product with the latents."""
    sigmas = (timesteps / 1000)[:, None, None, None, None]
    prompt_embeds = conditions["prompt_embeds"].astype(jnp.float32)
    text = jnp.mean(prompt_embeds, axis=(1, 2))[:, None, None, None, None]
    return (1 + sigmas) * (latents @ params["mix"]) + sigmas * params["time"] + text * params["text"]


class LinearNetwork:
    """Stands in for the transformer of a run."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *args):
        return linear_network(*args)

    def abstract_params(self):
        return jax.eval_shape(linear_params)


def use_linear_network(setattr: Callable) -> None:
    """Let distillations take a linear network in place of the transformer; `setattr` is that of a MonkeyPatch."""

    def load_params(config, dtype, mesh, memory="device"):
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), replicated(mesh)), linear_params())

    for made_in in (adapters, distillation):
        setattr(made_in, "make_denoiser", LinearNetwork)
    setattr(transformers, "load_params", load_params)


def use_devices(setattr: Callable, count: int, made_in=method) -> None:
    """Let a method run on the first devices only, which compiles faster; `setattr` is that of a MonkeyPatch.

    `made_in` is the module that makes its mesh; by default that of AVD.
    """
    setattr(made_in, "make_mesh", lambda **sizes: make_mesh(**sizes | {"devices": jax.devices()[:count]}))


STEPS = {}
# Of a config, what no update depends on; the rate of a distillation does not depend on num_steps either.
NOT_COMPUTED = {"log_every", "checkpoint_every", "checkpoint.keep", "checkpoint.best_metric"}


def run_method(recipe, config, workdir, **options) -> trainer.Outcome:
    """Train; runs whose updates compute the same share them, so that they are traced and compiled once a process."""
    free = NOT_COMPUTED | ({"num_steps"} if recipe.name in ("avd", "rcm") else set())
    decided = repr(sorted(field for field in flatten(config).items() if field[0] not in free))

    def shared(method, update, make_step=assembly.make_step):
        key = recipe.name, decided, method.mesh, distillation.make_denoiser, update.program
        if key not in STEPS:
            STEPS[key] = make_step(method, update)
        return STEPS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "make_step", shared)
        return trainer.train(recipe, config, workdir, **options)


def train(config, workdir, **options) -> int:
    """Distil, and return the exit status; see `run_method`."""
    return run_method(RECIPE, config, workdir, **options).status


def recording(network: Callable, calls: list, name: str) -> Callable:
    """Return `network` that notes, when it runs, (name, params, latents, timesteps, prompt_embeds, velocity)."""

    def note(*call):
        calls.append((name, *jax.tree.map(np.array, call)))

    def recorded(params, latents, timesteps, conditions):
        velocity = network(params, latents, timesteps, conditions)
        jax.debug.callback(note, params, latents, timesteps, conditions["prompt_embeds"], velocity)
        return velocity

    return recorded


def make_student(config, network=linear_network, interpolator=None) -> Student:
    """Return how a network is run as the student of a config, on samples of LATENTS_SHAPE."""
    return Student(
        network=network,
        timesteps=tuple(config.student.timesteps),
        shape=LATENTS_SHAPE,
        half_rate_steps=config.half_rate.steps,
        half_rate_positions=config.half_rate.positions,
        interpolator=interpolator,
    )


def make_frozen(teacher, negative, **others) -> dict:
    """Return what a distillation holds frozen: the teacher's parameters and the negative prompt's embeddings [L D]."""
    return {"teacher": teacher, "negative": {"prompt_embeds": jnp.asarray(negative)}, **others}


def make_method(
    config, network=linear_network, teacher=linear_network, *, abstract=None, mesh=None, interpolator=None
) -> Method:
    """Return AVD on networks of the tests, without weights and sets; `abstract` are the shapes of the parameters."""
    student, settings = make_student(config, network, interpolator), config.optimizer
    abstract = jax.eval_shape(linear_params) if abstract is None else abstract

    def trained(rate: float, ema_decay: float = 0.0) -> Trained:
        decay = (lambda step: ema_decay) if ema_decay else None
        optimizer = constant(settings, rate)
        return Trained(abstract, lambda shardings: linear_params(), optimizer, decay, optimizer_memory=settings.memory)

    networks = {
        "generator": trained(settings.learning_rate, config.ema_decay),
        "fake_score": trained(settings.fake_score_learning_rate),
    }
    sizes = WanDiTConfig(text_len=8, text_dim=16)
    return Method(
        name="avd",
        main="generator",
        mesh=make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh,
        networks=networks,
        updates=(fake_score_update(config, student), generator_update(config, student, teacher)),
        fields=transformers.encoded_fields(config.batch_size, LATENTS_SHAPE, sizes),
        batches=lambda fresh: iter(()),
        extras={"history": lambda: LossHistory.init(len(config.student.timesteps))},
        accumulation_steps=config.accumulation_steps,
    )


def start_state(method: Method, params) -> TrainState:
    """Return the state of a method whose networks all start from `params`."""
    return init_state(method, dict.fromkeys(method.networks, params))


def steps_of(method: Method) -> dict[str, Callable]:
    """Return the updates of a method as pure functions, by network."""
    return {update.network: make_step(method, update) for update in method.updates}


def generator_loss(config, student, teacher, params, fake_score, frozen, history, batch, keys, stop):
    """Return L_G and what it is made of by name; 0 for what is switched off."""
    size = batch["latents"].shape[0]
    loss, parts = (
        jnp.zeros(()),
        {
            "distribution_matching": jnp.zeros(size),
            "temporal": jnp.zeros(()),
            "regression": jnp.zeros(size),
            "regression_weight": jnp.zeros(size),
            "timestep_index": jnp.zeros(size, jnp.int32),
        },
    )
    given = {"generator": params, "fake_score": fake_score, "history": history, "stop": stop, "keys": keys}
    for one in passes_of(generator_update(config, student, teacher)):
        value, found = one.loss(given | frozen | batch)
        losses = found.pop("regression_losses", None)
        if losses is not None:
            found["timestep_index"] = losses["index"]
        loss, parts = loss + value, parts | found.pop("latent_meters", {}) | found
    return loss, parts


def make_batch(size: int = 4, *, seed: int = 0, shape=LATENTS_SHAPE, text_len: int = 8, text_dim: int = 16) -> dict:
    """Return a batch of the generator's update."""
    rng = np.random.default_rng(seed)
    embeds = rng.standard_normal((2, size, text_len, text_dim)).astype(np.float32)
    return {
        "prompts": {"prompt_embeds": jnp.asarray(embeds[0])},
        "captions": {"prompt_embeds": jnp.asarray(embeds[1])},
        "latents": jnp.asarray(rng.standard_normal((size, *shape)), jnp.float32),
        "canvas": jnp.zeros((size, 0, *shape), jnp.bfloat16),
    }


def write_weights(folder: Path, config: WanDiTConfig = DIT, *, seed: int = 0) -> Path:
    """Write random weights of a transformer in Wan's own layout."""
    rng = np.random.default_rng(seed)
    tensors = {
        key: (rng.standard_normal(shape) * max(np.prod(shape[1:]), 1) ** -0.5).astype(np.float32)
        for key, shape in source_shapes(dit_rules.native_rules(config), WAN_DIT.leaves(config))
    }
    write_all(folder, tensors)
    sizes = {name: getattr(config, name) for name in config.__dataclass_fields__}
    entries = {"_class_name": "WanModel", "model_type": "t2v", **sizes, "patch_size": list(config.patch_size)}
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


def write_sets(folder: Path, *, clips: int = 64, prompts: int = 64, shape=LATENTS_SHAPE, text_dim: int = 16, bad=()):
    """Write a set of latents and one of prompts, random; the latents of the clips in `bad` are not finite.

    Grain takes 15 ms to find a place among seven shuffled records, and a tenth of that among 64.
    """
    rng = np.random.default_rng(0)
    frames, height, width, _ = shape
    sizes = {"text_len": 8, "text_dim": text_dim, "text_encoder": "aaaa"}
    info = sets.LatentsInfo(
        **sizes, frames=4 * frames - 3, height=8 * height, width=8 * width, fps=16.0, latents_shape=shape, vae="bbbb"
    )
    negative = rng.standard_normal((3, text_dim))

    writer = SetWriter(folder / "latents", info, [str(i) for i in range(clips)], inputs_per_shard=100)
    records = [
        sets.latents_record(
            clip_id=str(i),
            caption=f"caption {i}",
            latents=np.full(shape, np.nan) if i in bad else rng.standard_normal(shape),
            prompt_embeds=rng.standard_normal((i % 3 + 1, text_dim)),
            fps=16.0,
            source="",
        )
        for i in range(clips)
    ]
    writer.write_shard(0, records, {})
    writer.finish("", negative)

    writer = SetWriter(
        folder / "prompts", sets.PromptsInfo(**sizes), [str(i) for i in range(prompts)], inputs_per_shard=100
    )
    records = [
        sets.prompts_record(text=f"prompt {i}", prompt_embeds=rng.standard_normal((i % 4 + 1, text_dim)))
        for i in range(prompts)
    ]
    writer.write_shard(0, records, {})
    writer.finish("", negative)
    return folder / "latents", folder / "prompts"


def write_inputs(folder: Path) -> dict[str, str]:
    """Write the weights and the sets that a run takes; the fields of `make_config` that name them."""
    latents, prompts = write_sets(folder)
    return {
        "init_from": str(write_weights(folder / "dit")),
        "data__latents": str(latents),
        "data__prompts": str(prompts),
    }


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """Mount a file system of its own that is soon full."""
    folder.mkdir()
    mounted = os.getuid() == 0 and shutil.which("mount") is not None
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

"""Flow matching: training a WanDiT from scratch, or fine-tuning one, on encoded videos.

    L = |v(xt, t, c) - (noise - x0)|^2,    xt = (1 - sigma) x0 + sigma noise,    t = 1000 sigma

as Wan2.1 itself is trained (arXiv 2503.20314): timesteps are uniform, then shifted. In a share of the examples the
prompt gives way to the negative prompt, the one that guidance subtracts, so that the model knows it.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax.contrib
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from avd_jax import convert
from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.weights import open_weights
from avd_jax.data.encoding import encode_shapes_world, text_encoder, video_encoder
from avd_jax.data.latents import LatentsInfo, read_metadata, read_negative_prompt_embeds, set_fingerprint
from avd_jax.diffusion.flow import add_noise, sample_timesteps, sigma_of_timestep
from avd_jax.errors import UserError, closest
from avd_jax.generation.weights import fingerprint
from avd_jax.losses.distribution_matching import flow_matching_loss
from avd_jax.models.placement import Placement
from avd_jax.models.wan_dit import REMAT_POLICIES, WanDiT, WanDiTConfig
from avd_jax.parallel.hosts import barrier, is_first
from avd_jax.parallel.mesh import BATCH_AXES, batch_shards, make_mesh
from avd_jax.parallel.rules import dotted, spec_for
from avd_jax.training.fitting import SHARED_FIELDS, EncodedBatches, Fit, FitState, build_fit, check_shared, fit
from avd_jax.training.networks import Network, Params, filled, make_network
from avd_jax.training.objectives import example_keys

DATA_FIELDS: dict[str, tuple[object, str]] = {
    "data.latents": ("", "folder of encoded videos (scripts/encode.py --videos)"),
    "data.weights": ("", "without data.latents: folder with VAE, umT5 and tokenizer, to encode moving shapes with"),
    "data.shapes_world.clips": (1200, "and so many clips of them"),
    "data.shapes_world.frames": (17, "video frames a clip, 4n + 1"),
    "data.shapes_world.height": (64, "pixels, a multiple of 16"),
    "data.shapes_world.width": (64, "pixels, a multiple of 16"),
    "data.shapes_world.fps": (16, "frames a second"),
}
MESH_FIELDS: dict[str, tuple[object, str]] = {
    "mesh.data": (-1, "devices along the data axis; -1: all that the others leave"),
    "mesh.fsdp": (1, "devices along the axis that shards parameters and batch"),
    "mesh.seq": (1, "devices along the axis that shards tokens"),
}
FIELDS: dict[str, tuple[object, str]] = {
    "seed": (0, "decides the initial weights, the order of the data and all noise"),
    "num_steps": (10000, "updates in the run; the learning rate falls to zero over them"),
    "batch_size": (16, "examples an update, over all devices"),
    "init_from": ("", "weights to fine-tune, in any layout; empty: a new model of the sizes below"),
    "model.dim": (128, "width of the tokens, without init_from"),
    "model.ffn_dim": (512, "hidden width of the feed-forward layers, without init_from"),
    "model.num_heads": (4, "attention heads, without init_from"),
    "model.num_layers": (4, "blocks, without init_from"),
    "model.patch_size": ((1, 2, 2), "latent frames, rows and columns that make a token, without init_from"),
    "model.text_len": (32, "tokens of a prompt that the model sees, without init_from"),
    **DATA_FIELDS,
    "timestep.shift": (3.0, "timestep shift of the random timesteps"),
    "timestep.min": (0.0, "lower bound of these timesteps, of 1000"),
    "timestep.max": (1000.0, "upper bound of these timesteps, of 1000"),
    "prompt_dropout": (0.1, "share of the examples that see the negative prompt instead of their own"),
    "compute_dtype": ("float32", "dtype of matrix products; masters and moments are float32"),
    "remat": ("none", "what the backward pass keeps of a block: " + ", ".join(REMAT_POLICIES)),
    **MESH_FIELDS,
    **SHARED_FIELDS,
    "optimizer.name": ("adamw", "adamw, or muon for the matrices of the blocks: from scratch, with a higher rate"),
}


def validate(config) -> None:
    """Check what can be checked without files (UserError names the field)."""
    flat = check_shared(config, FIELDS)
    for name, choices in (
        ("compute_dtype", ("float32", "bfloat16")),
        ("remat", tuple(REMAT_POLICIES)),
        ("optimizer.name", ("adamw", "muon")),
    ):
        if flat[name] not in choices:
            raise UserError(
                f"config.{name}={flat[name]!r} must be one of {', '.join(choices)}{closest(flat[name], choices)}"
            )
    if not 0 <= flat["prompt_dropout"] <= 1:
        raise UserError(f"config.prompt_dropout={flat['prompt_dropout']} must be a share, 0 to 1")
    if not 0 <= flat["timestep.min"] <= flat["timestep.max"] <= 1000:
        raise UserError(f"config.timestep.min={flat['timestep.min']} and timestep.max must rise in 0..1000")
    check_data_named(config)


def check_data_named(config) -> None:
    """Raise a UserError where neither `data.latents` nor `data.weights` is given."""
    if not (config.data.latents or config.data.weights):
        raise UserError(
            "config.data.latents is empty: give the folder that scripts/encode.py wrote, or data.weights to encode "
            "moving shapes with"
        )


def pretraining_loss(
    config, network, negative_prompt_embeds, params: Params, batch, key
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of a batch of `latents` [B F H W C] and `caption_embeds` [B L D], and its parts.

    Example b draws from `fold_in(key, b)`: the number of devices changes nothing.
    """
    latents, settings = batch["latents"].astype(jnp.float32), config.timestep
    keys = example_keys(key, jnp.arange(latents.shape[0]))
    draw = partial(sample_timesteps, shift=settings.shift, minimum=settings.min, maximum=settings.max)

    def drawn(key):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, latents.shape[1:])
        return draw(time_key, 1)[0], noise, jax.random.bernoulli(drop_key, config.prompt_dropout)

    timesteps, noise, dropped = jax.vmap(drawn)(keys)
    embeds = jnp.where(dropped[:, None, None], negative_prompt_embeds, batch["caption_embeds"])
    xt = add_noise(x0=latents, noise=noise, sigmas=sigma_of_timestep(timesteps))
    losses = flow_matching_loss(velocity=network(params, xt, timesteps, embeds), x0=latents, noise=noise)
    return jnp.mean(losses), {}


def pretrain(config, workdir: Path) -> tuple[int, FitState, WanDiTConfig]:
    """Train, or go on training, in `workdir`; status and errors as in `fit`."""
    validate(config)
    sizes: list[WanDiTConfig] = []

    def build() -> Fit:
        mesh = batch_mesh(config)
        folder, info = latents_of(config, workdir)
        model = _model_config(config, info, folder)
        sizes.append(model)
        network = make_network(
            model,
            dtype=config.compute_dtype,
            param_dtype="float32",
            remat=config.remat,
            placement=Placement(mesh=mesh, batch_axes=BATCH_AXES, sequence_axis="seq"),
        )
        negative = jnp.asarray(read_negative_prompt_embeds(folder, model.text_len))
        return build_fit(
            config,
            mesh,
            loss=partial(pretraining_loss, config, network, negative),
            abstract_params=network.abstract_params(),
            init_params=partial(_init_params, config, model, mesh),
            matrices=matrices_of_blocks if config.optimizer.name == "muon" else None,
            architecture={"name": "wan_dit", "config": dataclasses.asdict(model)},
            batches=EncodedBatches(folder, config, mesh, text_len=model.text_len),
            inputs=_inputs(config, folder),
        )

    status, state = fit(build, config, workdir, movable=("init_from", "data.latents", "data.weights"))
    return status, state, sizes[0]


def matrices_of_blocks(params: Params) -> Params:
    """Return which axes of each parameter are rows and columns: of the blocks' kernels, None for all others.

    The blocks are stacked along axis 0, and attention's projections have an axis for heads.
    """

    def axes(keys, leaf):
        names = dotted(keys).split(".")
        if names[0] != "blocks" or names[-1] != "kernel":
            return None
        rows = (1, 2) if names[-2] == "o" else (1,)
        return optax.contrib.MuonDimensionNumbers(rows, tuple(range(rows[-1] + 1, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def trained_dit(model: WanDiTConfig, params: Params) -> WanDiT:
    """Return the transformer of `params` as a module."""
    network: Network = make_network(model, dtype="float32", param_dtype="float32", remat="none")
    return nnx.merge(network.graphdef, filled(network.abstract, params))


def _model_config(config, info: LatentsInfo, folder: Path) -> WanDiTConfig:
    channels = info.latents_shape[-1]
    if not config.init_from:
        sizes = {**config.model, "patch_size": tuple(config.model.patch_size)}
        return WanDiTConfig(**sizes, in_dim=channels, out_dim=channels, text_dim=info.text_dim)
    model = convert.dit_config(config.init_from)
    if (model.in_dim, model.text_dim) != (channels, info.text_dim):
        raise UserError(
            f"{folder}: has {channels} channels and text_dim {info.text_dim}, the model of init_from="
            f"{config.init_from} takes {model.in_dim} and {model.text_dim}; encode the videos with its weights"
        )
    return model


def _init_params(config, model: WanDiTConfig, mesh, shardings) -> Params:
    if config.init_from:
        dit = convert.load_dit(
            config.init_from,
            dtype=jnp.float32,
            sharding=lambda name, shape: NamedSharding(mesh, spec_for(name, shape, mesh)),
        )
        return nnx.to_pure_dict(nnx.state(dit))

    def new():
        return nnx.to_pure_dict(nnx.state(WanDiT(model, rngs=nnx.Rngs(config.seed))))

    return jax.jit(new, out_shardings=shardings)()


def _inputs(config, folder: Path) -> dict[str, str]:
    found = {"data.latents": set_fingerprint(folder)}
    if config.init_from:
        found["init_from"] = fingerprint(open_weights(config.init_from, WAN_DIT, "generator"))
    return found


def batch_mesh(config) -> Mesh:
    """Return the mesh of `config.mesh`; raises a UserError where it does not divide `config.batch_size`."""
    mesh = make_mesh(**config.mesh)
    if config.batch_size % batch_shards(mesh):
        raise UserError(f"config.batch_size={config.batch_size} must be a multiple of {batch_shards(mesh)} shards")
    return mesh


def latents_of(config, workdir: Path) -> tuple[Path, LatentsInfo]:
    """Return the set of latents that `config.data` names, encoded now where it is one of moving shapes.

    Raises:
      UserError: the set cannot be read, or holds prompts.
    """
    folder = Path(config.data.latents) if config.data.latents else _encoded_shapes(config, workdir)
    info = read_metadata(folder)
    if not isinstance(info, LatentsInfo):
        raise UserError(f"config.data.latents={folder}: is a set of prompts, not of latents")
    return folder, info


def _encoded_shapes(config, workdir: Path) -> Path:
    world, weights = config.data.shapes_world, config.data.weights
    if is_first():
        encode_shapes_world(
            workdir / "data",
            vae=video_encoder(convert.load_vae(weights)),
            text=text_encoder(convert.load_umt5(weights), convert.load_tokenizer(weights)),
            clips=world.clips,
            prompts=1,
            frames=world.frames,
            fps=world.fps,
            height=world.height,
            width=world.width,
            batch_size=8,
        )
    barrier("shapes_world")
    return workdir / "data" / "latents"

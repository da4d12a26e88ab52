"""Flow matching: training a WanDiT from scratch, or fine-tuning one, on encoded videos.

    L = |v(xt, t, c) - (noise - x0)|^2,    xt = (1 - sigma) x0 + sigma noise,    t = 1000 sigma

as Wan2.1 itself is trained (arXiv 2503.20314): timesteps are uniform, then shifted. In a share of the examples the
prompt is replaced by the negative prompt, the one that guidance subtracts, so that the model knows it.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax.contrib
from flax import nnx

from avd_jax import convert
from avd_jax.convert.networks import DEFAULT
from avd_jax.diffusion.flow import add_noise, sample_timesteps, sigma_of_timestep
from avd_jax.errors import UserError
from avd_jax.losses.distribution_matching import flow_matching_loss
from avd_jax.methods import transformers
from avd_jax.models.attention import check_heads
from avd_jax.models.functional import Denoiser, Params, make_denoiser
from avd_jax.models.wan_dit import WanDiT, WanDiTConfig
from avd_jax.parallel.rules import dotted
from avd_jax.training.method import Method, Term, Trained, Update
from avd_jax.training.optimizers import growing_decay, scheduled


def build(config, *, devices=None, video: Mapping[str, int] | None = None) -> Method:
    """Put the method together; arguments and errors as in `methods/avd/method.py`."""
    mesh = transformers.batch_mesh(config.mesh, config.batch_size, devices)
    model = _model_config(config)
    shapes = transformers.clip_shapes(config.data.latents, video, model)
    check_heads(model.num_heads, mesh.shape["seq"])
    network = make_denoiser(
        model,
        dtype=config.compute_dtype,
        param_dtype="float32",
        remat=config.remat,
        placement=transformers.make_placement(config.attention, mesh),
    )
    matrices = matrices_of_blocks if config.optimizer.name == "muon" else None
    return Method(
        name="flow_matching",
        main="generator",
        mesh=mesh,
        networks={
            "generator": Trained(
                network.abstract_params(),
                partial(_start, config, model, mesh),
                scheduled(config.optimizer, config.num_steps, matrices),
                growing_decay(config.ema_decay),
            )
        },
        frozen={"negative": transformers.negative_conditions(config.data.latents, model, mesh)},
        updates=(_update(config, network),),
        **transformers.encoded_sizes(config.batch_size, shapes, model),
        batches=transformers.encoded_batches(config, mesh, text_len=model.text_len),
        key_of=lambda key, number: key,
        record=lambda: {"architecture": transformers.architecture(model)},
        inputs=partial(_inputs, config),
    )


def losses(
    network: Callable, *, shift: float, minimum: float, maximum: float, prompt_dropout: float
) -> Callable[..., jax.Array]:
    """Return the loss of each example, a function of `generator, latents, captions, negative, keys`, [B].

    Args:
      network: `(params, xt, timesteps, conditions) -> velocity`.
      shift, minimum, maximum: of the random timesteps.
      prompt_dropout: share of the examples that see `negative`, conditions without a batch axis.
    """
    draw = partial(sample_timesteps, shift=shift, minimum=minimum, maximum=maximum)

    def loss(generator: Params, latents, captions, negative, keys) -> jax.Array:
        latents = latents.astype(jnp.float32)

        def drawn(key):
            time_key, noise_key, drop_key = jax.random.split(key, 3)
            noise = jax.random.normal(noise_key, latents.shape[1:])
            return draw(time_key, 1)[0], noise, jax.random.bernoulli(drop_key, prompt_dropout)

        def chosen(none, own):
            return jnp.where(dropped.reshape(-1, *(1,) * none.ndim), none, own)

        timesteps, noise, dropped = jax.vmap(drawn)(keys)
        xt = add_noise(x0=latents, noise=noise, sigmas=sigma_of_timestep(timesteps))
        velocity = network(generator, xt, timesteps, jax.tree.map(chosen, negative, captions))
        return flow_matching_loss(velocity=velocity, x0=latents, noise=noise)

    return loss


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


def trained_dit(method: Method, params: Params) -> WanDiT:
    """Return the transformer of `params`, trained by `method`, as a module in float32."""
    model = WanDiTConfig(**method.record()["architecture"]["config"])
    return make_denoiser(model, dtype="float32", param_dtype="float32", remat="none").module(params)


def _update(config, network: Denoiser) -> Update:
    settings = config.timestep
    loss = losses(
        network,
        shift=settings.shift,
        minimum=settings.min,
        maximum=settings.max,
        prompt_dropout=config.prompt_dropout,
    )
    inputs = ("generator", "latents", "captions", "negative", "keys")
    return Update("total", "generator", (Term("flow_matching", 1.0, inputs, loss),))


def _model_config(config) -> WanDiTConfig:
    """Return the sizes of the weights, or those of a new model for the set, or for Wan's own VAE if there is none."""
    folder = config.data.latents
    channels, text_dim = WanDiTConfig().in_dim, WanDiTConfig().text_dim
    if folder:
        info = transformers.latents_infos(folder)[0]
        channels, text_dim = info.latents_shape[-1], info.text_dim
    if not config.init_from:
        sizes = {**config.model, "patch_size": tuple(config.model.patch_size)}
        return WanDiTConfig(**sizes, in_dim=channels, out_dim=channels, text_dim=text_dim)
    model = convert.dit_config(config.init_from, config.which or DEFAULT)
    if folder and (model.in_dim, model.text_dim) != (channels, text_dim):
        raise UserError(
            f"{folder}: has {channels} channels and text_dim {text_dim}, the model of init_from="
            f"{config.init_from} takes {model.in_dim} and {model.text_dim}; encode the videos with its weights"
        )
    return model


def _start(config, model: WanDiTConfig, mesh, shardings) -> Params:
    if config.init_from:
        return transformers.load_params(config, "float32", mesh)

    def new():
        return nnx.to_pure_dict(nnx.state(WanDiT(model, rngs=nnx.Rngs(config.seed))))

    return jax.jit(new, out_shardings=shardings)()


def _inputs(config) -> dict[str, str]:
    found = transformers.set_fingerprints(config.data.latents)
    if config.init_from:
        found |= transformers.weights_fingerprints(config)
    return found

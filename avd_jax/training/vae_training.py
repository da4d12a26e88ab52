"""Training a WanVAE from scratch on the built-in world of shapes (`data/shapes_world.py`).

    L = |x' - x| + gradient |D x' - D x| + kl KL(q(z | x) || N(0, 1))

with x' decoded from a sample of q, D the differences of neighbouring pixels, and means over all elements. Small random
crops of few frames are enough: the network is convolutional, and a step costs as many times less.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.data import shapes_world
from avd_jax.errors import UserError
from avd_jax.models.vae_layers import AttentionBlock, Downsample, ResidualBlock
from avd_jax.models.wan_vae import RGB, WanVAE, WanVAEConfig
from avd_jax.parallel.mesh import batch_sharding, make_mesh
from avd_jax.training.fields import with_defaults
from avd_jax.training.fitting import SHARED_FIELDS, CountedBatches, Fit, FitState, build_fit, check_shared, fit
from avd_jax.training.networks import Params, filled

FIRST_LOG_VARIANCE = -6.0
GAIN = 1.9  # what the norms of the default sizes take from a colour on its way, measured

FIELDS: dict[str, tuple[object, str]] = {
    "seed": (0, "decides the initial weights, the crops and the latent noise"),
    "num_steps": (4000, "updates in the run; the learning rate falls to zero over them"),
    "batch_size": (3, "crops an update"),
    "model.base_dim": (8, "channels at full resolution"),
    "model.z_dim": (16, "channels of the latents"),
    "model.dim_mult": ((1, 3, 6), "channels of each level, in base_dim"),
    "model.temporal_downsample": (
        (True, True),
        "whether each level but the last halves the frames, not only the sides",
    ),
    "model.num_res_blocks": (1, "residual blocks a level of the encoder; the decoder has one more"),
    "data.first_clip": (1_000_000, "number of the first clip of the built-in world; later work uses the ones below"),
    "data.frames": (17, "frames of a whole clip, 4n + 1"),
    "data.height": (64, "pixels of a whole clip"),
    "data.width": (64, "pixels of a whole clip"),
    "data.crop_frames": (17, "frames of a crop, 4n + 1; colours drift beyond what was trained"),
    "data.crop_size": (32, "pixels of a crop's sides, a multiple of the VAE's stride"),
    "loss.gradient": (0.5, "weight of the differences of neighbouring pixels"),
    "loss.kl": (1e-4, "weight of the divergence from a normal distribution"),
    **with_defaults(
        SHARED_FIELDS,
        optimizer__learning_rate=5e-4,
        optimizer__warmup_steps=20,
        ema_decay=0.995,
        log_every=20,
        checkpoint_every=250,
    ),
}


def validate(config) -> None:
    """Check the values (UserError names the field)."""
    flat = check_shared(config, FIELDS)
    for name in ("model.base_dim", "model.z_dim", "model.num_res_blocks"):
        if flat[name] < 1:
            raise UserError(f"config.{name}={flat[name]} must be at least 1")
    sizes = model_config(config)
    for name in ("data.frames", "data.crop_frames"):
        if flat[name] % sizes.temporal_stride != 1:
            raise UserError(f"config.{name}={flat[name]} is not {sizes.temporal_stride}n + 1")
    size, stride = flat["data.crop_size"], sizes.spatial_stride
    if size < stride or size % stride or size > min(flat["data.height"], flat["data.width"]):
        raise UserError(f"config.data.crop_size={size} must be a multiple of {stride}, and no larger than the clip")
    if flat["data.crop_frames"] > flat["data.frames"]:
        raise UserError(f"config.data.crop_frames={flat['data.crop_frames']} is more than data.frames")


def model_config(config) -> WanVAEConfig:
    """Return the VAE's sizes, with latent statistics that normalise nothing."""
    sizes = config.model
    return WanVAEConfig(
        base_dim=sizes.base_dim,
        z_dim=sizes.z_dim,
        dim_mult=tuple(sizes.dim_mult),
        num_res_blocks=sizes.num_res_blocks,
        temporal_downsample=tuple(sizes.temporal_downsample),
        latents_mean=(0.0,) * sizes.z_dim,
        latents_std=(1.0,) * sizes.z_dim,
    )


def new_vae(sizes: WanVAEConfig, seed: int) -> WanVAE:
    """Return a VAE that starts as a mosaic: it carries the mean colour of each cell and learns the details.

    From the usual random weights a small VAE takes thousands of steps to find colours: the last norms of encoder and
    decoder keep directions only, and a chain of random maps mixes everything. Here the residual branches start at zero
    and the maps between them pass on r, g, b, a constant, -r, -g, -b, beside random channels. The constant keeps the
    norms nearly linear, and the pairs undo SiLU, since silu(x) - silu(-x) = x.
    """
    vae = WanVAE(sizes, nnx.Rngs(seed))
    for layer in (*vae.encoder.downsamples, *vae.encoder.middle, *vae.decoder.middle, *vae.decoder.upsamples):
        if isinstance(layer, ResidualBlock):
            layer.conv2.kernel[...] = jnp.zeros_like(layer.conv2.kernel[...])
            if layer.shortcut is not None:
                _pass_on(layer.shortcut, [()])
        elif isinstance(layer, AttentionBlock):
            layer.proj.kernel[...] = jnp.zeros_like(layer.proj.kernel[...])
        else:
            down = isinstance(layer, Downsample)
            _pass_on(layer.conv, [(0, row, column) for row in (0, 1) for column in (0, 1)] if down else [(0, 1, 1)])
            if layer.time_conv is not None:
                _pass_on(layer.time_conv, [(1, 0, 0), (2, 0, 0)] if down else [(2, 0, 0)], copies=1 if down else 2)
    last = (2, 1, 1)  # the tap on the pixel itself
    _pass_on(vae.encoder.conv1, [last], _SPREAD)
    _pass_on(vae.encoder.head_conv, [last], _GATHER)
    _pass_on(vae.conv1, [()], np.eye(2 * sizes.z_dim))
    _pass_on(vae.conv2, [()], np.eye(sizes.z_dim))
    _pass_on(vae.decoder.conv1, [last], _SPREAD)
    _pass_on(vae.decoder.head_conv, [last], GAIN * _GATHER)
    for conv in (vae.encoder.conv1, vae.decoder.conv1):
        conv.bias[...] = conv.bias[...].at[RGB].set(4.0)
    # Little noise at the start: with a deviation of 1 the decoder first learns to do without the latents.
    vae.conv1.bias[...] = vae.conv1.bias[...].at[sizes.z_dim :].set(FIRST_LOG_VARIANCE)
    vae.conv1.kernel[...] = vae.conv1.kernel[...].at[:, sizes.z_dim :].set(0.0)
    return vae


_STREAM = 2 * RGB + 1  # r, g, b, a constant, -r, -g, -b
_SPREAD = np.concatenate([np.eye(RGB), np.zeros((RGB, 1)), -np.eye(RGB)], axis=1)  # r, g, b to the stream
_GATHER = _SPREAD.T  # and back: r - (-r) ...


def _pass_on(layer, taps, matrix: np.ndarray | None = None, copies: int = 1) -> None:
    """Let the first channels of a kernel [... in out] carry `matrix`, averaged over `taps`; the others stay random.

    Args:
      layer: has the kernel.
      taps: positions in the kernel.
      matrix: [in out] for the channels that it covers; None: the identity of the stream.
      copies: groups of outputs that each carry it.
    """
    matrix = np.eye(_STREAM) if matrix is None else matrix
    kernel = np.array(layer.kernel[...])
    size = kernel.shape[-1] // copies
    matrix = matrix[: kernel.shape[-2], :size]  # of a narrow layer
    rows, columns = matrix.shape
    for start in range(0, copies * size, size):
        kernel[..., start : start + columns] = 0
        for tap in taps:
            kernel[tap][:rows, start : start + columns] = matrix / len(taps)
    layer.kernel[...] = jnp.asarray(kernel)


def posterior(vae: WanVAE, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and log-variance of the latents of video [B F H W 3], both [B f h w z_dim] and not normalised."""
    moments = vae.conv1(_in_two_parts(vae.encoder, video)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -20.0, 10.0)


def decode(vae: WanVAE, latents: jax.Array) -> jax.Array:
    """Return the video [B F H W 3] of latents [B f h w z_dim] that are not normalised."""
    return _in_two_parts(vae.decoder, vae.conv2(latents)).astype(jnp.float32)


def _in_two_parts(network, frames):
    """Apply `network` to the first frame and to all others at once: what the VAE does group by group, with less memory
    and more steps one after another.
    """
    first, past = network(frames[:, :1], None)
    if frames.shape[1] == 1:
        return first
    return jnp.concatenate([first, network(frames[:, 1:], past)[0]], axis=1)


def vae_loss(vae: WanVAE, video: jax.Array, key: jax.Array, *, gradient: float, kl: float) -> tuple[jax.Array, dict]:
    """Return the loss of video [B F H W 3] and its parts, with the PSNR in dB (of pixels in [-1, 1])."""
    mean, log_variance = posterior(vae, video)
    noise = jax.random.normal(key, mean.shape)
    error = decode(vae, mean + jnp.exp(0.5 * log_variance) * noise) - video
    l1 = jnp.mean(jnp.abs(error))
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=2))) + jnp.mean(jnp.abs(jnp.diff(error, axis=3)))
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1)
    psnr = 10 * jnp.log10(4 / jnp.mean(jnp.square(error)))
    parts = {"loss/l1": l1, "loss/gradient": edges, "loss/kl": divergence, "psnr": psnr}
    return l1 + gradient * edges + kl * divergence, parts


def crops(config, number: int) -> np.ndarray:
    """Return batch `number`: random crops of clips of the world, [batch_size crop_frames crop_size crop_size 3]."""
    data, batch = config.data, config.batch_size
    rng = np.random.default_rng([config.seed, number])
    out = np.empty((batch, data.crop_frames, data.crop_size, data.crop_size, 3), np.float32)
    for i in range(batch):
        index = data.first_clip + number * batch + i
        video, _ = shapes_world.clip(index, frames=data.frames, height=data.height, width=data.width)
        sizes = (data.crop_frames, data.crop_size, data.crop_size)
        starts = [rng.integers(0, whole - part + 1) for whole, part in zip(video.shape, sizes, strict=False)]
        cut = tuple(slice(start, start + part) for start, part in zip(starts, sizes, strict=True))
        out[i] = video[cut]
    return out


def train_vae(config, workdir: Path) -> tuple[int, FitState]:
    """Train, or go on training, a VAE in `workdir`; status and errors as in `fit`."""
    validate(config)

    def build() -> Fit:
        mesh = make_mesh(devices=jax.devices()[: math.gcd(config.batch_size, jax.device_count())])
        sizes = model_config(config)
        graphdef, abstract_weights = nnx.split(nnx.eval_shape(lambda: WanVAE(sizes, nnx.Rngs(0))))

        def loss(params: Params, video, key):
            vae = nnx.merge(graphdef, filled(abstract_weights, params))
            return vae_loss(vae, video, key, gradient=config.loss.gradient, kl=config.loss.kl)

        def make_batch(number: int):
            return jax.device_put(crops(config, number), batch_sharding(mesh))

        return build_fit(
            config,
            mesh,
            loss=loss,
            abstract_params=nnx.to_pure_dict(abstract_weights),
            init_params=lambda shardings: nnx.to_pure_dict(nnx.state(new_vae(sizes, config.seed))),
            architecture={"name": "wan_vae", "config": dataclasses.asdict(sizes)},
            batches=CountedBatches(make_batch),
        )

    return fit(build, config, workdir)


def trained_vae(config, params: Params, *, clips: int = 64, batch_size: int = 4) -> WanVAE:
    """Return the VAE of `params` with the mean and deviation of its latents, measured on clips that are new to it.

    Channels that carry nothing keep a deviation of a tenth of the largest: they must not be blown up to noise.
    """
    data, sizes = config.data, model_config(config)
    graphdef, abstract_weights = nnx.split(nnx.eval_shape(lambda: WanVAE(sizes, nnx.Rngs(0))))
    encode = jax.jit(lambda params, video: nnx.merge(graphdef, filled(abstract_weights, params)).encode(video))
    latents = []
    for start in range(0, clips, batch_size):
        videos = [
            shapes_world.clip(
                data.first_clip - clips + start + i, frames=data.frames, height=data.height, width=data.width
            )
            for i in range(batch_size)
        ]
        latents.append(np.asarray(encode(params, np.stack([video for video, _ in videos]))))
    values = np.concatenate(latents).reshape(-1, sizes.z_dim)
    deviation = values.std(0)
    deviation = np.maximum(deviation, 0.1 * deviation.max())
    measured = dataclasses.replace(
        sizes, latents_mean=tuple(map(float, values.mean(0))), latents_std=tuple(map(float, deviation))
    )
    vae = WanVAE(measured, nnx.Rngs(0))
    nnx.update(vae, filled(abstract_weights, params))
    return vae

"""Training a WanVAE from scratch on the built-in world of shapes (`data/shapes_world.py`).

    L = |x' - x| + gradient |D x' - D x| + kl KL(q(z | x) || N(0, 1))

with x' decoded from a sample of q, D the differences of neighbouring pixels, and means over all elements. Small random
crops of few frames are enough: the network is convolutional, and a step costs as many times less.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avd_jax.data import shapes_world
from avd_jax.data.world_clips import VAE_STATISTICS_CLIPS
from avd_jax.methods.vae.config import model_config
from avd_jax.models.functional import Functional, Params, filled, unallocated
from avd_jax.models.vae_layers import AttentionBlock, Downsample, ResidualBlock
from avd_jax.models.wan_vae import RGB, WanVAE, WanVAEConfig
from avd_jax.parallel.hosts import batch_rows
from avd_jax.parallel.mesh import mesh_that_divides
from avd_jax.training.batches import CountedBatches
from avd_jax.training.method import BatchField, Draw, Method, Term, Trained, Update, Value
from avd_jax.training.optimizers import growing_decay, scheduled

FIRST_LOG_VARIANCE = -6.0
GAIN = 1.9  # what the norms of the default sizes take from a colour on its way, measured


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


def reconstruct(vae: WanVAE, video: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """Return the terms of the loss of video [B F H W 3], and the PSNR in dB (of pixels in [-1, 1]), all scalars."""
    mean, log_variance = posterior(vae, video)
    noise = jax.random.normal(key, mean.shape)
    error = decode(vae, mean + jnp.exp(0.5 * log_variance) * noise) - video
    return {
        "l1": jnp.mean(jnp.abs(error)),
        "edges": jnp.mean(jnp.abs(jnp.diff(error, axis=2))) + jnp.mean(jnp.abs(jnp.diff(error, axis=3))),
        "kl": 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1),
        "psnr": 10 * jnp.log10(4 / jnp.mean(jnp.square(error))),
    }


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


def build(config, *, devices=None, video=None) -> Method:
    """Put the method together; arguments as in `methods/avd/method.py`."""
    mesh = mesh_that_divides(config.batch_size, devices)
    sizes, data = model_config(config), config.data
    network = unallocated(lambda: WanVAE(sizes, nnx.Rngs(0)))
    shape = config.batch_size, data.crop_frames, data.crop_size, data.crop_size, 3
    return Method(
        name="vae",
        main="vae",
        mesh=mesh,
        networks={
            "vae": Trained(
                network.abstract_params(),
                lambda shardings: nnx.to_pure_dict(nnx.state(new_vae(sizes, config.seed))),
                scheduled(config.optimizer, config.num_steps),
                growing_decay(config.ema_decay),
            )
        },
        updates=(_update(config, network),),
        fields={"video": BatchField(jax.ShapeDtypeStruct(shape, jnp.float32))},
        batches=lambda fresh: CountedBatches(
            lambda number: {"video": crops(config, number)}, batch_rows(mesh, config.batch_size).rows
        ),
        key_of=lambda key, number: key,
        record=lambda: {"architecture": {"name": "wan_vae", "config": dataclasses.asdict(sizes)}},
    )


def _update(config, network: Functional) -> Update:
    """Return the update: the three terms of one reconstruction."""

    def reconstruction(vae: Params, video, noise_key) -> dict:
        return reconstruct(network.module(vae), video, noise_key)

    return Update(
        "total",
        "vae",
        terms=(
            Term("l1", 1.0, ("reconstruction",), lambda reconstruction: reconstruction["l1"]),
            Term("gradient", config.loss.gradient, ("reconstruction",), lambda reconstruction: reconstruction["edges"]),
            Term("kl", config.loss.kl, ("reconstruction",), lambda reconstruction: reconstruction["kl"]),
        ),
        values=(Value("reconstruction", ("vae", "video", "noise_key"), reconstruction),),
        reports=("reconstruction",),
        draws=(Draw("noise_key", lambda key, extras: key),),
        metrics=lambda made, extras: {"psnr": made.values["reconstruction"]["psnr"]},
    )


def trained_vae(config, params: Params, *, clips: int = VAE_STATISTICS_CLIPS, batch_size: int = 4) -> WanVAE:
    """Return the VAE of `params` with the mean and deviation of its latents, measured on clips that are new to it.

    Channels that carry nothing keep a deviation of a tenth of the largest: they must not be blown up to noise.
    """
    data, sizes = config.data, model_config(config)
    network = unallocated(lambda: WanVAE(sizes, nnx.Rngs(0)))
    encode = jax.jit(lambda params, video: network.module(params).encode(video))
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
    nnx.update(vae, filled(network.abstract, params))
    return vae

"""Training the frame interpolator on encoded videos (docs/method.md, Frame interpolation).

    L = mean |U(x[2i], x[2i+2]) - x[2i+1]|^2

Of F latent frames every second is kept; the loss is on the missing ones, since the kept ones are copied. BatchNorm's
statistics stay what they are, in a new network 0 and 1: normalising with those of the batch, or each pair with its own
(GroupNorm), left 1.5 times the error on held-out latents of real videos.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from avd_jax import convert
from avd_jax.convert.architectures import INTERPOLATOR
from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.networks import DEFAULT
from avd_jax.convert.weights import open_weights
from avd_jax.data.atomic import write_text
from avd_jax.data.encoding import video_decoder
from avd_jax.data.mixture import open_sets
from avd_jax.data.pipeline import held_out_indices
from avd_jax.data.video import contact_sheet
from avd_jax.errors import UserError
from avd_jax.methods import transformers
from avd_jax.models.functional import Functional, Params, functional, unallocated
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.models.wan_dit import WanDiTConfig
from avd_jax.parallel.hosts import is_first
from avd_jax.parallel.mesh import replicated
from avd_jax.shapes import Latents
from avd_jax.training.method import Method, Observer, Term, Trained, Update
from avd_jax.training.optimizers import growing_decay, scheduled
from avd_jax.training.state import TrainState


def build(config, *, devices=None, video=None) -> Method:
    """Put the method together; arguments and errors as in `methods/avd/method.py`."""
    mesh = transformers.batch_mesh(config.mesh, config.batch_size, devices)
    shapes = transformers.clip_shapes(config.data.latents, video, WanDiTConfig())
    for frames, *_ in shapes:
        if frames < 3 or frames % 2 == 0:
            raise UserError(
                f"{config.data.latents}: its clips have {frames} latent frames; every second one can be left out of "
                "an odd number from 3 on; encode 8n + 1 video frames, 9 at least"
            )
    start = _start(config, shapes[0][-1])
    network, params = functional(start)
    return Method(
        name="interpolator",
        main="interpolator",
        mesh=mesh,
        networks={
            "interpolator": Trained(
                network.abstract_params(),
                lambda shardings: params,
                scheduled(config.optimizer, config.num_steps),
                growing_decay(config.ema_decay),
            )
        },
        updates=(_update(network),),
        **transformers.encoded_sizes(config.batch_size, shapes, WanDiTConfig(text_len=1)),
        batches=transformers.encoded_batches(config, mesh, text_len=1, held_out=config.data.held_out),
        key_of=lambda key, number: key,
        record=lambda: {"architecture": INTERPOLATOR.record(start.config)},
        inputs=partial(_inputs, config),
        observer=lambda surroundings, frozen: HeldOut(config, surroundings.workdir, network, mesh),
    )


def _update(network: Functional) -> Update:
    def loss(interpolator: Params, latents):
        return interpolation_loss(network.module(interpolator), latents)

    return Update("total", "interpolator", (Term("interpolation", 1.0, ("interpolator", "latents"), loss),))


def split_frames(latents: Latents) -> tuple[Latents, Latents, Latents]:
    """Return (left, missing, right) of latents [B F H W C], F odd and 3 at least: each [B (F-1)/2 H W C]."""
    return latents[:, :-2:2], latents[:, 1::2], latents[:, 2::2]


def interpolation_loss(unet: Interpolator, latents: Latents) -> jax.Array:
    """Return the mean squared error on the missing frames of latents [B F H W C], a scalar."""
    left, missing, right = split_frames(latents.astype(jnp.float32))
    return jnp.mean(jnp.square(unet.between(left=left, right=right) - missing))


def baseline_errors(latents: Latents) -> dict[str, jax.Array]:
    """Return the mean squared errors on the missing frames without a network, by name of the baseline."""
    left, missing, right = split_frames(latents.astype(jnp.float32))
    made = {"copy left": left, "average": (left + right) / 2}
    return {name: jnp.mean(jnp.square(frames - missing)) for name, frames in made.items()}


def new_interpolator(sizes: InterpolatorConfig, seed: int) -> Interpolator:
    """Return a network that starts as the average of both frames, if it is wide enough, and learns the rest.

    The average goes through the first skip connection as max(a, 0) - max(-a, 0): 2C channels of the first level. After
    as many updates the held-out error is a quarter lower than from random weights.
    """
    unet = Interpolator(sizes, nnx.Rngs(seed))
    channels, width = sizes.channels, sizes.widths[0]
    if width < 2 * channels:
        return unet
    one, carried = np.eye(channels), slice(0, 2 * channels)
    centre = (1, 1)
    kernel = np.array(unet.enc1.conv.kernel[...])
    kernel[..., carried] = 0
    kernel[(*centre, slice(None), carried)] = np.block([[one, -one], [one, -one]]) / 2
    unet.enc1.conv.kernel[...] = jnp.asarray(kernel)
    kernel = np.array(unet.dec1.conv.kernel[...])  # its inputs are `width` channels from below, then the skip's
    kernel[..., carried] = 0
    kernel[(*centre, slice(width, width + 2 * channels), carried)] = np.eye(2 * channels)
    unet.dec1.conv.kernel[...] = jnp.asarray(kernel)
    kernel = np.zeros_like(unet.out_conv.kernel[...])
    kernel[carried] = np.concatenate([one, -one])
    unet.out_conv.kernel[...] = jnp.asarray(kernel)
    return unet


def trained_interpolator(method: Method, params: Params) -> Interpolator:
    """Return the interpolator of `params`, trained by `method`, as a module."""
    sizes = INTERPOLATOR.config_from_record(method.record()["architecture"], name="")
    return unallocated(lambda: Interpolator(sizes, nnx.Rngs(0))).module(params)


class HeldOut(Observer):
    """Clips that no update sees: the error on their missing frames beside that of two baselines, and pictures.

    `held_out.md` gets a row a checkpoint, `samples/step_<n>.png` four pictures a clip: left, made, right and truth.
    """

    def __init__(self, config, workdir: Path, network: Functional, mesh: Mesh):
        """Read the clips."""
        self.sample_every = config.checkpoint_every or config.num_steps
        sets = open_sets(config.data.latents, "latents")
        indices = held_out_indices([len(one) for one in sets], config.data.held_out)
        clips = [one[i] for one, numbers in zip(sets, indices, strict=True) for i in numbers]
        self._clips = [np.asarray(clip["latents"], np.float32)[None] for clip in clips]
        self._captions = [clip["caption"] for clip in clips[: config.sample.clips]]
        self._workdir = workdir
        self._baselines = {
            name: np.mean([baseline_errors(clip)[name] for clip in self._clips]) for name in ("copy left", "average")
        }
        compiled = partial(jax.jit, out_shardings=replicated(mesh))
        self._error = compiled(lambda params, clip: interpolation_loss(network.module(params), clip))
        self._double = compiled(lambda params, clip: network(params, clip[:, ::2]))
        weights = config.sample.vae
        self._vae = convert.load_vae(weights) if weights and config.sample.clips else None
        self._decode = video_decoder(self._vae) if self._vae else None

    def sample(self, step: int, state: TrainState) -> None:
        """Add the row of `step`, for the running mean of the weights, and its pictures."""
        params = state.networks["interpolator"].latest
        error = np.mean([self._error(params, clip) for clip in self._clips])
        copied, average = self._baselines["copy left"], self._baselines["average"]
        row = f"| {step} | {copied:.4f} | {average:.4f} | {error:.4f} | {1 - error / average:.1%} |"
        path = self._workdir / "held_out.md"
        head = ["| step | copy left | average | interpolator | below average |", "| --- | --- | --- | --- | --- |"]
        rows = path.read_text().splitlines()[len(head) :] if path.exists() else []
        rows = [old for old in rows if int(old.split("|")[1]) < step]  # a killed run may have written later ones
        if is_first():
            write_text(path, "\n".join([*head, *rows, row]) + "\n")
        print(f"step {step}: held-out error {error:.4f}, {1 - error / average:.1%} below averaging", flush=True)
        if self._vae is not None:
            self._write_pictures(step, params)

    def _write_pictures(self, step: int, params: Params) -> None:
        pictures = []
        for clip in self._clips[: len(self._captions)]:
            middle = clip.shape[1] // 4 * 2 + 1  # a missing frame, near the middle
            truth, made = self._decode(clip)[0], self._decode(np.asarray(self._double(params, clip)))[0]
            stride = self._vae.config.temporal_stride
            places = [max(0, stride * frame - stride // 2) for frame in (middle - 1, middle, middle + 1)]
            left, between, right = places
            pictures.append(np.stack([truth[left], made[between], truth[right], truth[between]]))
        captions = [f"left, made, right, truth: {caption}" for caption in self._captions]
        if is_first():
            contact_sheet(pictures, self._workdir / "samples" / f"step_{step:06d}.png", captions)


def _start(config, channels: int) -> Interpolator:
    if not config.init_from:
        return new_interpolator(InterpolatorConfig(channels, tuple(config.model.widths)), config.seed)
    unet = convert.load_interpolator(config.init_from, key=config.which or DEFAULT)
    if unet.config.channels != channels:
        raise UserError(
            f"config.init_from={config.init_from}: takes latents of {unet.config.channels} channels, the set has "
            f"{channels}; encode the videos with its VAE"
        )
    return unet


def _inputs(config) -> dict[str, str]:
    found = transformers.set_fingerprints(config.data.latents)
    if config.init_from:
        found["init_from"] = fingerprint(open_weights(config.init_from, INTERPOLATOR, config.which or DEFAULT))
    return found

"""Training the frame interpolator on encoded videos (PAPER.md, Frame interpolation).

    L = mean |U(x[2i], x[2i+2]) - x[2i+1]|^2

Of F latent frames every second is kept; the loss is on the missing ones, since the kept ones are copied. BatchNorm's
statistics stay what they are, in a new network 0 and 1: normalising with those of the batch, or each pair with its own
(GroupNorm), left 1.5 times the error on held-out latents of real videos.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from avd_jax import convert
from avd_jax.convert.architectures import INTERPOLATOR
from avd_jax.convert.weights import open_weights
from avd_jax.data.atomic import write_text
from avd_jax.data.encoding import video_decoder
from avd_jax.data.latents import EncodedSet, LatentsInfo, set_fingerprint
from avd_jax.data.pipeline import held_out_indices
from avd_jax.data.video import contact_sheet
from avd_jax.errors import UserError
from avd_jax.generation.weights import fingerprint
from avd_jax.models.interpolator import Interpolator, InterpolatorConfig
from avd_jax.parallel.hosts import is_first
from avd_jax.parallel.mesh import replicated
from avd_jax.shapes import Latents
from avd_jax.training.fields import with_defaults
from avd_jax.training.fitting import SHARED_FIELDS, EncodedBatches, Fit, FitState, build_fit, check_shared, fit
from avd_jax.training.networks import Params, filled
from avd_jax.training.pretraining import DATA_FIELDS, MESH_FIELDS, batch_mesh, check_data_named, latents_of

FIELDS: dict[str, tuple[object, str]] = {
    "seed": (0, "decides the initial weights and the order of the data"),
    "num_steps": (10000, "updates in the run; the learning rate falls to zero over them"),
    "batch_size": (32, "clips an update, over all devices"),
    "init_from": ("", "weights to go on from, such as an AVD checkpoint, which set the sizes; empty: a new network"),
    "model.widths": ((64, 128, 256), "channels of the three levels, without init_from; the authors' are 32, 64, 128"),
    **DATA_FIELDS,
    "data.held_out": (64, "clips, spread evenly over the set, that no update sees and the error is measured on"),
    "sample.clips": (4, "held-out clips to show beside what is made of them"),
    "sample.vae": ("", "weights of the VAE that decodes them; empty: data.weights, and without either none are shown"),
    **MESH_FIELDS,
    **with_defaults(
        SHARED_FIELDS,
        optimizer__learning_rate=1e-5,
        optimizer__warmup_steps=100,
        optimizer__beta2=0.999,
        checkpoint_every=1000,
    ),
}


def validate(config) -> None:
    """Check what can be checked without files (UserError names the field)."""
    flat = check_shared(config, FIELDS)
    check_data_named(config)
    for name, least in (("data.held_out", 1), ("sample.clips", 0)):
        if flat[name] < least:
            raise UserError(f"config.{name}={flat[name]} must be at least {least}")
    if flat["optimizer.weight_decay"]:
        raise UserError("config.optimizer.weight_decay must be 0: it would shrink BatchNorm's statistics")
    InterpolatorConfig(widths=tuple(config.model.widths))


def split_frames(latents: Latents) -> tuple[Latents, Latents, Latents]:
    """Return (left, missing, right) of latents [B F H W C], F odd and 3 at least: each [B (F-1)/2 H W C]."""
    return latents[:, :-2:2], latents[:, 1::2], latents[:, 2::2]


def interpolation_loss(unet: Interpolator, latents: Latents) -> jax.Array:
    """Return the mean squared error on the missing frames of latents [B F H W C], a scalar."""
    left, missing, right = split_frames(latents.astype(jnp.float32))
    return jnp.mean(jnp.square(unet.between(left=left, right=right) - missing))


def baseline_errors(latents: Latents) -> dict[str, jax.Array]:
    """Return the mean squared errors on the missing frames of doing without a network."""
    left, missing, right = split_frames(latents.astype(jnp.float32))
    made = {"copy left": left, "average": (left + right) / 2}
    return {name: jnp.mean(jnp.square(frames - missing)) for name, frames in made.items()}


def new_interpolator(sizes: InterpolatorConfig, seed: int) -> Interpolator:
    """Return a network that starts as the average of both frames, where it is wide enough, and learns the rest.

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


def train_interpolator(config, workdir: Path) -> tuple[int, FitState, InterpolatorConfig]:
    """Train, or go on training, in `workdir`; status and errors as in `fit`. Returns the sizes, too."""
    validate(config)
    found: list[InterpolatorConfig] = []

    def build() -> Fit:
        mesh = batch_mesh(config)
        folder, info = latents_of(config, workdir)
        if info.latents_shape[0] < 3 or info.latents_shape[0] % 2 == 0:
            raise UserError(
                f"{folder}: its clips have {info.latents_shape[0]} latent frames; every second one can be left out of "
                "an odd number from 3 on; encode 8n + 1 video frames, 9 at least"
            )
        start = _start(config, info)
        found.append(start.config)
        graphdef, state = nnx.split(start)

        def merge(params: Params) -> Interpolator:
            return nnx.merge(graphdef, filled(state, params))

        def loss(params: Params, batch, key):
            return interpolation_loss(merge(params), batch["latents"]), {}

        return build_fit(
            config,
            mesh,
            loss=loss,
            abstract_params=nnx.to_pure_dict(jax.eval_shape(lambda: state)),
            init_params=lambda shardings: nnx.to_pure_dict(state),
            architecture=INTERPOLATOR.record(start.config),
            batches=EncodedBatches(folder, config, mesh, text_len=1, held_out=config.data.held_out),
            on_checkpoint=HeldOut(config, folder, workdir, merge, mesh).write,
            inputs=_inputs(config, folder),
        )

    status, state = fit(build, config, workdir, movable=("init_from", "data.latents", "data.weights"))
    return status, state, found[0]


def trained_interpolator(sizes: InterpolatorConfig, params: Params) -> Interpolator:
    """Return the interpolator of `params` as a module."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Interpolator(sizes, nnx.Rngs(0))))
    return nnx.merge(graphdef, filled(state, params))


class HeldOut:
    """Clips that no update sees: the error on their missing frames beside that of two baselines, and pictures.

    `held_out.md` gets a row a checkpoint, `samples/step_<n>.png` four pictures a clip: left, made, right and truth.
    """

    def __init__(self, config, folder: Path, workdir: Path, merge: Callable[[Params], Interpolator], mesh: Mesh):
        """Read the clips; `merge` makes a network of parameters."""
        clips = EncodedSet(folder, "latents")
        indices = held_out_indices(len(clips), config.data.held_out)
        self._clips = [np.asarray(clips[i]["latents"], np.float32)[None] for i in indices]
        self._captions = [clips[i]["caption"] for i in indices[: config.sample.clips]]
        self._workdir = workdir
        self._baselines = {
            name: np.mean([baseline_errors(clip)[name] for clip in self._clips]) for name in ("copy left", "average")
        }
        compiled = partial(jax.jit, out_shardings=replicated(mesh))
        self._error = compiled(lambda params, clip: interpolation_loss(merge(params), clip))
        self._double = compiled(lambda params, clip: merge(params)(clip[:, ::2]))
        weights = config.sample.vae or config.data.weights
        self._vae = convert.load_vae(weights) if weights and config.sample.clips else None
        self._decode = video_decoder(self._vae) if self._vae else None

    def write(self, step: int, state: FitState) -> None:
        """Add the row of `step`, for the running mean of the weights, and its pictures."""
        error = np.mean([self._error(state.ema, clip) for clip in self._clips])
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
            self._write_pictures(step, state)

    def _write_pictures(self, step: int, state: FitState) -> None:
        pictures = []
        for clip in self._clips[: len(self._captions)]:
            middle = clip.shape[1] // 4 * 2 + 1  # a missing frame, near the middle
            truth, made = self._decode(clip)[0], self._decode(np.asarray(self._double(state.ema, clip)))[0]
            stride = self._vae.config.temporal_stride
            places = [max(0, stride * frame - stride // 2) for frame in (middle - 1, middle, middle + 1)]
            left, between, right = places
            pictures.append(np.stack([truth[left], made[between], truth[right], truth[between]]))
        captions = [f"left, made, right, truth: {caption}" for caption in self._captions]
        if is_first():
            contact_sheet(pictures, self._workdir / "samples" / f"step_{step:06d}.png", captions)


def _start(config, info: LatentsInfo) -> Interpolator:
    channels = info.latents_shape[-1]
    if not config.init_from:
        return new_interpolator(InterpolatorConfig(channels, tuple(config.model.widths)), config.seed)
    unet = convert.load_interpolator(config.init_from)
    if unet.config.channels != channels:
        raise UserError(
            f"config.init_from={config.init_from}: takes latents of {unet.config.channels} channels, the set has "
            f"{channels}; encode the videos with its VAE"
        )
    return unet


def _inputs(config, folder: Path) -> dict[str, str]:
    found = {"data.latents": set_fingerprint(folder)}
    if config.init_from:
        found["init_from"] = fingerprint(open_weights(config.init_from, INTERPOLATOR))
    return found

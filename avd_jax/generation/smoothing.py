"""Doubling the frame rate of finished videos: encode, interpolate between latent frames, decode."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from avd_jax import convert
from avd_jax.convert.networks import DEFAULT
from avd_jax.convert.weights import load_module
from avd_jax.data.captions import VIDEO_SUFFIXES
from avd_jax.data.encoding import video_decoder, video_encoder
from avd_jax.data.video import duration, frame_rate_and_size, read_video, write_video
from avd_jax.errors import UserError
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.parallel.compiler import convolution_options
from avd_jax.parallel.memory import fitting


@dataclass(frozen=True)
class Source:
    """What is to be doubled: a video, or the latents of one, with the frame rate that it shows."""

    path: Path
    fps: float

    @property
    def is_latents(self) -> bool:
        """Whether it is a .npy of latents."""
        return self.path.suffix == ".npy"


def sources(path: Path, *, fps: float | None) -> list[Source]:
    """Return what there is to double at `path`: a video, a folder of videos, or a .npy of latents, which need `fps`.

    Raises:
      UserError: nothing there, or `fps` for a video, whose frame rate is its own.
    """
    if not path.exists():
        raise UserError(f"--src {path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise UserError(f"--src {path}: holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    if (path.suffix == ".npy") != (fps is not None):
        problem = "is missing: give the frame rate that the latents show" if fps is None else "is for latents only"
        raise UserError(f"--fps {problem}")
    return [Source(file, fps or frame_rate_and_size(file)[0]) for file in files]


class Smoother:
    """The VAE and the interpolator, compiled once for each size."""

    def __init__(self, *, weights: str, checkpoint: str | None, which: str | None = None, vae_gib: float = MEMORY_GIB):
        """Load the VAE of `weights`, and the interpolator of `checkpoint` or else of `weights`.

        Args:
          weights: folder or file.
          checkpoint: likewise, or None.
          which: names the network of a file with several.
          vae_gib: GiB of the device that the VAE may take, in as many tiles as that needs.

        Raises:
          UserError: one of them is missing, or they do not go together.
        """
        found = convert.open_interpolator_of(checkpoint, weights, key=which or DEFAULT)
        if found is None:
            place = checkpoint or weights
            raise UserError(
                f"{place}: has no frame interpolator; make one with scripts/train_interpolator.py --out {place}"
            )
        self._vae = convert.load_vae(weights, key=which)
        channels = self._vae.config.z_dim
        if found.config.channels != channels:
            raise UserError(
                f"{checkpoint or weights}: the interpolator takes {found.config.channels} channels, the VAE of "
                f"{weights} has {channels}; use the one that was trained for this VAE"
            )
        self._encode = video_encoder(self._vae, memory_gib=vae_gib).encode
        self._decode = video_decoder(self._vae, memory_gib=vae_gib)
        graphdef, state = nnx.split(load_module(found, np.float32))
        compiled = partial(jax.jit, compiler_options=convolution_options())
        self._double = partial(compiled(lambda state, latents: nnx.merge(graphdef, state)(latents)), state)

    def double(self, source: Source, out: Path) -> None:
        """Write `source` at twice its frame rate to `out`.

        Raises:
          UserError: a video of one latent frame, which has no neighbour, a file that cannot be read, or a video that
            the device has no memory for.
        """
        with fitting(str(source.path), "give a shorter or a smaller video, or a lower --vae_gib"):
            latents = self._read_latents(source) if source.is_latents else self._encode(self._read_video(source)[None])
            if latents.shape[1] < 2:
                raise UserError(f"{source.path}: is one latent frame long; there is nothing between its frames to make")
            video = np.asarray(self._decode(self._double(latents)))[0]
        write_video(out, video, fps=2 * source.fps)

    def _read_video(self, source: Source) -> np.ndarray:
        time, space = self._vae.config.temporal_stride, self._vae.config.spatial_stride
        _, height, width = frame_rate_and_size(source.path)
        count = round(duration(source.path) * source.fps)
        size = {"height": height // space * space, "width": width // space * space}
        if not all(size.values()):
            raise UserError(f"{source.path}: is {width}x{height}; each side must have {space} pixels at least")
        return read_video(source.path, frames=max(1, (count - 1) // time * time + 1), fps=source.fps, **size)

    def _read_latents(self, source: Source) -> np.ndarray:
        try:
            latents = np.load(source.path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{source.path}: cannot be read as an array ({error})") from None
        channels = self._vae.config.z_dim
        if latents.ndim != 4 or latents.shape[-1] != channels or latents.dtype.kind not in "fV":
            raise UserError(
                f"{source.path}: holds {latents.dtype} {latents.shape}; give latents [F H W {channels}] of one video"
            )
        return latents.astype(np.float32)[None]

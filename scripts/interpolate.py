"""Double the frame rate of finished videos: through the VAE's encoder, the frame interpolator, and the decoder.

  python scripts/interpolate.py --src out --weights runs/wan --checkpoint runs/avd --out smooth

--src is a video, a folder of videos, or a .npy file of latents [F H W C] as the VAE gives them, with --fps for what
they show. A video loses its last frames to become 4n+1 long, and its edges to have sides that are multiples of 8.
"""

from absl import flags
from tqdm import tqdm

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.generation.smoothing import Smoother, sources
from avd_jax.paths import any_path

SRC = command_line.disk_flag("src", None, "Video, folder of videos, or .npy of latents.")
WEIGHTS = command_line.weights_flag("weights", "VAE, and the interpolator if no --checkpoint has one.")
CHECKPOINT = command_line.weights_flag("checkpoint", "Student with its interpolator, or an interpolator.")
WHICH = command_line.define_which()
OUT = command_line.path_flag("out", None, "Folder for the videos.")
FPS = flags.DEFINE_float("fps", None, "Frames per second of what the latents of a .npy show; a video says its own.")
VAE_GIB = command_line.define_vae_gib()


def main() -> None:
    """Open the networks, then double one video after another."""
    if FPS.value is not None and FPS.value <= 0:
        raise UserError(f"--fps {FPS.value}: give a number above 0")
    command_line.keep_programs()
    found = sources(any_path(SRC.value), fps=FPS.value)
    networks = {"weights": WEIGHTS.value, "checkpoint": CHECKPOINT.value, "which": WHICH.value}
    smoother = Smoother(**networks, vae_gib=VAE_GIB.value)
    for source in tqdm(found, unit="video"):
        smoother.double(source, any_path(OUT.value) / f"{source.path.stem}.mp4")
    print(f"{OUT.value}: {len(found)} made, at twice the frame rate")


if __name__ == "__main__":
    command_line.run(main, required=(SRC, WEIGHTS, OUT))

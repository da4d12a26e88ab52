"""Encode videos with captions, or a list of prompts, into a set for training (schema: avd_jax/data/latents.py).

  python scripts/encode.py --videos=clips/ --captions=captions.jsonl --weights=Wan2.1-T2V-1.3B --out=runs/latents
  python scripts/encode.py --prompts=prompts.txt --weights=Wan2.1-T2V-1.3B --out=runs/prompts

captions.jsonl holds one {"file": "a.mp4", "caption": "..."} a line, files relative to --videos. Videos that cannot be
used are reported and left out. The same command goes on after an interruption; what it has left out stays out, so
to try mended videos give a new --out.
"""

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from avd_jax import command_line, convert
from avd_jax.data import encoding, inputs, prompts
from avd_jax.errors import UserError

VIDEOS = flags.DEFINE_string("videos", None, "Folder of video files.")
CAPTIONS = flags.DEFINE_string("captions", None, "JSON lines with the keys `file` and `caption`.")
PROMPTS = flags.DEFINE_string("prompts", None, "Text file with one prompt a line, instead of --videos and --captions.")
WEIGHTS = flags.DEFINE_string("weights", None, "Folder with the VAE, umT5 and its tokenizer, in any known layout.")
OUT = flags.DEFINE_string("out", None, "Folder of the encoded set.")
FRAMES = flags.DEFINE_integer("frames", 81, "Video frames of a clip, 4n+1.")
FPS = flags.DEFINE_float("fps", 16.0, "Frames per second of a clip; videos are resampled.", lower_bound=0.1)
HEIGHT = flags.DEFINE_integer("height", 480, "Pixels, a multiple of 16; videos are scaled and the centre cut out.")
WIDTH = flags.DEFINE_integer("width", 832, "Pixels, a multiple of 16.")
CLIPS_PER_VIDEO = flags.DEFINE_integer("clips_per_video", 1, "Most clips to cut from one video.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Clips that the VAE encodes at once.", lower_bound=1)
TEXT_BATCH_SIZE = flags.DEFINE_integer("text_batch_size", 8, "Texts that umT5 encodes at once.", lower_bound=1)
SHARD_SIZE = flags.DEFINE_integer("shard_size", 64, "Clips or prompts a file; what a kill can lose.", lower_bound=1)


def check_flags() -> None:
    """Raise a UserError that names the flag to mend."""
    if bool(PROMPTS.value) == bool(VIDEOS.value or CAPTIONS.value):
        raise UserError("give either --prompts, or --videos and --captions.")
    if not PROMPTS.value and not (VIDEOS.value and CAPTIONS.value):
        raise UserError(f"--{'videos' if CAPTIONS.value else 'captions'} is missing beside its counterpart.")
    if FRAMES.value < 1 or FRAMES.value % 4 != 1:
        raise UserError(f"--frames {FRAMES.value} is not 4n+1; try {max(0, FRAMES.value // 4) * 4 + 1}.")
    for flag in (HEIGHT, WIDTH):
        if flag.value < 16 or flag.value % 16:
            raise UserError(f"--{flag.name} {flag.value} is not a multiple of 16; try {max(1, flag.value // 16) * 16}.")


def main() -> None:
    """Encode one set and report what was left out."""
    check_flags()
    size = {"frames": FRAMES.value, "fps": FPS.value, "height": HEIGHT.value, "width": WIDTH.value}
    if PROMPTS.value:
        work, uncaptioned = list(dict.fromkeys(prompts.read_prompts(PROMPTS.value))), []
    else:
        captions = inputs.read_captions(CAPTIONS.value)
        work, uncaptioned = inputs.clips_from_folder(
            VIDEOS.value, captions, **size, clips_per_video=CLIPS_PER_VIDEO.value
        )
    # As Wan runs it: umT5-XXL takes 11 GB in bfloat16. A CPU gains nothing from it.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    text = encoding.text_encoder(convert.load_umt5(WEIGHTS.value, dtype), convert.load_tokenizer(WEIGHTS.value))
    with tqdm(total=len(work), unit="prompt" if PROMPTS.value else "clip") as bar:
        shared = {"text": text, "text_batch_size": TEXT_BATCH_SIZE.value, "shard_size": SHARD_SIZE.value}
        if PROMPTS.value:
            summary = encoding.encode_prompts(work, OUT.value, **shared, on_progress=bar.update)
        else:
            vae = encoding.video_encoder(convert.load_vae(WEIGHTS.value))
            summary = encoding.encode_videos(
                work, OUT.value, vae=vae, **shared, **size, batch_size=BATCH_SIZE.value, on_progress=bar.update
            )
    reasons = [*summary.skipped.values(), *(f"{name}: has no caption in {CAPTIONS.value}." for name in uncaptioned)]
    print(f"{OUT.value}: {summary.written} written, {len(reasons)} skipped")
    for reason in reasons:
        print(f"  skipped {reason}")


if __name__ == "__main__":
    command_line.run(main, required=(WEIGHTS, OUT))

"""Encode videos with captions, prompts, or a world of shapes into sets for training (schema: avd_jax/data/latents.py).

  python scripts/encode.py --videos=clips/ --captions=captions.jsonl --weights=Wan2.1-T2V-1.3B --out=runs/latents
  python scripts/encode.py --prompts=prompts.txt --weights=Wan2.1-T2V-1.3B --out=runs/prompts
  python scripts/encode.py --shapes_world --weights=weights/tiny --clips=128 --prompt_count=256 --out=runs/tiny/data

captions.jsonl holds one {"file": "a.mp4", "caption": "..."} a line, with "start" and "end" in seconds for a part of it
(docs/data.md: other layouts); without it a.txt is the caption of a.mp4. What cannot be used is reported and left out.
The third command writes OUT/latents and OUT/prompts. The same command resumes; for mended videos give a new --out.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from avd_jax import command_line, convert
from avd_jax.data import captions, encode_sets, encoding, inputs, prompts, shapes_world, world_clips
from avd_jax.errors import UserError

WAN_SIZE = {"frames": 81, "height": 480, "width": 832}
VIDEOS = command_line.path_flag("videos", None, "Folder of video files. Default: names are relative to --captions.")
CAPTIONS = command_line.path_flag("captions", None, "Their captions. Default: the .txt beside each video.")
PROMPTS = command_line.path_flag("prompts", None, "Prompts: text with one a line, JSON, JSON lines, CSV or TSV.")
SHAPES_WORLD = flags.DEFINE_bool("shapes_world", False, "Draw clips of moving shapes; it needs no files.")
CLIPS = flags.DEFINE_integer("clips", None, "How many clips of --shapes_world to draw.", lower_bound=1)
PROMPT_COUNT = flags.DEFINE_integer("prompt_count", None, "Captions of it to encode as prompts.", lower_bound=0)
STYLE = flags.DEFINE_enum("style", None, shapes_world.STYLES, "How --shapes_world is drawn. Default: painted.")
WEIGHTS = command_line.path_flag("weights", None, "Folder with the VAE, umT5 and its tokenizer, in any known layout.")
WHICH = command_line.define_which()
OUT = command_line.path_flag("out", None, "Folder of the encoded set; with --shapes_world of both sets.")
FRAMES = flags.DEFINE_integer("frames", None, "Video frames of a clip, 4n+1. Default: 81; with --shapes_world 17.")
FPS = flags.DEFINE_float("fps", 16.0, "Frames per second of a clip; videos are resampled.", lower_bound=0.1)
HEIGHT = flags.DEFINE_integer("height", None, "Pixels, a multiple of 16. Default: 480; with --shapes_world 64.")
WIDTH = flags.DEFINE_integer("width", None, "Likewise; videos are scaled and cut. Default: 832, with --shapes_world 64")
CLIPS_PER_VIDEO = flags.DEFINE_integer("clips_per_video", 1, "Most clips to cut from one video.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Clips that the VAE encodes at once.", lower_bound=1)
TEXT_BATCH_SIZE = flags.DEFINE_integer("text_batch_size", 8, "Texts that umT5 encodes at once.", lower_bound=1)
VAE_GIB = command_line.define_vae_gib()
SHARD_SIZE = flags.DEFINE_integer("shard_size", 64, "Clips or prompts a file; what a kill can lose.", lower_bound=1)


def check_flags() -> None:
    """Raise a UserError that names the flag to mend."""
    if SHAPES_WORLD.value and (PROMPTS.value or VIDEOS.value or CAPTIONS.value):
        raise UserError("--shapes_world needs no files: leave out --videos, --captions and --prompts.")
    if SHAPES_WORLD.value and not CLIPS.value:
        raise UserError("--clips is missing: how many clips of --shapes_world to draw.")
    for flag in () if SHAPES_WORLD.value else (CLIPS, PROMPT_COUNT, STYLE):
        if flag.value is not None:
            raise UserError(f"--{flag.name} only goes with --shapes_world.")
    if not SHAPES_WORLD.value and bool(PROMPTS.value) == bool(VIDEOS.value or CAPTIONS.value):
        raise UserError("give either --prompts, or --videos (and --captions).")


def main() -> None:
    """Encode what the flags ask for and report what was left out."""
    check_flags()
    usual = world_clips.WORLD_SIZE if SHAPES_WORLD.value else WAN_SIZE
    size = {flag.name: usual[flag.name] if flag.value is None else flag.value for flag in (FRAMES, HEIGHT, WIDTH)}
    inputs.check_clip_size(**size, prefix="--")
    size["fps"], which = FPS.value, WHICH.value
    work, texts, left_out = [], [], []
    if SHAPES_WORLD.value:
        counts, style = {"clips": CLIPS.value, "prompts": PROMPT_COUNT.value or 0}, {"style": STYLE.value or "painted"}
        total = counts["clips"] + len(world_clips.training_prompts(counts["prompts"], clips=counts["clips"]))
    elif PROMPTS.value:
        texts = work = list(dict.fromkeys(prompts.read_prompts(PROMPTS.value)))
    else:
        folder = VIDEOS.value or Path(CAPTIONS.value).parent
        rows = captions.read_captions(CAPTIONS.value, folder)
        work, left_out = inputs.clips_of(rows, folder, **size, clips_per_video=CLIPS_PER_VIDEO.value)
        for name in captions.without_caption(folder, rows) if VIDEOS.value else ():
            left_out.append(f"{name}: has no caption in {CAPTIONS.value or 'a .txt beside it'}.")
        texts = list(dict.fromkeys(row.caption for row in rows))
    tokenizer = convert.load_tokenizer(WEIGHTS.value)
    tokenizer.tell_what_is_cut(texts)
    # As Wan runs it. A CPU gains nothing from products in bfloat16, nor does the world's tiny encoder.
    dtype = jnp.float32 if SHAPES_WORLD.value or jax.default_backend() == "cpu" else jnp.bfloat16
    umt5 = convert.load_umt5(WEIGHTS.value, dtype, which)
    text = encoding.text_encoder(umt5, tokenizer, takes_turns=not (PROMPTS.value or SHAPES_WORLD.value))
    with tqdm(total=total if SHAPES_WORLD.value else len(work), unit="record") as bar:
        how = {"text_batch_size": TEXT_BATCH_SIZE.value, "shard_size": SHARD_SIZE.value, "on_progress": bar.update}
        if not PROMPTS.value:
            vae = encoding.video_encoder(convert.load_vae(WEIGHTS.value, key=which), memory_gib=VAE_GIB.value)
            how |= {"vae": vae, "batch_size": BATCH_SIZE.value, **size}
        if SHAPES_WORLD.value:
            summaries = encode_sets.encode_shapes_world(OUT.value, text=text, **counts, **style, **how)
        else:
            encode = encode_sets.encode_prompts if PROMPTS.value else encode_sets.encode_videos
            summaries = {OUT.value: encode(work, OUT.value, text=text, **how)}
    for folder, summary in summaries.items():
        reasons = [f"  skipped {reason}" for reason in (*summary.skipped.values(), *left_out)]
        print(f"{folder}: {summary.written} written, {len(reasons)} skipped", *reasons, sep="\n")


if __name__ == "__main__":
    command_line.run(main, required=(WEIGHTS, OUT))

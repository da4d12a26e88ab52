"""Encode videos with captions, prompts, or a world of shapes into sets for training (schema: avd_jax/data/latents.py).

  python scripts/encode.py --videos=clips/ --captions=captions.jsonl --weights=Wan2.1-T2V-1.3B --out=runs/latents
  python scripts/encode.py --prompts=prompts.txt --weights=Wan2.1-T2V-1.3B --out=runs/prompts
  python scripts/encode.py --shapes_world --weights=weights/tiny --clips=128 --prompt_count=256 --out=runs/tiny/data

captions.jsonl holds one {"file": "a.mp4", "caption": "..."} a line, with "start" and "end" in seconds for a part of it;
what cannot be used is reported and left out. The same command resumes, and with a longer list it adds to the set. On n
machines: --shard=0/n to n-1/n, then --merge. Other layouts, and what changes a set: docs/data.md.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from avd_jax import command_line, convert
from avd_jax.data import encode_jobs, encoding, inputs, set_finish, shapes_world, world_clips
from avd_jax.errors import UserError
from avd_jax.parallel.hosts import leaving_at_once

VIDEOS = command_line.path_flag("videos", None, "Folder of video files. Default: names are relative to --captions.")
CAPTIONS = command_line.path_flag("captions", None, "Their captions. Default: the .txt beside each video.")
PROMPTS = command_line.path_flag("prompts", None, "Prompts: text with one a line, JSON, JSON lines, CSV or TSV.")
SHAPES_WORLD = flags.DEFINE_bool("shapes_world", False, "Draw clips of moving shapes; it needs no files.")
CLIPS = flags.DEFINE_integer("clips", None, "How many clips of --shapes_world to draw.", lower_bound=1)
PROMPT_COUNT = flags.DEFINE_integer("prompt_count", None, "Captions of it to encode as prompts.", lower_bound=0)
STYLE = flags.DEFINE_enum("style", None, shapes_world.STYLES, "How --shapes_world is drawn. Default: painted.")
WEIGHTS = command_line.weights_flag("weights", "Folder with the VAE, umT5 and its tokenizer, in any known layout.")
WHICH = command_line.define_which()
OUT = command_line.path_flag("out", None, "Folder of the set; of both sets with --shapes_world, of all with --sizes.")
FRAMES = flags.DEFINE_integer("frames", None, "Video frames of a clip, 4n+1. Default: 81; with --shapes_world 17.")
FPS = flags.DEFINE_float("fps", 16.0, "Frames per second of a clip; videos are resampled.", lower_bound=0.1)
HEIGHT = flags.DEFINE_integer("height", None, "Pixels, a multiple of 16. Default: 480; with --shapes_world 64.")
WIDTH = flags.DEFINE_integer("width", None, "Likewise; videos are scaled and cut. Default: 832, with --shapes_world 64")
SIZES = flags.DEFINE_string("sizes", None, "Several, as 480x832,832x480: a set each, for videos of the nearest shape.")
CLIPS_PER_VIDEO = flags.DEFINE_integer("clips_per_video", 1, "Most clips to cut from one video.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Clips that the VAE encodes at once.", lower_bound=1)
TEXT_BATCH_SIZE = flags.DEFINE_integer("text_batch_size", 8, "Texts that umT5 encodes at once.", lower_bound=1)
VAE_GIB = command_line.define_vae_gib()
SHARD_SIZE = flags.DEFINE_integer("shard_size", 64, "Clips or prompts a file; what a kill can lose.", lower_bound=1)
SHARD = flags.DEFINE_string(
    "shard", None, "i/n: the part of machine i of n, from 0. Default: by the process, on a pod."
)
MERGE = flags.DEFINE_bool("merge", False, "Instead of encoding: finish the set whose parts are all in --out.")
connect_hosts = command_line.define_hosts()


def check_flags() -> None:
    """Raise a UserError that names the flag to mend."""
    command_line.check_given((OUT,) if MERGE.value else (WEIGHTS, OUT))
    if SHAPES_WORLD.value and (PROMPTS.value or VIDEOS.value or CAPTIONS.value):
        raise UserError("--shapes_world needs no files: leave out --videos, --captions and --prompts.")
    if SHAPES_WORLD.value and not CLIPS.value:
        raise UserError("--clips is missing: how many clips of --shapes_world to draw.")
    if alone := [flag for flag in (CLIPS, PROMPT_COUNT, STYLE) if flag.value is not None and not SHAPES_WORLD.value]:
        raise UserError(f"--{alone[0].name} only goes with --shapes_world.")
    if not (SHAPES_WORLD.value or MERGE.value) and bool(PROMPTS.value) == bool(VIDEOS.value or CAPTIONS.value):
        raise UserError("give either --prompts, or --videos or --captions or both.")
    if SIZES.value and (PROMPTS.value or SHAPES_WORLD.value or HEIGHT.value or WIDTH.value):
        raise UserError("--sizes is for videos, and instead of --height and --width: leave out the other.")


def main() -> None:
    """Encode what the flags ask for and report what was left out."""
    check_flags()
    if MERGE.value:
        print(encode_jobs.report(set_finish.merge_all(OUT.value)))
        return
    connect_hosts()
    part = set_finish.read_part(SHARD.value) if SHARD.value else set_finish.part_of_process()
    usual = world_clips.WORLD_SIZE if SHAPES_WORLD.value else inputs.WAN_SIZE
    size = {flag.name: usual[flag.name] if flag.value is None else flag.value for flag in (FRAMES, FPS, HEIGHT, WIDTH)}
    if SHAPES_WORLD.value:
        job = encode_jobs.world_job(OUT.value, CLIPS.value, PROMPT_COUNT.value, style=STYLE.value, **size)
    elif PROMPTS.value:
        job = encode_jobs.prompts_job(PROMPTS.value, OUT.value)
    else:
        size |= {"sizes": SIZES.value, "clips_per_video": CLIPS_PER_VIDEO.value}
        job = encode_jobs.videos_job(CAPTIONS.value, VIDEOS.value, OUT.value, **size)
    tokenizer = convert.load_tokenizer(WEIGHTS.value)
    tokenizer.tell_what_is_cut(job.texts)
    # As Wan runs it. A CPU gains nothing from products in bfloat16, nor does the world's tiny encoder.
    dtype = jnp.float32 if SHAPES_WORLD.value or jax.default_backend() == "cpu" else jnp.bfloat16
    umt5, turns = convert.load_umt5(WEIGHTS.value, dtype, WHICH.value), not (PROMPTS.value or SHAPES_WORLD.value)
    how = {"text": encoding.text_encoder(umt5, tokenizer, takes_turns=turns), "text_batch_size": TEXT_BATCH_SIZE.value}
    if not PROMPTS.value:
        vae = convert.load_vae(WEIGHTS.value, key=WHICH.value)
        how |= {"vae": encoding.video_encoder(vae, memory_gib=VAE_GIB.value), "batch_size": BATCH_SIZE.value}
    with tqdm(total=job.records, unit="record") as bar:
        how |= {"shard_size": SHARD_SIZE.value, "part": part, "say": partial(bar.write, file=sys.stderr)}
        summaries = job.encode(**how, on_progress=bar.update)
    print(encode_jobs.report(set_finish.merged_on_pod(summaries), part, job.left_out))


if __name__ == "__main__":
    command_line.run(leaving_at_once(main))

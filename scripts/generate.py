"""Generate videos from prompts, with a few-step student or with Wan's own sampling.

  python scripts/generate.py --checkpoint runs/avd --weights runs/wan --prompt "Panda playing the guitar" --out out
  python scripts/generate.py --weights runs/wan --solver unipc --steps 50 --guidance_scale 5 --prompts prompts.txt \
      --seed 0,1,2 --out out
  python scripts/generate.py --from_json out/VIDEO.json --out again

--weights is a folder in any known layout with VAE, text encoder and tokenizer, and the transformer if no
--checkpoint names one. --out gets an .mp4 and a .json for each video, and contact sheets. A file's name ends in the
seed and a hash of the settings: other settings never overwrite a video, and the same command resumes after an
interruption. A prompt and seed give the same video in every batch and on any number of devices, up to rounding. On
several hosts the same command is started on each, with --out on a disk that all share (docs/pods.md).

If a frame interpolator lies with the student, or with --weights, the first half of its steps is at half rate, on every
second latent frame, which costs a third; --half_rate_steps 0 does without.
"""

import shlex
import sys

from absl import flags
from tqdm import tqdm

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.generation.prompt_cache import default_folder
from avd_jax.generation.run import generate, make_plan, steps
from avd_jax.generation.sampling import generation_mesh
from avd_jax.generation.settings import Options, from_record_file, make_jobs, resolve
from avd_jax.parallel.hosts import is_first, leaving_at_once
from avd_jax.paths import any_path

WEIGHTS = command_line.weights_flag("weights", "VAE, text encoder, tokenizer (and transformer), in any layout.")
CHECKPOINT = command_line.weights_flag("checkpoint", "Student: a training run or checkpoint, an export, a model.pt.")
PROMPT = flags.DEFINE_string("prompt", None, "What to show.")
PROMPTS = command_line.path_flag("prompts", None, "Prompts: text with one a line, JSON, JSON lines, CSV or TSV.")
FROM_JSON = command_line.path_flag("from_json", None, "The .json beside a video, to make that video again.")
OUT = command_line.path_flag("out", None, "Folder for the videos.")
SEED = flags.DEFINE_list("seed", ["0"], "Seeds, separated by commas; every prompt is sampled with each.")
SAMPLES = flags.DEFINE_integer("samples", 1, "Videos for each seed s: the seeds s, s+1, ... so many.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Videos to sample together, at least one on every device.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the transformer.")
SEQ = flags.DEFINE_integer("seq", None, "Devices that share a video. Default: 1, more if there are fewer videos.")
PROMPT_CACHE = command_line.disk_flag("prompt_cache", str(default_folder()), "Keeps prompts' embeddings; empty: none.")
VAE_GIB = command_line.define_vae_gib()
connect_hosts = command_line.define_hosts()
DECISIVE, given_decisive = command_line.define_sampling()  # these decide the video


def main() -> None:
    """Resolve the flags, make what is missing, and say where it is."""
    if BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size {BATCH_SIZE.value}: give at least 1")
    connect_hosts()
    notes: list[str] = []
    given = given_decisive()
    if FROM_JSON.value:
        unused = [name for name in DECISIVE if given[name] is not None and name != "lora"]
        unused += [flag.name for flag in (PROMPT, PROMPTS, SEED, SAMPLES) if flag.present]
        if unused:
            raise UserError(f"--{unused[0]}: --from_json takes it from {FROM_JSON.value}; leave it out")
        paths = {"weights": WEIGHTS.value, "checkpoint": CHECKPOINT.value, "lora": given["lora"]}
        settings, *jobs, fingerprints = from_record_file(FROM_JSON.value, **paths)
    else:
        asked = {"prompt": PROMPT.value, "prompts": PROMPTS.value, "seeds": SEED.value, "samples": SAMPLES.value}
        jobs, fingerprints = make_jobs(**asked), None
        settings = resolve(Options(weights=WEIGHTS.value, checkpoint=CHECKPOINT.value, **given), note=notes.append)
    plan = make_plan(settings, jobs, any_path(OUT.value), fingerprints=fingerprints)
    mesh = generation_mesh(len(plan.todo), plan.parts.transformer.config.num_heads, fsdp=FSDP.value, seq=SEQ.value)
    batches = {"mesh": mesh, "batch_size": BATCH_SIZE.value}
    for note in [*notes, *plan.notes] if is_first() else ():
        print(note)
    there, quiet = len(jobs) - len(plan.todo), not is_first()
    videos = tqdm(total=len(jobs), initial=there, unit="video", disable=quiet)
    with videos, tqdm(total=steps(plan, **batches), unit="step", leave=False, disable=quiet) as passes:
        bars = {"on_progress": videos.update, "on_step": passes.update, "vae_gib": VAE_GIB.value}
        generate(plan, **batches, command=shlex.join(sys.argv), prompt_cache=PROMPT_CACHE.value, **bars)
    if is_first():
        print(f"{OUT.value}: {len(plan.todo)} made, {there} there already ({settings.solver}, {settings.steps} steps)")


if __name__ == "__main__":
    command_line.run(leaving_at_once(main), required=(OUT,))

"""Serve a page: prompts to videos, or a blind vote on the videos of several methods.

  python scripts/serve.py --checkpoint runs/avd --weights runs/wan
  python scripts/serve.py --compare ours=out/a theirs=out/b dmd=out/c --votes votes.jsonl
  python scripts/serve.py --votes votes.jsonl --report results.html

The first makes videos with a student, with its teacher, or with both side by side; without --checkpoint with the
teacher alone. The models stay in memory. It works beside a running training: each video is made by the newest
checkpoint. With the second, people vote on pairs of videos of the same prompt and seed without knowing whose they are;
the third prints what it came to and writes it as a page.

A page is on this machine only (127.0.0.1) unless --host says otherwise. Nothing comes from the network.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.generation.prompt_cache import default_folder
from avd_jax.generation.settings import Options
from avd_jax.generation.warm import WarmModels
from avd_jax.paths import any_path
from avd_jax.serving.server import App, Server
from avd_jax.serving.studio import Studio, models_of
from avd_jax.serving.study import BlindStudy, named_folders
from avd_jax.serving.vote_report import results_text, write_results
from avd_jax.serving.votes import VoteFile

WEIGHTS = command_line.weights_flag("weights", "VAE, text encoder, tokenizer (and teacher), in any layout.")
CHECKPOINT = command_line.weights_flag("checkpoint", "Student: a training run or checkpoint, an export, a model.pt.")
WHICH = command_line.define_which()
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "The teacher's. Default: the student's training's, else 5.")
SHIFT = flags.DEFINE_float("shift", None, "The teacher's timestep shift. Default: the student's training's, else 5.")
OUT = command_line.disk_flag("out", "served", "Folder for the videos that are made.")
PROMPT_CACHE = command_line.disk_flag("prompt_cache", str(default_folder()), "Keeps prompts' embeddings; empty: none.")
VAE_GIB = command_line.define_vae_gib()
COMPARE = flags.DEFINE_string("compare", None, "NAME=FOLDER of a method's videos; further ones may follow it.")
VOTES = command_line.disk_flag("votes", None, "File of the votes; one that is there is continued.")
REPORT = command_line.disk_flag("report", None, "Write the results of --votes to this page, print them, and stop.")
SEED = flags.DEFINE_integer("seed", 0, "Of the vote: decides the order and the sides of the pairs.")
PER_PAIR = flags.DEFINE_integer("per_pair", 3, "People who should vote on each pair.", lower_bound=1)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Name or address to listen on; 0.0.0.0 is reached from everywhere.")
PORT = flags.DEFINE_integer("port", 7860, "Port to listen on; 0 takes a free one.", lower_bound=0)


def main(more: list[str]) -> None:
    """Serve what the flags ask for."""
    if more and not COMPARE.value:
        raise UserError(f"{more[0]!r} is not a flag; every argument has a name, and text needs quotes (see --help)")
    if sum(map(bool, (WEIGHTS.value, COMPARE.value, REPORT.value))) != 1:
        raise UserError("give one of --weights (and --checkpoint) to make videos, --compare to vote, --report")
    if WEIGHTS.value:
        return serve_studio()
    if not VOTES.value:
        raise UserError(f"--votes is missing: {flags.FLAGS['votes'].help}")
    return write_report() if REPORT.value else serve_vote([COMPARE.value, *more])


def serve_studio() -> None:
    """Serve the page of prompts."""
    command_line.keep_programs()
    given = {"which": WHICH.value, "guidance_scale": GUIDANCE_SCALE.value, "shift": SHIFT.value}
    student, teacher = models_of(Options(weights=WEIGHTS.value, checkpoint=CHECKPOINT.value, **given))
    models = WarmModels(prompt_cache=Path(PROMPT_CACHE.value) if PROMPT_CACHE.value else None, vae_gib=VAE_GIB.value)
    studio = Studio(student, teacher, out=any_path(OUT.value), models=models, command=shlex.join(sys.argv))
    server = listen(studio.app())
    print(f"videos from prompts: {server.url}", flush=True)
    server.serve()


def serve_vote(arguments: list[str]) -> None:
    """Serve the vote."""
    study = BlindStudy(named_folders(arguments), Path(VOTES.value), seed=SEED.value, per_pair=PER_PAIR.value)
    server = listen(study.app())
    print(f"{len(study.pairs)} pairs to vote on: {server.url}")
    print(f"results, not for those who vote: {server.url}{study.report_name}", flush=True)
    server.serve()


def write_report() -> None:
    """Write and print what a vote came to."""
    page, votes = command_line.page_named(REPORT), VoteFile(Path(VOTES.value))
    write_results(votes, page)
    print(results_text(votes))


def listen(app: App) -> Server:
    """Open the port, and say who can reach it."""
    server = Server(app, host=HOST.value, port=PORT.value)
    if not server.is_local:
        print(f"--host {HOST.value}: everybody who reaches this machine can use the page; it asks for no password")
    return server


if __name__ == "__main__":
    command_line.run_with_arguments(main)

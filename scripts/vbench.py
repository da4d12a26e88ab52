"""VBench and VBench-2.0: videos under the names their tools want, a preflight, their totals, and leaked prompts.

  python scripts/vbench.py export --suite vbench --info VBench_full_info.json --checkpoint runs/avd --weights W --out X
  python scripts/vbench.py check --suite vbench --info VBench_full_info.json --videos X
  python scripts/vbench.py measure --suite vbench --info VBench_full_info.json --videos X --models WEIGHTS --out M
  python scripts/vbench.py score --suite vbench --results X/results --beside OTHER/results
  python scripts/vbench.py leakage --prompts train.txt --against VBench_full_info.json VBench2_full_info.json

export makes 5 or 25 videos a prompt (vbench2: 3 or 20) and writes run.sh, which scores them with the official tool in
an environment of its own; --dry_run only says how many, how long and how large. The same command resumes, and on
several hosts each makes its share. measure computes five of VBench's dimensions here, as far as --models has their
networks, and writes results for score. check and leakage exit with 1 if they find something, and score if there is no
total. The lists of prompts come from the suites' repository (docs/evaluation.md).
"""

from functools import partial

from absl import flags

from avd_jax import command_line
from avd_jax.command_line import Command, disk_flag, path_flag, weights_flag
from avd_jax.evaluation.vbench.suites import SUITES
from avd_jax.experiments import vbench_commands
from avd_jax.generation.prompt_cache import default_folder
from avd_jax.parallel.hosts import leaving_at_once

SUITE = flags.DEFINE_enum("suite", None, tuple(SUITES), "Which of the two.")
INFO = disk_flag("info", None, "The suite's list of prompts, VBench_full_info.json or VBench2_full_info.json.")
DIMENSIONS = flags.DEFINE_list("dimensions", None, "Some of the suite's dimensions, by commas. Default: all.")
LIMIT = flags.DEFINE_integer("limit", None, "The first so many prompts of each folder. Default: all.", lower_bound=1)
OUT = disk_flag(
    "out", None, "Folder of the export, or of measured results; of leakage a file for the texts that are not alike."
)
WEIGHTS = weights_flag("weights", "VAE, text encoder, tokenizer (and transformer), in any layout.")
CHECKPOINT = weights_flag("checkpoint", "Student: a training run or checkpoint, an export, a model.pt.")
NAME = flags.DEFINE_string("name", None, "The model's name in the paths. Default: that of --checkpoint, or --weights.")
SEED = flags.DEFINE_integer("seed", 0, "Of the export; each video has one that follows from it.")
PROMPT_FILE = path_flag("prompt_file", None, "Extended prompts to sample from, one for each of the list's entries.")
PROMPT_ORDER = path_flag("prompt_order", None, "The suite's prompts in --prompt_file's order. Default: the list's.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what there is to do; with --json also every file.")
SECONDS = flags.DEFINE_float("seconds_a_video", None, "That a host takes, for --dry_run. Default: as measured.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Videos that a host samples together.", lower_bound=1)
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices of a host that share one copy of the transformer.")
SEQ = flags.DEFINE_integer("seq", None, "Devices of a host that share a video. Default: 1, or more for few videos.")
PROMPT_CACHE = disk_flag("prompt_cache", str(default_folder()), "Keeps prompts' embeddings; empty: none.")
VAE_GIB = command_line.define_vae_gib()
VIDEOS = disk_flag("videos", None, "An export, or another folder with the suite's folders or with all videos.")
MODELS = disk_flag("models", None, "Folder with DINO, CLIP, RAFT and the aesthetic head, as ~/.cache/vbench has them.")
RESULTS = disk_flag("results", None, "Folder of the official tool's result files.")
BESIDE = disk_flag("beside", None, "Results of other videos, to compare with.")
PROMPTS = path_flag("prompts", None, "Texts of a training: a list of prompts or captions, or an encoded set.")
AGAINST = path_flag("against", None, "Lists that a model will be judged by; further ones may follow.")
JSON = disk_flag("json", None, "A file for all of it.")
connect_hosts = command_line.define_hosts()
SAMPLING, given_sampling = command_line.define_sampling()

EXPORT = ("dimensions", "limit", "checkpoint", "weights", "name", "seed", "prompt_file", "prompt_order", "dry_run")
EXPORT += (
    "seconds_a_video",
    "batch_size",
    "fsdp",
    "seq",
    "prompt_cache",
    "vae_gib",
    "json",
    *command_line.HOSTS,
    *SAMPLING,
)


def export() -> None:
    """Join the other hosts, if there are any, and export."""
    if not DRY_RUN.value:
        connect_hosts()
    vbench_commands.export(flags.FLAGS, given_sampling())


COMMANDS = {
    "export": Command(leaving_at_once(export), ("suite", "info", "out"), EXPORT),
    "check": Command(
        partial(vbench_commands.check, flags.FLAGS), ("suite", "info", "videos"), ("dimensions", "limit", "json")
    ),
    "measure": Command(
        partial(vbench_commands.measure, flags.FLAGS),
        ("suite", "info", "videos", "out"),
        ("models", "dimensions", "limit"),
    ),
    "score": Command(partial(vbench_commands.score, flags.FLAGS), ("suite", "results"), ("beside", "json")),
    "leakage": Command(
        partial(vbench_commands.leakage, flags.FLAGS), ("prompts", "against"), ("json", "out"), more=True
    ),
}

if __name__ == "__main__":
    command_line.run_commands(COMMANDS)

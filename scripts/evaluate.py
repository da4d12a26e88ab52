"""Measure videos, and show them on a page: metrics.json and report.html (metrics: avd_jax/evaluation/).

  python scripts/evaluate.py --videos out/ --out out/evaluation
  python scripts/evaluate.py --checkpoint runs/tiny --weights weights/tiny --beside_teacher --out runs/tiny
  python scripts/evaluate.py --weights weights/tiny --steps 50 --guidance_scale 3 --shift 3 --out runs/teacher

The first measures any videos; captions are those of scripts/generate.py's JSON files, or of a captions.jsonl with one
{"file": "a.mp4", "caption": "..."} a line. The others let a student or a teacher (UniPC) make videos for held-out
captions of the built-in world, whose metrics know the scene; the student also with its half-rate steps. It resumes.
"""

import math
from functools import partial

from absl import flags
from tqdm import tqdm

from avd_jax import command_line
from avd_jax.convert.layouts import student_settings
from avd_jax.data.world_clips import WORLD_SIZE
from avd_jax.errors import UserError
from avd_jax.experiments.comparison import REAL, compare
from avd_jax.experiments.held_out import drawn_videos, make_videos, ways_of_a_student
from avd_jax.experiments.videos import videos_in
from avd_jax.generation.settings import Options, resolve
from avd_jax.paths import any_path

VIDEOS = command_line.path_flag("videos", None, "Folder of videos to measure, instead of weights.")
CAPTIONS = command_line.path_flag("captions", None, "Their captions. Default: captions.jsonl, or the JSON beside each.")
WEIGHTS = command_line.weights_flag("weights", "VAE, text encoder, tokenizer (and transformer), in any layout.")
CHECKPOINT = command_line.weights_flag("checkpoint", "Student: a training run or checkpoint, an export, a model.pt.")
WHICH = command_line.define_which()
BESIDE_TEACHER = flags.DEFINE_bool("beside_teacher", False, "Also the teacher: with --steps, and with the student's.")
STEPS = flags.DEFINE_integer("steps", 50, "UniPC steps of the teacher.", lower_bound=1)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "The teacher's. Default: the student's training's, else 5.")
STUDENT_STEPS = flags.DEFINE_multi_string("student_steps", None, "Of a student that serves fewer, such as 1,2,4.")
SHIFT = flags.DEFINE_float("shift", None, "The teacher's timestep shift. Default: the student's training's, else 5.")
COUNT = flags.DEFINE_integer("count", 100, "Held-out captions.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 10, "Videos to sample together.", lower_bound=1)
OF_MADE = CHECKPOINT, WHICH, BESIDE_TEACHER, STEPS, GUIDANCE_SCALE, STUDENT_STEPS, SHIFT, COUNT, BATCH_SIZE
SHOWN = ("alignment", "instance_preservation", "saturation")
OUT = command_line.path_flag("out", None, "Folder for metrics.json, report.html and the videos that are made.")


def check_flags() -> None:
    """Raise a UserError that names the flag to mend."""
    if bool(VIDEOS.value) == bool(WEIGHTS.value):
        raise UserError("give either --videos with a folder of them, or --weights (and --checkpoint) to make some")
    if CAPTIONS.value and not VIDEOS.value:
        raise UserError("--captions: only goes with --videos; videos that are made have held-out captions")
    if given := [flag.name for flag in OF_MADE if VIDEOS.value and flag.present]:
        raise UserError(f"--{given[0]}: only goes with --weights; leave it out")
    if given := [flag.name for flag in (BESIDE_TEACHER, STUDENT_STEPS) if flag.value and not CHECKPOINT.value]:
        raise UserError(f"--checkpoint is missing: the student that --{given[0]} is about")


def settings_of_sets() -> dict[str, Options]:
    """Return what the flags ask to be made: name of a set -> how."""
    student = (student_settings(CHECKPOINT.value) if CHECKPOINT.value else None) or {}
    shared = {"weights": WEIGHTS.value, **{name: student.get(name, WORLD_SIZE[name]) for name in WORLD_SIZE}}
    given = {"guidance_scale": GUIDANCE_SCALE.value, "shift": SHIFT.value}
    teacher = {"solver": "unipc", **shared, **{n: student.get(n) if v is None else v for n, v in given.items()}}
    if not CHECKPOINT.value:
        return {f"teacher, {STEPS.value}x2 steps": Options(**teacher, which=WHICH.value, steps=STEPS.value)}
    options = Options(**shared, checkpoint=CHECKPOINT.value, which=WHICH.value, solver="student")
    sets = ways_of_a_student(options, command_line.numbers_of(STUDENT_STEPS) or [None])
    if BESIDE_TEACHER.value:
        made = dict.fromkeys([STEPS.value, *(resolve(one, note=str).steps for one in sets.values())])
        return {f"teacher, {n}x2 steps": Options(**teacher, steps=n) for n in made} | sets
    return sets


def main() -> None:
    """Make the videos that are asked for, measure, and say where the page is."""
    check_flags()
    command_line.keep_programs()
    out = any_path(OUT.value)
    if VIDEOS.value:
        sets = {"videos": videos_in(any_path(VIDEOS.value), any_path(CAPTIONS.value) if CAPTIONS.value else None)}
        about = f"Videos of {VIDEOS.value}."
    else:
        asked, sets = settings_of_sets(), {}
        for name, options in asked.items():
            with tqdm(total=COUNT.value, desc=name, unit="video", delay=1) as bar:  # not before an error
                make = partial(make_videos, batch_size=BATCH_SIZE.value, on_progress=bar.update)
                sets[name] = make(options, COUNT.value, out / "videos").videos
        size = {name: getattr(options, name) for name in WORLD_SIZE}
        sets = {REAL: drawn_videos(COUNT.value, out / "videos" / REAL, **size)} | sets
        about = "For captions that no training has seen; each model's video starts from the same noise."
    run = any_path(CHECKPOINT.value) if CHECKPOINT.value else None
    with tqdm(total=sum(map(len, sets.values())), desc="metrics", unit="video") as bar:
        means = compare(sets, out, title="Evaluation", about=about, run=run, on_progress=bar.update)
    for name, values in means.items():
        shown = {metric: values[metric] for metric in SHOWN if not math.isnan(values.get(metric, math.nan))}
        print(f"{name}: {', '.join(f'{metric} {value:.3f}' for metric, value in shown.items())}")
    print(f"{out / 'report.html'}")


if __name__ == "__main__":
    command_line.run(main, required=(OUT,))

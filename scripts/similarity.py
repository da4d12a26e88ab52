"""How alike neighbouring frames are in a model's predictions at each denoising step: a page of violins (Fig. 15).

  python scripts/similarity.py --weights weights/tiny --checkpoint runs/tiny --beside_teacher --out runs/tiny/similarity
  python scripts/similarity.py --weights /weights/Wan2.1-T2V-1.3B --prompts prompts.txt --count 8 --out out/similarity

Samples the prompts, decodes nothing, and writes similarity.html, a page that needs nothing else, and similarity.json.
Without --checkpoint it is the teacher that samples, with UniPC and guidance; a student makes all its steps at the full
frame rate. Without --prompts the captions are those of the built-in world that no training has seen. Prompt number i is
sampled with seed i, by every model.
"""

from dataclasses import replace

from absl import flags

from avd_jax import command_line
from avd_jax.convert.layouts import student_settings
from avd_jax.data.world_clips import WORLD_SIZE
from avd_jax.errors import UserError
from avd_jax.experiments import similarity
from avd_jax.experiments.held_out import captions
from avd_jax.generation.predictions import steps_of
from avd_jax.generation.run import open_for
from avd_jax.generation.settings import Job, Options, make_jobs, resolve
from avd_jax.paths import any_path

WEIGHTS = command_line.weights_flag("weights", "VAE, text encoder, tokenizer (and transformer), in any layout.")
CHECKPOINT = command_line.weights_flag("checkpoint", "Student: a training run or checkpoint, an export, a model.pt.")
BESIDE_TEACHER = flags.DEFINE_bool("beside_teacher", False, "Also the teacher, of --weights.")
PROMPTS = command_line.path_flag("prompts", None, "Prompts: text with one a line, JSON, JSON lines, CSV or TSV.")
COUNT = flags.DEFINE_integer("count", 16, "Prompts: the first so many.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Videos to sample together.", lower_bound=1)
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share one copy of the transformer.")
OUT = command_line.path_flag("out", None, "Folder for similarity.html and similarity.json.")
_, given_sampling = command_line.define_sampling()
OF_TEACHER = ("steps", "shift", "guidance_scale", "negative_prompt")


def asked() -> dict[str, Options]:
    """Return name of a model -> how it samples."""
    given = given_sampling() | {"weights": WEIGHTS.value}
    size = {name: given[name] or (None if PROMPTS.value else value) for name, value in WORLD_SIZE.items()}
    if not CHECKPOINT.value:
        if BESIDE_TEACHER.value:
            raise UserError("--beside_teacher: needs --checkpoint, the student")
        return {"teacher": Options(**given | size)}
    of_teacher = {name: given.pop(name) for name in OF_TEACHER}
    if not BESIDE_TEACHER.value and any(value is not None for value in of_teacher.values()):
        raise UserError(f"--{next(n for n in OF_TEACHER if of_teacher[n] is not None)}: is the teacher's; leave it out")
    trained = student_settings(CHECKPOINT.value) or {}
    made = {name: value if given[name] else trained.get(name, value) for name, value in size.items()}
    student = Options(**given | made | {"checkpoint": CHECKPOINT.value, "solver": "student", "half_rate_steps": 0})
    if not BESIDE_TEACHER.value:
        return {"student": student}
    guided = {name: trained.get(name) for name in ("shift", "guidance_scale")}
    guided |= {name: value for name, value in of_teacher.items() if value is not None}
    solver = {
        "checkpoint": None,
        "which": None,
        "solver": "unipc",
        "half_rate_steps": None,
        "half_rate_positions": None,
    }
    return {"student": student, "teacher": replace(student, **solver | guided)}


def main() -> None:
    """Sample with each model and say where the page is."""
    models = asked()
    if PROMPTS.value:
        prompts = [job.prompt for job in make_jobs(prompt=None, prompts=PROMPTS.value, seeds=["0"], samples=1)]
    else:
        prompts = captions(COUNT.value)
    jobs = [Job(prompt, i) for i, prompt in enumerate(prompts[: COUNT.value])]
    found = {}
    for name, options in models.items():
        settings = resolve(options, note=print)
        opened = open_for(settings, [job.prompt for job in jobs])
        title = f"{name}, {settings.steps} steps"
        found[title] = steps_of(opened, jobs, batch_size=BATCH_SIZE.value, fsdp=FSDP.value)
        first, last = (steps.similarities.mean() for steps in (found[title][0], found[title][-1]))
        print(f"{title}: mean similarity {first:.3f} at the first step, {last:.3f} at the last")
    about = f"{len(jobs)} videos of {settings.frames} frames of {settings.height}x{settings.width} by each model."
    print(similarity.write(found, any_path(OUT.value), about=about))


if __name__ == "__main__":
    command_line.run(main, required=(WEIGHTS, OUT))

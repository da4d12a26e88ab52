"""What a user may ask for, and the settings that it resolves to: all that decides a video beside prompt and seed."""

import hashlib
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import jax
from beartype.door import is_bearable

from avd_jax.convert.adapted import student_with
from avd_jax.convert.adapters import named_adapters, spelled
from avd_jax.convert.architectures import WAN_VAE
from avd_jax.convert.layouts import read_json
from avd_jax.convert.loading import open_interpolator_of
from avd_jax.convert.networks import DEFAULT
from avd_jax.convert.video_size import video_size
from avd_jax.convert.weights import open_weights
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT, read_prompts
from avd_jax.data.records import check_text
from avd_jax.diffusion.student import (
    DEFAULT_HALF_RATE_POSITIONS,
    HALF_RATE_POSITIONS,
    StudentSchedule,
    check_half_rate,
)
from avd_jax.diffusion.unipc import unipc_schedule
from avd_jax.errors import UserError, closest
from avd_jax.generation.pipeline import MAX_SEED
from avd_jax.models.low_bit import KINDS
from avd_jax.paths import any_path, weights_path

SOLVERS = ("student", "unipc")
DTYPES = ("float32", "bfloat16")

# Wan2.1's own defaults for text to video at 480p.
WAN_SIZE = {"frames": 81, "height": 480, "width": 832, "fps": 16.0}
WAN_STEPS, WAN_SHIFT, WAN_GUIDANCE_SCALE = 50, 5.0, 5.0

Number = float | int


@dataclass(frozen=True)
class Options:
    """What a user asks for; None stands for the default, which `resolve` fills in.

    Attributes:
      weights: VAE, text encoder, tokenizer, and the transformer if there is no checkpoint.
      checkpoint: a student transformer: training run, export, or AVD's model.pt.
      which: network of a training run or of a file that holds several, as `key` of `convert.load_dit`.
      lora: adapters that are merged into the transformer, as in `convert.load_dit`. One that an export made of a
        student makes its teacher that student.
      solver: one of SOLVERS.
      steps: of the unipc solver, or how many of its first steps a student is to make that serves fewer (rCM).
      shift, guidance_scale, negative_prompt: of the unipc solver only.
      half_rate_steps: first steps of a student at half the frame rate; by default those that its training made so,
        else the first half of them, if there is an interpolator.
      half_rate_positions: of the frames in the rotary embedding at these steps, a key of HALF_RATE_POSITIONS.
      frames, height, width, fps: of the videos.
      dtype: in which transformer and text encoder compute.
      weights_dtype: in which the transformer's blocks are held, a key of `low_bit.KINDS`; None: `dtype`.
    """

    weights: str | None = None
    checkpoint: str | None = None
    which: str | None = None
    lora: str | None = None
    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    half_rate_steps: int | None = None
    half_rate_positions: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    dtype: str | None = None
    weights_dtype: str | None = None


@dataclass(frozen=True)
class Settings:
    """What decides a video beside its prompt and seed, nothing left open; attributes as in `Options`.

    Attributes:
      timesteps: what the network is told at each step.
      shift, guidance_scale, negative_prompt: None for a student, which has none.
      half_rate_positions: None without half-rate steps.
    """

    weights: str
    checkpoint: str | None
    which: str
    solver: str
    steps: int
    timesteps: tuple[Number, ...]
    shift: Number | None
    guidance_scale: Number | None
    negative_prompt: str | None
    frames: int
    height: int
    width: int
    fps: Number
    dtype: str
    half_rate_steps: int = 0
    half_rate_positions: str | None = None
    weights_dtype: str | None = None
    lora: str = ""

    def __post_init__(self):
        for name in ("frames", "height", "width", "steps"):
            _check_positive(name, getattr(self, name))
        _check("fps", self.fps, 0.1 <= self.fps <= 1000, "give a number from 0.1 to 1000")
        _check("solver", self.solver, self.solver in SOLVERS, f"give one of {', '.join(SOLVERS)}")
        _check("dtype", self.dtype, self.dtype in DTYPES, f"give one of {', '.join(DTYPES)}")
        kinds = f"give one of {', '.join(KINDS)}, or leave it out"
        _check("weights_dtype", self.weights_dtype, self.weights_dtype in (None, *KINDS), kinds)
        _check("steps", self.steps, self.steps == len(self.timesteps), f"there are {len(self.timesteps)} timesteps")
        most = self.steps if self.solver == "student" else 0
        _check("half_rate_steps", self.half_rate_steps, 0 <= self.half_rate_steps <= most, f"give 0 to {most}")
        if self.solver == "student":
            StudentSchedule(self.timesteps)
        if self.half_rate_steps:
            what = f"give one of {', '.join(HALF_RATE_POSITIONS)}"
            _check(
                "half_rate_positions", self.half_rate_positions, self.half_rate_positions in HALF_RATE_POSITIONS, what
            )
        if self.solver == "unipc":
            _check_shift(self.shift)
            _check("guidance_scale", self.guidance_scale, math.isfinite(self.guidance_scale), "give a finite number")
            _check_text("negative_prompt", self.negative_prompt)

    def digest(self, fingerprints: Mapping[str, str]) -> str:
        """Return the short hash in file names.

        Where the weights lie does not count, only what is in them, with the adapters: `fingerprints`, one a component.
        """
        left_out = ["weights", "checkpoint", "lora"]
        if not self.half_rate_steps:  # as if there were no such steps
            left_out += ["half_rate_steps", "half_rate_positions"]
        if self.weights_dtype is None:
            left_out.append("weights_dtype")
        counted = {name: value for name, value in asdict(self).items() if name not in left_out}
        text = json.dumps({**counted, "fingerprints": dict(fingerprints)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    seed: int


def resolve(options: Options, *, note: Callable[[str], object] = print) -> Settings:
    """Fill in every default.

    The size is the one that the student was trained at, if its checkpoint says so, else the one that the weights were
    made for, if they say so, else Wan's; `note` gets a line if another is asked for than they were made for. A student
    has the timesteps of its checkpoint; if it records none, the authors' are taken and `note` gets a line.

    Raises:
      UserError: naming the option that is wrong, or that does not go with the others.
    """
    if not options.weights:
        raise UserError("--weights is missing: the folder with the VAE, the text encoder and its tokenizer")
    weights = weights_path(options.weights)
    checkpoint = weights_path(options.checkpoint) if options.checkpoint else None
    options = replace(options, weights=weights, checkpoint=checkpoint)
    source, lora = checkpoint or weights, ",".join(spelled(named_adapters(options.lora or "")))
    student = student_with(source, lora)
    if student is not None:
        _check_student(source, student)
    is_student = bool(options.checkpoint) or (lora and student is not None)
    solver = options.solver or ("student" if is_student else "unipc")
    made_for = video_size(checkpoint) or video_size(weights)
    size = WAN_SIZE | made_for | {name: value for name, value in (student or {}).items() if name in WAN_SIZE}
    size |= {name: getattr(options, name) for name in WAN_SIZE if getattr(options, name) is not None}
    if made_for and student is None and made_for != size:
        note(f"{weights} was made for videos of {_shown(made_for)}, not of {_shown(size)}")
    # A CPU gains nothing from bfloat16.
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    shared = {
        "weights": options.weights,
        "checkpoint": options.checkpoint,
        "which": options.which or DEFAULT,
        "lora": lora,
        "solver": solver,
        "dtype": dtype,
        "weights_dtype": options.weights_dtype,
        **size,
    }
    if solver == "student":
        fewer = bool(student and student.get("fewer_steps"))
        for name in ("shift", "guidance_scale", "negative_prompt", *([] if fewer else ["steps"])):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name}: a student's steps are fixed by the schedule it was trained for, and it has no "
                    f"guidance; leave --{name} out, or use --solver unipc"
                )
        timesteps = _student_timesteps(source, student, named=bool(options.checkpoint), note=note)
        steps = _first(options.steps, len(timesteps))
        _check("steps", steps, 1 <= steps <= len(timesteps), f"this student makes 1 to {len(timesteps)}")
        timesteps = timesteps[:steps]
        none = {"shift": None, "guidance_scale": None, "negative_prompt": None}
        half_rate = _half_rate(options, student or {}, len(timesteps), size["frames"], note)
        return Settings(**shared, **none, **half_rate, steps=len(timesteps), timesteps=timesteps)
    if options.half_rate_steps:
        raise UserError("--half_rate_steps: only a student makes steps at half the frame rate; leave it out")
    steps, shift = _first(options.steps, WAN_STEPS), _first(options.shift, WAN_SHIFT)
    _check_positive("steps", steps)  # before the schedule is made of them
    _check_shift(shift)
    return Settings(
        **shared,
        steps=steps,
        timesteps=tuple(unipc_schedule(steps, shift)[0].tolist()),
        shift=shift,
        guidance_scale=_first(options.guidance_scale, WAN_GUIDANCE_SCALE),
        negative_prompt=_first(options.negative_prompt, WAN_NEGATIVE_PROMPT),
    )


def make_jobs(*, prompt: str | None, prompts: str | None, seeds: Sequence[str], samples: int) -> list[Job]:
    """Return the videos that are asked for, prompt by prompt, each once.

    Args:
      prompt: one prompt, or None.
      prompts: a file of prompts (see `read_prompts`), or None.
      seeds: whole numbers as texts.
      samples: videos for each given seed s: those of the seeds s, s + 1, ..., s + samples - 1.

    Raises:
      UserError: naming what is missing or wrong.
    """
    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt with a text, or --prompts with a file of them")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty; describe the video")
    texts = read_prompts(prompts) if prompts is not None else [prompt.strip()]
    for text in texts:
        _check_text("prompt", text)
    _check_positive("samples", samples)
    if not seeds:
        raise UserError("--seed is empty; give whole numbers such as 0,1,2")
    numbers = [seed + i for seed in map(_seed, seeds) for i in range(samples)]
    if max(numbers) > MAX_SEED:
        raise UserError(f"--seed with --samples goes up to {max(numbers)}; seeds end at {MAX_SEED}")
    return list(dict.fromkeys(Job(text, number) for text in texts for number in numbers))


def to_record(settings: Settings, job: Job) -> dict:
    """Return what `from_record_file` reads, as JSON takes it."""
    return {"prompt": job.prompt, "seed": job.seed, "settings": asdict(settings)}


def from_record_file(
    path: str, *, weights: str | None, checkpoint: str | None, lora: str | None = None
) -> tuple[Settings, Job, dict]:
    """Read the JSON file beside a video.

    Args:
      path: the file.
      weights, checkpoint: where they lie now, if not where the file says.
      lora: likewise, with the strengths that they have.

    Returns:
      Its settings, its prompt and seed, and the fingerprints of the weights that made it.

    Raises:
      UserError: not such a file, or one of its entries is not what it should be.
    """
    record = read_json(any_path(path))
    hints = typing.get_type_hints(Settings) | {"timesteps": list[Number]}  # JSON has no tuples
    expected = {"prompt": str, "seed": int, "settings": dict, "fingerprints": dict[str, str]}
    _check_entries(path, record, expected)
    # Those that the records of older versions lack.
    older = {"half_rate_steps": 0, "half_rate_positions": None, "weights_dtype": None, "lora": ""}
    entries = older | record["settings"]
    moved = {"weights": weights, "checkpoint": checkpoint}
    entries |= {name: weights_path(value) for name, value in moved.items() if value} | ({"lora": lora} if lora else {})
    _check_entries(path, entries, hints)
    for name in ("shift", "guidance_scale", "negative_prompt"):
        if (entries[name] is None) != (entries["solver"] == "student"):
            raise UserError(f"{path}: {name}={entries[name]!r} does not go with solver={entries['solver']!r}")
    entries["timesteps"] = tuple(entries["timesteps"])
    try:
        _check("seed", record["seed"], 0 <= record["seed"] <= MAX_SEED, f"give 0 to {MAX_SEED}")
        settings = Settings(**{field.name: entries[field.name] for field in fields(Settings)})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    check_text(path, "the prompt", record["prompt"])
    return settings, Job(record["prompt"], record["seed"]), record["fingerprints"]


def _check_student(source: str, student: Mapping) -> None:
    hints = typing.get_type_hints(Settings)
    optional = (*WAN_SIZE, "half_rate_steps", "half_rate_positions")
    hints["fewer_steps"] = bool
    expected = {name: hints[name] for name in (*optional, "fewer_steps") if name in student}
    expected["timesteps"] = list[Number]
    for name, hint in expected.items():
        if not is_bearable(student.get(name), hint):
            raise UserError(
                f"{source}: its student settings say {name}={student.get(name)!r}; export the student again"
            )


def _student_timesteps(source: str, student: dict | None, *, named: bool, note: Callable) -> tuple[float, ...]:
    if student is None:
        if not named:
            raise UserError(f"--solver student: {source} holds no student; name one with --checkpoint")
        timesteps = StudentSchedule().timesteps
        shown = ", ".join(f"{t:g}" for t in timesteps)
        note(f"{source} records no timesteps; taking those of the authors' students: {shown}")
        return timesteps
    return StudentSchedule(tuple(student["timesteps"])).timesteps


def _half_rate(options: Options, student: Mapping, num_steps: int, frames: int, note: Callable) -> dict:
    """Return half_rate_steps and half_rate_positions, having checked that the steps are possible."""
    asked = options.half_rate_steps
    if asked == 0:
        return {}
    weights = open_interpolator_of(options.checkpoint, options.weights, key=options.which or DEFAULT)
    if weights is None:
        if asked is None:
            return {}
        place = options.checkpoint or options.weights
        raise UserError(
            f"--half_rate_steps {asked}: {place} has no frame interpolator; make one with "
            f"scripts/train_interpolator.py --out {place}, or leave --half_rate_steps out"
        )
    steps = _first(asked, student.get("half_rate_steps") or None, num_steps // 2)
    latent_frames = (frames - 1) // open_weights(options.weights, WAN_VAE, "").config.temporal_stride + 1
    try:
        check_half_rate(steps, num_steps=num_steps, frames=latent_frames)
    except UserError as error:
        if asked is not None:
            raise UserError(f"--{error}") from None
        note(f"all steps are at the full frame rate: {error}")
        return {}
    positions = _first(options.half_rate_positions, student.get("half_rate_positions"), DEFAULT_HALF_RATE_POSITIONS)
    return {"half_rate_steps": steps, "half_rate_positions": positions} if steps else {}


def _check_entries(path: str, entries: Mapping, hints: Mapping) -> None:
    for name, hint in hints.items():
        if name not in entries:
            raise UserError(f"{path}: has no {name!r}{closest(name, entries)}; give a .json that lies beside a video")
        if not is_bearable(entries[name], hint) or isinstance(entries[name], bool):
            raise UserError(f"{path}: {name}={entries[name]!r} is not of the right type; restore the file")


def _shown(size: Mapping) -> str:
    return f"{size['frames']} frames of {size['height']}x{size['width']} at {size['fps']:g} a second"


def _seed(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > MAX_SEED:
        raise UserError(f"--seed {text!r}: give whole numbers from 0 to {MAX_SEED}, separated by commas")
    return int(text)


def _check(name: str, value, holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"--{name} {value}: {what}")


def _check_positive(name: str, value: int) -> None:
    _check(name, value, value >= 1, "give at least 1")


def _check_shift(shift: float) -> None:
    _check("shift", shift, 0 < shift < math.inf, "give a number above 0")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{name} {text!r}: is not valid UTF-8; write it in UTF-8") from None


def _first(*values):
    return next(value for value in values if value is not None)

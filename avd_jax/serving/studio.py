"""The page on which a prompt becomes a video, by a student, its teacher, or both side by side."""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from avd_jax.convert.architectures import WAN_DIT
from avd_jax.convert.layouts import student_settings, training_step
from avd_jax.convert.weights import open_weights
from avd_jax.errors import UserError
from avd_jax.generation.pipeline import MAX_SEED, latents_shape
from avd_jax.generation.run import Opened, check_writable, environment, open_for, video_file, write_with_record
from avd_jax.generation.settings import Job as Video
from avd_jax.generation.settings import Options, Settings, resolve
from avd_jax.generation.warm import WarmModels
from avd_jax.parallel.mesh import filled_up
from avd_jax.serving.jobs import Job, Jobs
from avd_jax.serving.server import App, Reply, as_json, static, text_field

STUDENT, TEACHER = "student", "teacher"
MOST_PROMPT = 2000  # characters; the text encoder reads 512 tokens
MOST_TEACHER_STEPS = 100
MOST_WAITING = 8
SHOWN = 60  # videos of the gallery
TRIES = 3  # to read a checkpoint while a training replaces it
_OURS = re.compile(r"[A-Za-z0-9_-]+\.(mp4|json)")


@dataclass(frozen=True)
class Wish:
    """What a visitor wants; `half_rate` is the student's, `steps` are the teacher's."""

    prompt: str
    seed: int
    models: tuple[str, ...]
    half_rate: bool
    steps: int
    frames: int
    height: int
    width: int


class Studio:
    """Models that stay warm, a queue, and a folder of what was made."""

    def __init__(
        self,
        student: Options | None,
        teacher: Options | None,
        *,
        out: Path,
        models: WarmModels,
        command: str,
        waiting: int = MOST_WAITING,
    ):
        """Open the weights, so that what is wrong with them is known before anybody asks for a video.

        Args:
          student: None without one.
          teacher: None without one.
          out: folder of the videos.
          models: that make them.
          command: for the records.
          waiting: wishes that may wait.

        Raises:
          UserError: weights that are missing or do not fit, or a folder that cannot be written.
        """
        given = {STUDENT: student, TEACHER: teacher}
        self._options = {name: options for name, options in given.items() if options is not None}
        self._out, self._models, self._command = out, models, command
        # As they were at the start, and as they made the last video.
        self._opened = {name: open_for(self._resolve(name, {}, print), []) for name in self._options}
        self._last: dict[str, Opened] = {}
        check_writable(out)
        settings = next(iter(self._opened.values())).settings
        self._size = {name: getattr(settings, name) for name in ("frames", "height", "width")}
        self._jobs = Jobs(self._work, most=waiting)

    def app(self) -> App:
        """Return what the server answers."""
        pages = {"": "studio.html", **{name: name for name in ("studio.js", "page.js", "page.css")}}
        get = {path: static(name) for path, name in pages.items()}
        get |= {"about": lambda rest: as_json(self.about()), "gallery": lambda rest: as_json(self.gallery())}
        get["made"] = self._made
        actions = {"state": self._jobs.state, "cancel": self._jobs.cancel}
        post = {name: lambda posted, act=act: act(posted.get("job")) for name, act in actions.items()}
        return App(get, post | {"make": lambda posted: {"job": self._jobs.add(self.wish(posted))}})

    def about(self) -> dict:
        """Return what the form offers."""
        half_rate = STUDENT in self._opened and bool(self._opened[STUDENT].settings.half_rate_steps)
        teacher = self._opened.get(TEACHER)
        return {
            "models": list(self._options),
            "half_rate": half_rate,
            "steps": teacher.settings.steps if teacher else 1,
            "most_steps": MOST_TEACHER_STEPS,
            "most_prompt": MOST_PROMPT,
            "most_seed": MAX_SEED,
            **self._size,
        }

    def gallery(self) -> list[dict]:
        """Return what was made, the newest first."""
        shown = []
        for video in sorted(self._out.glob("*.mp4"), key=_time, reverse=True):
            if len(shown) == SHOWN:
                break
            try:
                shown.append(_shown(video))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is being written, or is none of ours
        return shown

    def wish(self, posted: Mapping) -> Wish:
        """Return what was posted as a wish that can be fulfilled (UserError that says what cannot be)."""
        models = posted.get("models")
        known = isinstance(models, list) and models and all(name in self._options for name in models)
        if not known or len(set(models)) < len(models):
            raise UserError(f"choose one of {', '.join(self._options)}, or both")
        steps = _whole(posted, "steps", 1, MOST_TEACHER_STEPS) if TEACHER in models else 1
        size = {name: _whole(posted, name, 1, 100_000) for name in self._size}
        for name in models:
            parts = self._opened[name].parts
            latents_shape(**size, dit=parts.transformer.config, vae=parts.vae.config)
        asked, most = (values["frames"] * values["height"] * values["width"] for values in (size, self._size))
        if asked > most:
            normal = "{frames} frames of {height}x{width}".format(**self._size)
            raise UserError(f"that is larger than what the model was made for; ask for {normal} or less in all")
        return Wish(
            prompt=text_field(posted, "prompt", MOST_PROMPT, what="the prompt"),
            seed=_whole(posted, "seed", 0, MAX_SEED),
            models=tuple(models),
            half_rate=posted.get("half_rate") is True,
            steps=steps,
            **size,
        )

    def _work(self, job: Job) -> None:
        for name in job.wish.models:
            job.step = 0
            result = self._video(name, job.wish, job)
            job.results.append(result)

    def _video(self, name: str, wish: Wish, job: Job) -> dict:
        begun = time.monotonic()
        asked = {"frames": wish.frames, "height": wish.height, "width": wish.width}
        if name == TEACHER:
            asked["steps"] = wish.steps
        elif not wish.half_rate:
            asked["half_rate_steps"] = 0
        video = Video(wish.prompt, wish.seed)

        def counted() -> None:
            job.step += 1

        def say(text: str) -> None:
            job.doing = f"{name}: {text}"

        opened = self._open(name, asked, wish.prompt, job.notes.append)
        for left in reversed(range(TRIES)):
            file = video_file(self._out, opened, video)
            job.steps = opened.settings.steps
            if file.is_file() and file.with_suffix(".json").is_file():
                return _shown(file) | {"model": name}
            try:
                pixels = self._models.make(opened, video, on_step=counted, on_phase=say)
                break
            except UserError:
                raise
            except Exception as error:
                if self._models.has(opened) or not left:  # it was read, and something else went wrong
                    raise UserError(f"{self._source(name)}: {_first_line(error)}") from error
            time.sleep(1)  # a training may be putting a newer one in its place
            opened = self._open(name, asked, wish.prompt, job.notes.append, newest=left > 1)
        self._last[name] = opened
        say("writing")
        mesh = self._models.mesh(opened)
        made_with = {"fingerprints": opened.fingerprints, "command": self._command}
        made_with |= environment(mesh, filled_up(1, mesh)) | {"seconds": round(time.monotonic() - begun, 2)}
        write_with_record(file, pixels, opened.settings, video, made_with)
        return _shown(file) | {"model": name}

    def _open(
        self, name: str, asked: Mapping, prompt: str, note: Callable[[str], object], *, newest: bool = True
    ) -> Opened:
        """Open the newest weights; if they cannot be read now, those that are in memory serve on."""
        last, notes = self._last.get(name), []
        fallback = last if last is not None and self._models.has(last) else None
        try:
            if fallback and not newest:
                raise UserError(f"{self._source(name)}: cannot be read now")
            opened = open_for(self._resolve(name, asked, notes.append), [prompt])
        except Exception as error:
            told = error if isinstance(error, UserError) else UserError(f"{self._source(name)}: {_first_line(error)}")
            if fallback is None or asked.get("steps", fallback.settings.steps) != fallback.settings.steps:
                raise told from error
            opened = self._as_before(fallback, asked)
            notes = [f"{told}; made by the {name} that is in memory"]
        for line in [*notes, *opened.notes]:
            note(line)
        return opened

    def _as_before(self, last: Opened, asked: Mapping) -> Opened:
        """Return weights that were opened before with what is asked of them now."""
        changes = dict(asked)
        if changes.get("half_rate_steps") == 0:
            changes["half_rate_positions"] = None
        settings = replace(last.settings, **{name: value for name, value in changes.items() if name != "steps"})
        configs = {"dit": last.parts.transformer.config, "vae": last.parts.vae.config}
        shape = latents_shape(frames=settings.frames, height=settings.height, width=settings.width, **configs)
        return replace(last, settings=settings, shape=shape, notes=[])

    def _resolve(self, name: str, asked: Mapping, note: Callable[[str], object]) -> Settings:
        options = replace(self._options[name], **asked)
        if (
            options.checkpoint
            and Path(options.checkpoint).is_dir()
            and (step := training_step(Path(options.checkpoint)))
        ):
            options = replace(options, checkpoint=str(step))  # the record says which one it was
        return resolve(options, note=note)

    def _source(self, name: str) -> str:
        return self._options[name].checkpoint or self._options[name].weights

    def _made(self, name: str) -> Reply | None:
        return Reply(self._out / name) if _OURS.fullmatch(name) else None


def models_of(options: Options) -> tuple[Options | None, Options | None]:
    """Return the student and the teacher that can be had; guidance and shift are for the teacher.

    The teacher has those that its student was trained with, where none are given, and the student's size.
    """
    guidance = {"guidance_scale": options.guidance_scale, "shift": options.shift}
    if not options.checkpoint:
        return None, replace(options, solver="unipc")
    student = replace(options, solver="student", guidance_scale=None, shift=None)
    try:
        open_weights(options.weights, WAN_DIT)
    except UserError:
        return student, None  # there is only what a student needs
    trained = student_settings(options.checkpoint) or {}
    asked = guidance | {name: getattr(options, name) for name in ("frames", "height", "width", "fps")}
    asked = {name: trained.get(name) if value is None else value for name, value in asked.items()}
    return student, replace(options, checkpoint=None, which=None, solver="unipc", **asked)


def _whole(posted: Mapping, name: str, least: int, most: int) -> int:
    value = posted.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name}: give a whole number from {least} to {most:,}")
    return value


def _shown(video: Path) -> dict:
    """Return what the page says of a video: from the record beside it."""
    record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    settings = record["settings"]
    what = f"student, {settings['steps']} steps"
    if settings["solver"] != "student":
        what = f"teacher, {settings['steps']}x2 steps"
    elif settings.get("half_rate_steps"):
        what += f", {settings['half_rate_steps']} of them at half the frame rate"
    step = Path(settings["checkpoint"] or "").name
    what += f", checkpoint {step}" if step.isdigit() else ""
    size = f"{settings['frames']} frames of {settings['height']}x{settings['width']}"
    return {
        "video": f"made/{video.name}",
        "record": f"made/{video.stem}.json",
        "prompt": str(record["prompt"]),
        "seed": int(record["seed"]),
        "about": f"{what}; {size}",
        "seconds": record.get("seconds"),
        "size": [settings["frames"], settings["height"], settings["width"]],
    }


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

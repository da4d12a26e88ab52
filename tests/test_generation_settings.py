"""Which settings follow from what a user asks for, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from generation_cases import STUDENT

from avd_jax.convert.video_size import video_size, write_video_size
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT
from avd_jax.data.world_clips import WORLD_SIZE
from avd_jax.errors import UserError
from avd_jax.generation.settings import Job, Options, from_record_file, make_jobs, resolve, to_record


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "avd_student.json").write_text(json.dumps(STUDENT))
    return str(folder)


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain").mkdir()
    return str(tmp_path / "plain")


def test_the_teacher_is_sampled_as_wan_does(plain):
    settings = resolve(Options(weights=plain))
    assert (settings.solver, settings.steps, settings.shift, settings.guidance_scale) == ("unipc", 50, 5.0, 5.0)
    assert (settings.frames, settings.height, settings.width, settings.fps) == (81, 480, 832, 16.0)
    assert (settings.negative_prompt, settings.dtype, settings.which) == (WAN_NEGATIVE_PROMPT, "float32", "generator")
    assert len(settings.timesteps) == 50
    assert settings.timesteps[0] == 999


def test_a_student_brings_its_schedule_and_size(student, plain):
    settings = resolve(Options(weights=plain, checkpoint=student))
    assert (settings.solver, settings.steps, settings.timesteps) == ("student", 3, (1000.0, 750.0, 400.0))
    assert (settings.frames, settings.height, settings.width, settings.fps) == (5, 32, 48, 8.0)
    assert (settings.shift, settings.guidance_scale, settings.negative_prompt) == (None, None, None)
    asked = resolve(Options(weights=plain, checkpoint=student, frames=9, fps=24.0))
    assert (asked.frames, asked.height, asked.fps) == (9, 32, 24.0)
    # Its weights can be sampled with many steps too, at the size that it knows.
    many = resolve(Options(weights=plain, checkpoint=student, solver="unipc", steps=2))
    assert (many.solver, many.steps, many.frames) == ("unipc", 2, 5)
    # A student may also stand in the folder of weights.
    assert resolve(Options(weights=student, solver="student")).timesteps == (1000.0, 750.0, 400.0)


def test_a_student_without_records_is_the_authors(plain):
    notes = []
    settings = resolve(Options(weights=plain, checkpoint=plain), note=notes.append)
    assert settings.timesteps == (1000.0, 900.0, 757.0, 522.0)
    assert notes == [f"{plain} records no timesteps; taking those of the authors' students: 1000, 900, 757, 522"]


@pytest.mark.parametrize("change", [{"timesteps": None}, {"timesteps": ["1000"]}, {"frames": 81.5}, {"fps": "16"}])
def test_damaged_student_settings(student, plain, change):
    (name, value), *_ = change.items()
    (Path(student) / "avd_student.json").write_text(json.dumps(STUDENT | change))
    with pytest.raises(UserError) as error:
        resolve(Options(weights=plain, checkpoint=student))
    assert str(error.value) == f"{student}: its student settings say {name}={value!r}; export the student again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps 0: give at least 1"),
        ({"steps": -4}, "--steps -4: give at least 1"),
        ({"shift": 0.0}, "--shift 0.0: give a number above 0"),
        ({"shift": float("nan")}, "--shift nan: give a number above 0"),
        ({"guidance_scale": float("inf")}, "--guidance_scale inf: give a finite number"),
        ({"frames": 0}, "--frames 0: give at least 1"),
        ({"fps": 0.0}, "--fps 0.0: give a number from 0.1 to 1000"),
        ({"negative_prompt": "\udcff"}, r"--negative_prompt '\udcff': is not valid UTF-8; write it in UTF-8"),
        ({"solver": "student"}, "--solver student: {plain} holds no student; name one with --checkpoint"),
        ({"weights": None}, "--weights is missing: the folder with the VAE, the text encoder and its tokenizer"),
    ],
)
def test_what_is_refused(plain, options, message):
    with pytest.raises(UserError) as error:
        resolve(Options(**({"weights": plain} | options)))
    assert str(error.value) == message.format(plain=plain)


@pytest.mark.parametrize("name", ["steps", "shift", "guidance_scale", "negative_prompt"])
def test_a_student_has_no_solver_options(student, plain, name):
    with pytest.raises(UserError, match=f"--{name}: a student's steps are fixed by the schedule"):
        resolve(Options(weights=plain, checkpoint=student, **{name: 1}))


def test_a_student_that_serves_fewer_steps_makes_the_first_ones(student, plain):
    settings = Path(student) / "avd_student.json"
    settings.write_text(json.dumps(STUDENT | {"fewer_steps": True}))

    def made(**options):
        return resolve(Options(weights=plain, checkpoint=student, **options))

    assert made().timesteps == (1000.0, 750.0, 400.0)
    assert made(steps=2).timesteps == (1000.0, 750.0)
    assert (made(steps=1).timesteps, made(steps=1).steps) == ((1000.0,), 1)
    for steps in (0, 4):
        with pytest.raises(UserError, match=f"--steps {steps}: this student makes 1 to 3"):
            made(steps=steps)
    with pytest.raises(UserError, match="--shift: a student's steps are fixed"):
        made(shift=3.0)
    settings.write_text(json.dumps(STUDENT | {"fewer_steps": "yes"}))
    with pytest.raises(UserError, match="fewer_steps='yes'"):
        made()


def test_jobs(tmp_path):
    (tmp_path / "prompts.txt").write_text("b/c\n\n a \nb/c\n")
    jobs = make_jobs(prompt=None, prompts=str(tmp_path / "prompts.txt"), seeds=["7", "8"], samples=2)
    # Overlapping seeds and repeated prompts give each video once.
    assert jobs == [Job(text, seed) for text in ("b/c", "a") for seed in (7, 8, 9)]
    assert make_jobs(prompt=" a ", prompts=None, seeds=["4294967295"], samples=1) == [Job("a", 4294967295)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": None}, "give either --prompt with a text, or --prompts with a file of them"),
        ({"prompts": "x.txt"}, "give either --prompt with a text, or --prompts with a file of them"),
        ({"prompt": " "}, "--prompt is empty; describe the video"),
        ({"prompt": "\udcff"}, r"--prompt '\udcff': is not valid UTF-8; write it in UTF-8"),
        ({"samples": 0}, "--samples 0: give at least 1"),
        ({"seeds": []}, "--seed is empty; give whole numbers such as 0,1,2"),
        ({"seeds": ["-1"]}, "--seed '-1': give whole numbers from 0 to 4294967295, separated by commas"),
        ({"seeds": ["1.5"]}, "--seed '1.5': give whole numbers from 0 to 4294967295, separated by commas"),
        ({"seeds": ["4294967296"]}, "--seed '4294967296': give whole numbers from 0 to 4294967295"),
        ({"seeds": ["4294967295"], "samples": 2}, "--seed with --samples goes up to 4294967296; seeds end at"),
    ],
)
def test_jobs_that_are_refused(asked, message):
    with pytest.raises(UserError) as error:
        make_jobs(**({"prompt": "a", "prompts": None, "seeds": ["0"], "samples": 1} | asked))
    assert str(error.value).startswith(message)


def test_the_digest_follows_what_decides_the_video(plain):
    settings = resolve(Options(weights=plain))
    digest = settings.digest({"vae": "1"})
    assert digest == replace(settings, weights="/elsewhere", checkpoint="moved").digest({"vae": "1"})
    shorter = replace(settings, steps=49, timesteps=settings.timesteps[:49]).digest({"vae": "1"})
    changes = {"guidance_scale": 4.0, "negative_prompt": "", "frames": 85, "fps": 8.0, "dtype": "bfloat16"}
    others = {replace(settings, **{name: value}).digest({"vae": "1"}) for name, value in changes.items()}
    assert len(others | {digest, shorter, settings.digest({"vae": "2"})}) == len(changes) + 3


def written(tmp_path, record):
    (tmp_path / "video.json").write_text(json.dumps(record))
    return str(tmp_path / "video.json")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_record_gives_the_settings_back(tmp_path, student, plain, checkpoint):
    settings, job = resolve(Options(weights=plain, checkpoint=student if checkpoint else None)), Job("a “b”", 3)
    path = written(tmp_path, to_record(settings, job) | {"fingerprints": {"vae": "1"}, "command": "x"})
    assert from_record_file(path, weights=None, checkpoint=None) == (settings, job, {"vae": "1"})
    moved, _, _ = from_record_file(path, weights="new", checkpoint=None)
    assert moved == replace(settings, weights="new")


def test_adapters_are_in_the_settings_and_one_of_a_student_makes_its_teacher_the_student(tmp_path, student, plain):
    lora = Path(student) / "x.safetensors"
    lora.touch()
    settings = resolve(Options(weights=plain, lora=f" {lora},b.safetensors:0.5"))
    assert (settings.solver, settings.timesteps, settings.frames) == ("student", (1000.0, 750.0, 400.0), 5)
    assert settings.lora == f"{lora}:1,b.safetensors:0.5"
    assert settings.digest({"transformer": "1"}) == replace(settings, lora="moved:1").digest({"transformer": "1"})
    path = written(tmp_path, to_record(settings, Job("a", 0)) | {"fingerprints": {"vae": "1"}})
    assert from_record_file(path, weights=None, checkpoint=None)[0] == settings
    assert from_record_file(path, weights=None, checkpoint=None, lora="c:1")[0] == replace(settings, lora="c:1")
    assert resolve(Options(weights=plain, lora="style.safetensors")).solver == "unipc"
    assert resolve(Options(weights=plain, checkpoint=student, lora="style.safetensors")).solver == "student"
    with pytest.raises(UserError, match="the strength 'much' is no number"):
        resolve(Options(weights=plain, lora="style.safetensors:much"))


OF_STUDENT = {
    **{"solver": "student", "steps": 2, "timesteps": [1000, 500]},
    **{"shift": None, "guidance_scale": None, "negative_prompt": None},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "3"}, "seed='3' is not of the right type"),
        ({"seed": True}, "seed=True is not of the right type"),
        ({"fingerprints": None}, "fingerprints=None is not of the right type"),
        ({"settings": {"steps": 0}}, "--steps 0: give at least 1"),
        ({"settings": {"steps": "many"}}, "steps='many' is not of the right type"),
        ({"settings": {"timesteps": 4}}, "timesteps=4 is not of the right type"),
        ({"settings": {"solver": "euler"}}, "--solver euler: give one of student, unipc"),
        ({"settings": {"steps": 7}}, "--steps 7: there are 50 timesteps"),
        ({"settings": {"half_rate_steps": 2}}, "--half_rate_steps 2: give 0 to 0"),
        (
            {"settings": OF_STUDENT | {"timesteps": [900, 950]}},
            "timesteps are [900, 950]: give decreasing numbers, at most 1000",
        ),
        ({"settings": OF_STUDENT | {"half_rate_steps": -1}}, "--half_rate_steps -1: give 0 to 2"),
        ({"settings": {"solver": "student"}}, "shift=5.0 does not go with solver='student'"),
    ],
)
def test_a_damaged_record(tmp_path, plain, change, message):
    record = {"prompt": "a", "seed": 3, "settings": asdict(resolve(Options(weights=plain))), "fingerprints": {}}
    record["settings"] |= change.pop("settings", {})
    with pytest.raises(UserError) as error:
        from_record_file(written(tmp_path, record | change), weights=None, checkpoint=None)
    assert message in str(error.value)
    del record["settings"]["solver"]
    with pytest.raises(UserError, match=r"has no 'solver'; give a \.json that lies beside a video"):
        from_record_file(written(tmp_path, record), weights=None, checkpoint=None)


SMALL = {"frames": 17, "height": 64, "width": 96, "fps": 8.0}


def test_weights_say_what_size_they_were_made_for(student, plain):
    write_video_size(plain, SMALL)
    notes = []
    for options in (Options(weights=plain), Options(weights=plain, checkpoint=f"{plain}")):
        settings = resolve(options, note=notes.append)
        assert {name: getattr(settings, name) for name in SMALL} == SMALL
    assert not any("made for" in note for note in notes)
    # A student says it better.
    assert resolve(Options(weights=plain, checkpoint=student), note=notes.append).frames == 5
    settings = resolve(Options(weights=plain, frames=81, width=832), note=notes.append)
    assert (settings.frames, settings.height, settings.width) == (81, 64, 832)
    assert notes[-1] == (
        f"{plain} was made for videos of 17 frames of 64x96 at 8 a second, not of 81 frames of 64x832 at 8 a second"
    )


def test_the_size_of_weights_is_found_from_their_parts(plain):
    write_video_size(plain, SMALL)
    (Path(plain) / "transformer").mkdir()
    (Path(plain) / "transformer" / "x.safetensors").write_bytes(b"")
    for path in (plain, f"{plain}/transformer", f"{plain}/transformer/x.safetensors"):
        assert video_size(path) == SMALL
    assert video_size(None) == {}
    (Path(plain) / "avd_video.json").write_text('{"frames": 17, "height": "64"}')
    with pytest.raises(UserError, match=r"avd_video.json: height='64' is no size; restore the file, or remove it"):
        resolve(Options(weights=plain))


def test_the_tiny_weights_are_made_for_the_small_world():
    assert video_size(Path(__file__).parents[1] / "weights" / "tiny") == WORLD_SIZE


def test_paths_of_options(student, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = resolve(Options(weights="~/plain", checkpoint=f"file://{student}"))
    assert (settings.weights, settings.checkpoint) == (plain, student)
    with pytest.raises(UserError, match="s3:// is not supported"):
        resolve(Options(weights="s3://Wan-AI/Wan2.1"))


def test_half_a_character_in_a_record_or_a_file_of_prompts(tmp_path, plain):
    record = to_record(resolve(Options(weights=plain)), Job("a \ud83d", 3)) | {"fingerprints": {}}
    with pytest.raises(UserError, match=r"video.json: the prompt is no UTF-8 .*half a character"):
        from_record_file(written(tmp_path, record), weights=None, checkpoint=None)
    (tmp_path / "prompts.jsonl").write_text('"a"\n"b \\ud83d"\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:2: the prompt is no UTF-8"):
        make_jobs(prompt=None, prompts=str(tmp_path / "prompts.jsonl"), seeds=["0"], samples=1)

"""The page of prompts through its server, with a stand-in for the models: jobs, bounds, a checkpoint that vanishes."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from generation_cases import STUDENT, write_dit, write_weights
from test_serving_server import ask, serving

from avd_jax.errors import UserError
from avd_jax.generation.settings import Options
from avd_jax.parallel.mesh import make_mesh
from avd_jax.serving.jobs import Jobs
from avd_jax.serving.studio import Studio, models_of

NASTY = "<script>alert(1)</script> ../../etc/passwd; $(reboot) `id`"
WISH = {"prompt": NASTY, "seed": 3, "models": ["student"], "half_rate": True, "steps": 2}
WISH |= {name: STUDENT[name] for name in ("frames", "height", "width")}


class StandIn:
    """Keeps the fingerprint of what it has, as the models do, and makes black videos."""

    def __init__(self):
        self.there, self.hold, self.fail = {}, threading.Event(), None
        self.hold.set()

    def has(self, opened):
        return self.there.get(opened.settings.solver) == opened.fingerprints["transformer"]

    def mesh(self, opened):
        return make_mesh()

    def make(self, opened, job, *, on_step, on_phase):
        self.hold.wait(10)
        if self.fail:
            raise self.fail
        if not self.has(opened):
            assert opened.parts.transformer.array(next(iter(opened.parts.transformer.leaves))).size
            self.there[opened.settings.solver] = opened.fingerprints["transformer"]
        for _ in range(opened.settings.steps):
            on_step()
        on_phase("decoding")
        settings = opened.settings
        return np.zeros((settings.frames, settings.height, settings.width, 3), np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    return folder


@pytest.fixture
def student(weights, tmp_path):
    return shutil.copytree(weights / "student", tmp_path / "student")


@pytest.fixture
def studio(weights, student, tmp_path):
    chosen = models_of(Options(weights=str(weights / "wan"), checkpoint=str(student)))
    return Studio(*chosen, out=tmp_path / "made", models=StandIn(), command="typed", waiting=2)


@pytest.fixture(scope="module")
def idle(weights, tmp_path_factory):
    """A studio for tests that make nothing with it."""
    chosen = models_of(Options(weights=str(weights / "wan"), checkpoint=str(weights / "student")))
    return Studio(*chosen, out=tmp_path_factory.mktemp("made"), models=StandIn(), command="typed", waiting=2)


def finished(studio, wish):
    job = studio._jobs.add(studio.wish(wish))
    for _ in range(1000):
        state = studio._jobs.state(job)
        if state["status"] in ("done", "failed"):
            return state
        time.sleep(0.01)
    raise AssertionError(state)


def test_a_prompt_becomes_a_video_of_student_and_teacher(studio, tmp_path):
    with serving(studio.app()) as server:
        about = json.loads(ask(server, "/about")[1])
        assert (about["models"], about["half_rate"]) == (["student", "teacher"], False)
        assert (about["frames"], about["height"], about["width"]) == (5, 32, 48)
        job = json.loads(ask(server, "/make", {**WISH, "models": ["student", "teacher"]})[1])["job"]
        state = {"status": ""}
        while state["status"] != "done":
            state = json.loads(ask(server, "/state", {"job": job})[1])
            assert state["status"] in ("waiting", "working", "done"), state
        student, teacher = state["results"]
        assert (student["model"], teacher["model"]) == ("student", "teacher")
        assert student["about"].startswith("student, 3 steps; 5 frames of 32x48")
        assert teacher["about"].startswith("teacher, 2x2 steps")
        assert student["prompt"] == NASTY
        status, content, headers = ask(server, f"/{student['video']}")
        assert (status, headers["Content-Type"], content[4:8]) == (200, "video/mp4", b"ftyp")
        record = json.loads(ask(server, f"/{student['record']}")[1])
        assert (record["prompt"], record["seed"], record["command"]) == (NASTY, 3, "typed")
        assert record["settings"]["checkpoint"] == str(tmp_path / "student")
        shown = json.loads(ask(server, "/gallery")[1])
        assert {entry["video"] for entry in shown} == {student["video"], teacher["video"]}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "made", tmp_path / "student"], "nothing lies elsewhere"


def test_only_what_was_made_is_shown(studio, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "made" / "broken.mp4").write_bytes(b"")
    (tmp_path / "made" / "broken.json").write_text("[")
    with serving(studio.app()) as server:
        for path in ("/made/../secret.json", "/made/%2e%2e%2fsecret.json", "/made/", "/made/.hidden.mp4", "/made/x.py"):
            assert ask(server, path)[0] == 404, path
        assert ask(server, "/gallery")[1] == b"[]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 100_000}, "the prompt has 100,000 characters; write 2,000 at most"),
        ({"prompt": " "}, "the prompt is missing"),
        ({"models": ["critic"]}, "choose one of student, teacher, or both"),
        ({"models": "student"}, "choose one of"),
        ({"models": ["student", "student"]}, "choose one of"),
        ({"seed": -1}, "seed: give a whole number from 0 to 4,294,967,295"),
        ({"seed": "1; ls"}, "seed: give a whole number"),
        ({"seed": True}, "seed: give a whole number"),
        ({"frames": 6}, r"frames=6 is not 2n \+ 1"),
        ({"height": 33, "width": 32}, "height=33 is not a multiple"),
        ({"height": 10**9}, "height: give a whole number"),
        ({"height": 4000}, "larger than what the model was made for; ask for 5 frames of 32x48"),
        ({"models": ["teacher"], "steps": 1000}, "steps: give a whole number from 1 to 100"),
    ],
)
def test_what_is_out_of_bounds_is_a_message(idle, changes, message):
    with pytest.raises(UserError, match=message):
        idle.wish({**WISH, **changes})


def test_the_queue_is_bounded_and_a_failure_is_a_message(studio, capsys):
    models, state = studio._models, studio._jobs.state
    models.hold.clear()
    models.fail = ValueError("what happened\nsecond line")
    jobs = [studio._jobs.add(studio.wish(WISH))]
    while state(jobs[0])["status"] == "waiting":
        time.sleep(0.01)
    jobs += [studio._jobs.add(studio.wish({**WISH, "seed": seed})) for seed in (4, 5)]
    with pytest.raises(UserError, match="2 wishes are waiting already"):
        studio._jobs.add(studio.wish(WISH))
    assert [state(job)["ahead"] for job in jobs] == [0, 1, 2]
    assert studio._jobs.cancel(jobs[1])["status"] == "cancelled"
    models.there = {"student": studio._opened["student"].fingerprints["transformer"]}  # it is read: no other try
    models.hold.set()
    assert finished(studio, {**WISH, "seed": 6})["message"].endswith("student: what happened")
    models.fail = None
    assert finished(studio, WISH)["status"] == "done"
    assert state(jobs[1])["status"] == "cancelled"
    for number in (999, "1", None):
        with pytest.raises(UserError, match="not known any more"):
            state(number)


def test_a_new_checkpoint_is_taken_and_one_that_vanishes_is_no_end(studio, student, tmp_path):
    first = finished(studio, WISH)
    shutil.rmtree(student)
    write_dit(student, student=STUDENT, seed=2)
    second = finished(studio, WISH)
    assert first["results"][0]["video"] != second["results"][0]["video"], "other weights, another video"
    shutil.rmtree(student)
    third = finished(studio, {**WISH, "seed": 9, "height": 24})
    assert third["status"] == "done", third
    assert "student: no such file or folder" in third["notes"][0]
    assert "made by the student that is in memory" in third["notes"][0]
    studio._models.there.clear()
    lost = finished(studio, {**WISH, "seed": 10})
    assert (lost["status"], "no such file or folder" in lost["message"]) == ("failed", True)
    write_dit(student, student=STUDENT, seed=3)
    assert finished(studio, {**WISH, "seed": 10})["status"] == "done"


def test_a_checkpoint_that_vanishes_while_it_is_read(studio, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    models = studio._models
    finished(studio, WISH)
    kept, tries, make = dict(models.there), [], models.make
    models.there = {"student": "another"}

    def vanish(opened, job, **calls):
        tries.append(1)
        if len(tries) < 3:
            raise FileNotFoundError("gone")
        return make(opened, job, **calls)

    monkeypatch.setattr(models, "make", vanish)
    assert finished(studio, {**WISH, "seed": 7})["status"] == "done"
    assert (len(tries), models.there) == (3, kept)


def test_weights_that_are_wrong_are_known_at_the_start(weights, tmp_path):
    for options, message in (
        (Options(weights=str(weights / "nowhere")), "nowhere"),
        (Options(weights=str(weights / "student")), "student: no vae here"),
        (Options(weights=str(weights / "wan"), checkpoint=str(weights / "nowhere")), "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            Studio(*models_of(options), out=tmp_path / "out", models=StandIn(), command="")


def test_jobs_are_forgotten_but_not_those_that_wait(monkeypatch):
    monkeypatch.setattr("avd_jax.serving.jobs.MOST_REMEMBERED", 3)
    jobs = Jobs(lambda job: None, most=100)
    numbers = []
    for _ in range(10):
        numbers.append(jobs.add(None))
        while jobs.state(numbers[-1])["status"] != "done":
            time.sleep(0.001)
    assert jobs.state(numbers[-3])["status"] == "done"
    with pytest.raises(UserError, match="not known any more"):
        jobs.state(numbers[0])

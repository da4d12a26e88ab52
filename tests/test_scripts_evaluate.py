"""scripts/evaluate.py as a user runs it, on tiny random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from generation_cases import STUDENT, write_dit, write_interpolator, write_weights
from test_scripts_generate import MESSAGES, python

from avd_jax.data.video import write_video

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder / "wan")
    write_dit(folder / "student", student=STUDENT, seed=1)
    write_interpolator(folder / "student")
    return folder


def test_a_student_beside_its_teacher(folder, tmp_path):
    arguments = ["--checkpoint", folder / "student", "--weights", folder / "wan", "--out", tmp_path / "out"]
    arguments += ["--beside_teacher", "--steps", 2, "--count", 3, "--batch_size", 2]
    done = python(SCRIPT, *arguments)
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/out/report.html"
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    students = ["student, 3 steps", "student, 3 steps, 1 of them at half the frame rate"]
    assert list(record) == ["real", "teacher, 2x2 steps", "teacher, 3x2 steps", *students]
    for made in record.values():
        assert [row["caption"] for row in made["rows"]] == [row["caption"] for row in record["real"]["rows"]]
        assert all((tmp_path / "out" / row["file"]).is_file() for row in made["rows"])
    assert record["real"]["metrics"]["saturation/relative"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<video") == 15
    # Of the student's training: another guidance would be another teacher.
    settings = json.loads(next((tmp_path / "out" / "videos").glob("*.json")).read_text())["settings"]
    assert (settings["frames"], settings["height"]) == (STUDENT["frames"], STUDENT["height"])


def test_bad_input_is_one_line_that_says_what_to_do(folder, tmp_path):
    write_video(tmp_path / "videos" / "a.mp4", np.zeros((3, 16, 16, 3)), fps=8.0)
    (tmp_path / "videos" / "a.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    student = "--weights", str(folder / "wan"), "--checkpoint", str(folder / "student")
    cases = {
        (): "give either --videos with a folder",
        ("--videos", "x", "--weights", "y"): "give either --videos with a folder",
        ("--videos", str(tmp_path / "nowhere")): "nowhere: is not a folder of videos",
        ("--videos", str(tmp_path / "empty")): "empty: holds no videos",
        ("--videos", str(tmp_path / "videos")): "a.json: holds a JSON list, expected an object",
        ("--videos", str(tmp_path / "videos"), "--captions", "no.jsonl"): "no.jsonl",
        ("--weights", str(folder / "wan"), "--beside_teacher"): "--checkpoint is missing",
        ("--weights", str(folder / "wan"), "--captions", "a.jsonl"): "--captions: only goes with --videos",
        ("--videos", str(tmp_path / "videos"), "--count", "3"): "--count: only goes with --weights; leave it out",
        ("--weights", str(folder / "wan"), "--student_steps", "2"): "the student that --student_steps is about",
        (*student, "--student_steps", "1,2"): "--student_steps: this student makes all steps that it was trained for",
        (*student, "--student_steps", "1,x"): "--student_steps 1,x: give whole numbers, separated by commas",
        ("--weights", str(tmp_path / "nowhere")): "nowhere",
    }
    done = python("-c", MESSAGES, SCRIPT, json.dumps([[*arguments, *out] for arguments in cases]))
    messages = json.loads(done.stdout.splitlines()[-1])
    assert len(messages) == len(cases)
    for message, expected in zip(messages, cases.values(), strict=True):
        assert expected in message
        assert "\n" not in message

"""scripts/similarity.py as a user runs it, but for the sampling, which tests/test_generation_predictions.py runs."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from generation_cases import STUDENT, write_dit, write_weights

from avd_jax.errors import UserError
from avd_jax.generation.predictions import Step

SCRIPT = Path(__file__).parents[1] / "scripts" / "similarity.py"


@pytest.fixture
def run(tmp_path):
    """Runs a command line of the script in this process; returns what it would sample."""
    before = set(flags.FLAGS)
    script = runpy.run_path(str(SCRIPT))
    seen = []

    def steps_of(opened, jobs, **options):
        seen.append((opened.settings, [job.seed for job in jobs]))
        return [Step(1000.0, np.full((len(jobs), 2), 0.5, np.float32))]

    script["main"].__globals__["steps_of"] = steps_of

    def call(*arguments):
        for name in set(flags.FLAGS) - before:
            flags.FLAGS[name].unparse()
        flags.FLAGS(["x", *map(str, arguments), "--out", str(tmp_path / "out")])
        seen.clear()
        script["main"]()
        return list(seen)

    yield call
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_a_student_beside_its_teacher(run, tmp_path, capsys):
    write_weights(tmp_path / "wan")
    write_dit(tmp_path / "student", student=STUDENT, seed=1)
    student = ("--checkpoint", tmp_path / "student", "--weights", tmp_path / "wan", "--count", 3)
    (one, seeds), (other, _) = run(*student, "--beside_teacher", "--steps", 7)
    assert seeds == [0, 1, 2]
    assert (one.solver, one.half_rate_steps, one.frames) == ("student", 0, STUDENT["frames"])
    assert (other.solver, other.steps, other.frames, other.guidance_scale) == ("unipc", 7, STUDENT["frames"], 5.0)
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/out/similarity.html"
    assert "teacher, 7 steps" in (tmp_path / "out" / "similarity.html").read_text()
    assert [settings.solver for settings, _ in run(*student)] == ["student"]
    assert [settings.solver for settings, _ in run("--weights", tmp_path / "wan", "--count", 3)] == ["unipc"]
    with pytest.raises(UserError, match="--steps: is the teacher's; leave it out"):
        run(*student, "--steps", 7)
    with pytest.raises(UserError, match="--beside_teacher: needs --checkpoint"):
        run("--weights", tmp_path / "wan", "--beside_teacher")

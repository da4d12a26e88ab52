"""scripts/vbench.py as a user runs it, but for export, which tests/test_experiments_vbench_export.py runs."""

import json
import runpy
import types
from pathlib import Path

import pytest
from absl import flags
from vbench_cases import entries, results, write_info, write_noise

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import VBENCH, VBENCH2
from avd_jax.experiments import vbench_commands

SCRIPT = Path(__file__).parents[1] / "scripts" / "vbench.py"


def given(**flags):
    names = ("dimensions", "limit", "json", "beside", "out")
    return types.SimpleNamespace(**dict.fromkeys(names) | flags)


def test_check_of_someone_elses_videos(tmp_path, capsys):
    rows = [{"prompt_en": "An egg.", "dimension": ["Material"]}]
    info = write_info(tmp_path, VBENCH2, rows)
    for i in range(3):
        write_noise(tmp_path / "videos" / f"An egg.-{i}.mp4", i)
    what = given(suite="vbench2", info=str(info), videos=str(tmp_path / "videos"), dimensions=["Material"])
    assert vbench_commands.check(what) == 1
    output, errors = capsys.readouterr()
    assert output.splitlines() == [
        "list of prompts (1):",
        f"  {info}: is not VBench-2.0's own list: Human_Anatomy has 0 prompts, not 120",
    ]
    assert errors.startswith(f"note: {info} is not VBench-2.0's own list")
    what.json = str(tmp_path / "found.json")
    (tmp_path / "videos" / "An egg.-1.mp4").unlink()
    assert vbench_commands.check(what) == 1
    assert {"kind": "missing", "where": "An egg.-1.mp4", "what": "is not there"} in json.loads(
        Path(what.json).read_text()
    )["findings"]


def test_check_passes_with_the_suites_own_list(tmp_path, capsys, monkeypatch):
    info = write_info(tmp_path, VBENCH2, [{"prompt_en": "An egg.", "dimension": ["Material"]}])
    read = vbench_commands.read_info(info, VBENCH2)
    own = types.SimpleNamespace(path=info, rows=read.rows, digest=read.digest, other_version=None)
    monkeypatch.setattr(vbench_commands, "read_info", lambda path, suite: own)
    for i in range(3):
        write_noise(tmp_path / "videos" / "Material" / f"An egg.-{i}.mp4", i)
    what = given(suite="vbench2", info=str(info), videos=str(tmp_path / "videos"), dimensions=["Material"])
    assert vbench_commands.check(what) == 0
    assert capsys.readouterr().out == f"{tmp_path}/videos: 3 videos, nothing is wrong\n"


def test_score(tmp_path, capsys):
    for name in VBENCH2.dimensions:
        for run, score in (("a", 0.75), ("b", 0.5)):
            path = tmp_path / run / name / "results_1_eval_results.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(results(VBENCH2, name, score, [score, score])))
    what = given(suite="vbench2", results=str(tmp_path / "a"), json=str(tmp_path / "score.json"))
    vbench_commands.score(what)
    assert capsys.readouterr().out.splitlines()[-2].split() == ["Total", "75.00"]
    assert json.loads(Path(what.json).read_text())["total"] == pytest.approx(0.75)
    what.beside = str(tmp_path / "b")
    vbench_commands.score(what)
    total = capsys.readouterr().out.splitlines()[-2]
    assert total.split() == ["Total", "75.00", "50.00", "+25.00", "+25.00", "to", "+25.00"]
    (tmp_path / "b" / "Material" / "results_1_eval_results.json").unlink()
    with pytest.raises(UserError, match=r"/b: no total, since 1 dimensions are missing: Material"):
        vbench_commands.score(what)
    assert "Total" in capsys.readouterr().out  # ours has one


def test_leakage(tmp_path, capsys):
    lists = [write_info(tmp_path, suite) for suite in (VBENCH, VBENCH2)]
    prompts = [entries(suite)[0]["prompt_en"] for suite in (VBENCH, VBENCH2)]
    (tmp_path / "train.txt").write_text(f"one thing\n{prompts[0].upper()}\nanother\n{prompts[1]}\n")
    what = given(prompts=str(tmp_path / "train.txt"), against=str(lists[0]), out=str(tmp_path / "clean.txt"))
    what.json = str(tmp_path / "found.json")
    assert vbench_commands.leakage(what, [str(lists[1])]) == 1
    assert (tmp_path / "clean.txt").read_text() == "one thing\nanother\n"
    assert [len(found["pairs"]) > 0 for found in json.loads(Path(what.json).read_text())["lists"]] == [True, True]
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/clean.txt: the other 2 texts"
    again = given(prompts=str(tmp_path / "clean.txt"), against=str(lists[0]))
    assert vbench_commands.leakage(again, []) == 0


@pytest.fixture
def command():
    """Runs a command line of the script in this process; its flags are gone afterwards."""
    before = set(flags.FLAGS)
    flags.FLAGS.set_gnu_getopt(True)
    script = runpy.run_path(str(SCRIPT))

    def run(*arguments):
        for name in set(flags.FLAGS) - before:
            flags.FLAGS[name].unparse()
        return command_line.run_command(script["COMMANDS"], flags.FLAGS(["x", *map(str, arguments)])[1:])

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.set_gnu_getopt(False)


def test_command_lines(tmp_path, command, capsys):
    info, train = write_info(tmp_path, VBENCH2), tmp_path / "train.txt"
    train.write_text(entries(VBENCH2)[0]["prompt_en"])
    assert command("leakage", "--prompts", train, "--against", info, info) == 1
    assert capsys.readouterr().out.count("1 of 1 texts") == 2
    assert command("export", "--suite=vbench2", f"--info={info}", "--out=x", "--dry_run", "--limit=1") is None
    assert "VBench-2.0: 71 files of 71 videos, 0 of them there" in capsys.readouterr().out
    for arguments, message in (
        ((), "give one of export, check, measure, score, leakage, before the flags"),
        (("check", "--suite=vbench", "--videos=x"), "--info is missing"),
        (("score", "--suite=vbench", "--results=x", "--fps=3"), "--fps: does not go with score"),
        (("score", "--suite=vbench", f"--results={tmp_path}"), "holds no results of VBench"),
        (("check", "--suite=vbench", "--info", info, "--videos=x"), "is the list of VBench-2.0; give --suite vbench2"),
        (("check", "--suite=vbench2", "--info", info, "--videos=x/y"), "--videos x/y: there is no such folder"),
        (("leakage", "--prompts", train, "--against", info, f"{tmp_path}/no.txt"), "no.txt: cannot be read"),
        (("export", "--suite=vbench2", "--info", info, "--out=x"), "--weights is missing"),
        (("measure", "--suite=vbench2", "--info", info, "--out=x", "--videos=x"), "are not measured here; score them"),
        (("measure", "--suite=vbench", "--info", info, "--out=x"), "--videos is missing"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            command(*arguments)
        assert "\n" not in str(raised.value)

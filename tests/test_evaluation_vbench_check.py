"""The preflight: every way in which a folder of videos may be wrong, and a right one."""

import shutil

import pytest
from vbench_cases import write_noise

from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.check import (
    MISSING,
    OTHER_FILES,
    OTHER_SHAPE,
    OTHER_VERSION,
    REPEATED,
    SURPLUS,
    UNREADABLE,
    Shape,
    check,
    report,
)
from avd_jax.evaluation.vbench.suites import VBENCH2, Info, Row

LIMITS = {"Material": None, "Mechanics": None}
INFO = Info(
    "list.json",
    (Row("An egg.", ("Material",)), Row("An egg.", ("Mechanics",)), Row("Ice melts", ("Material",))),
    "",
    None,
)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    folder = tmp_path_factory.mktemp("right")
    for i in range(3):
        write_noise(folder / "Material" / f"An egg.-{i}.mp4", i)
        write_noise(folder / "Material" / f"Ice melts-{i}.mp4", 10 + i)
    shutil.copytree(folder / "Material", folder / "Mechanics", ignore=shutil.ignore_patterns("Ice*"))
    return folder


@pytest.fixture
def videos(right, tmp_path):
    return shutil.copytree(right, tmp_path / "videos")


def found(folder, info=INFO, limits=LIMITS, **options):
    return [(f.kind, f.where, f.what) for f in check(folder, VBENCH2, info, limits, **options)]


def test_nothing_is_wrong(videos):
    seen = []
    assert found(videos, on_progress=seen.append, shape=Shape(3, 32, 48, 8.0)) == []
    assert sum(seen) == 9
    assert found(videos / "Material", limits={"Material": None}) == []  # all in one folder
    assert found(videos, limits={"Mechanics": None}) == []  # others may be there too
    assert found(videos, limits={"Material": 1}) == []


def test_all_that_is_wrong(videos):
    material, mechanics = videos / "Material", videos / "Mechanics"
    (material / "An egg.-0.mp4").unlink()
    (material / "An egg.-1.mp4").rename(material / "an egg.-1.mp4")
    (material / "Ice melts-0.mp4").rename(material / "Ice melts-0.mkv")
    (material / "Ice melts-1.mp4").write_bytes((material / "Ice melts-1.mp4").read_bytes()[:-500])
    (material / "An egg.-2.json").write_text("{}")
    (material / ".Ice melts-2.mp4.tmp").write_text("")
    (material / "Ice melts-3.mp4").write_text("")
    (material / "An old prompt-0.mp4").write_text("")
    (mechanics / "Ice melts-0.mp4").write_text("")
    (mechanics / "film.mp4").write_text("")
    (mechanics / "An egg.-1.mp4").write_text("")
    (videos / "notes.txt").write_text("")
    (videos / "material").mkdir()
    write_noise(mechanics / "An egg.-2.mp4", 2, frames=2, fps=16)
    other = Info("list.json", INFO.rows, "", "Material has 2 prompts, not 50")
    findings = found(videos, other, on_progress=lambda done: None)
    assert findings[0] == (OTHER_VERSION, "list.json", "is not VBench-2.0's own list: Material has 2 prompts, not 50")
    assert findings[1:4] == [
        (MISSING, "Material/An egg.-0.mp4", "is not there"),
        (MISSING, "Material/An egg.-1.mp4", "is not there, but 'an egg.-1.mp4' is"),
        (MISSING, "Material/Ice melts-0.mp4", "is not there, but 'Ice melts-0.mkv' is"),
    ]
    move = "only the videos may lie here; move it elsewhere"
    old = "has no prompt of the list; it may be of another version"
    assert findings[4:-3] == [
        (SURPLUS, "Material/An old prompt-0.mp4", old),
        (SURPLUS, "Material/Ice melts-3.mp4", "VBench-2.0 wants fewer videos of this prompt"),
        (SURPLUS, "Material/an egg.-1.mp4", old),
        (SURPLUS, "Mechanics/Ice melts-0.mp4", "belongs into Material/"),
        (SURPLUS, "Mechanics/film.mp4", "is not named PROMPT-NUMBER.mp4"),
        (SURPLUS, "material/", "is no folder of VBench-2.0"),
        (OTHER_FILES, "Material/.Ice melts-2.mp4.tmp", move),
        (OTHER_FILES, "Material/An egg.-2.json", move),
        (OTHER_FILES, "Material/Ice melts-0.mkv", move),
        (OTHER_FILES, "notes.txt", "only the folders of the dimensions may lie here; move it elsewhere"),
    ]
    assert [(kind, where) for kind, where, _ in findings[-3:]] == [
        (UNREADABLE, "Material/Ice melts-1.mp4"),
        (UNREADABLE, "Mechanics/An egg.-1.mp4"),
        (OTHER_SHAPE, "Mechanics/An egg.-2.mp4"),
    ]
    expected = "2 frames of 32x48 at 16 a second, not 3 frames of 32x48 at 8 a second, as most are"
    assert findings[-1][2] == expected
    assert all("\n" not in what for _, _, what in findings)


def test_a_folder_that_is_missing_is_one_line(videos):
    shutil.rmtree(videos / "Mechanics")
    assert found(videos) == [(MISSING, "Mechanics/", "the folder, with 3 videos")]
    with pytest.raises(UserError, match=r"--videos .*/none: there is no such folder"):
        found(videos / "none")


def test_one_seed_for_all_videos_is_found(videos):
    shutil.copy(videos / "Material" / "An egg.-0.mp4", videos / "Material" / "An egg.-2.mp4")
    assert found(videos, limits={"Material": None}) == [
        (REPEATED, "Material/An egg.-2.mp4", "is Material/An egg.-0.mp4 again; each needs a seed of its own")
    ]


def test_videos_as_they_were_exported(videos):
    findings = check(videos, VBENCH2, INFO, LIMITS, shape=Shape(81, 480, 832, 16.0))
    assert len(findings) == 9
    text = report(findings, most=2).splitlines()
    assert text[0] == "another frame rate, length or size (9):"
    assert text[1].endswith(
        "3 frames of 32x48 at 8 a second, not 81 frames of 480x832 at 16 a second, as it was exported"
    )
    assert text[3:] == ["  ... and 7 more; --json FILE writes all"]

"""Which videos the two suites want, and lists of prompts that are not theirs."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from vbench_cases import BOTH, entries, write_info

from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.suites import VBENCH, VBENCH2, Info, Row, read_info
from avd_jax.evaluation.vbench.videos import folders_of, video_seed, wanted


def everything(suite, info):
    return wanted(suite, info, dict.fromkeys(folders_of(suite, suite.dimensions)))


def info_of(*rows):
    return Info("list.json", tuple(Row(prompt, dimensions) for prompt, dimensions in rows), "", None)


@pytest.mark.parametrize(("suite", "files"), [(VBENCH, 6230), (VBENCH2, 3860)], ids=lambda suite: str(suite)[:20])
def test_a_list_of_the_official_sizes_wants_as_many_files_as_the_official_tool(tmp_path, suite, files):
    info = read_info(write_info(tmp_path, suite), suite)
    videos = everything(suite, info)
    assert len(videos) == len({(video.folder, video.name) for video in videos}) == files
    counts = Counter(video.folder for video in videos)
    assert len(counts) == {"vbench": 11, "vbench2": 18}[suite.name]
    assert counts["temporal_flickering"] in (0, 75 * 25)
    assert counts["Diversity"] in (0, 10 * 20)
    assert info.other_version == "as many prompts of each dimension, but other ones"


def test_the_folders_are_those_of_the_official_script():
    """evaluate.sh of VBench pairs dimensions and folders like this."""
    assert VBENCH.folders == {
        **{name: name for name in VBENCH.dimensions},
        "background_consistency": "scene",
        "aesthetic_quality": "overall_consistency",
        "imaging_quality": "overall_consistency",
        "motion_smoothness": "subject_consistency",
        "dynamic_degree": "subject_consistency",
    }
    assert all(name == folder for name, folder in VBENCH2.folders.items())
    for suite in BOTH:
        assert sorted(name for members in suite.groups.values() for name in members) == sorted(suite.dimensions)


def test_names_keep_every_character_that_the_official_tool_looks_for():
    prompt = 'A "cat\'s" 50% café at 160°C: “why?” {0} \\ [x].'
    assert VBENCH.file_name(prompt, 4) == f"{prompt}-4.mp4"
    long = "é" * 60 + "a" * 200
    assert VBENCH2.file_name(long, 0) == "é" * 60 + "a" * 120 + "-0.mp4"  # characters, not bytes
    for suite, bad, what in (
        (VBENCH, "and/or", "'/'"),
        (VBENCH, "x" * 300, "306 bytes"),
        (VBENCH2, "°" * 180, "366 bytes"),
    ):
        with pytest.raises(UserError, match=f"names the file after it, and no file's name may have {what}"):
            suite.file_name(bad, 0)
    assert VBENCH2.file_name("x" * 180 + "/", 0) == "x" * 180 + "-0.mp4"


def test_every_path_of_vbench2_is_byte_for_byte_that_of_its_rows(tmp_path):
    """1,230 rows, with prompts that are long, accented, quoted, or end in spaces and dots."""
    tails = (
        "",
        ".",
        " ",
        "'s \u2018hat\u2019",
        ' "so", 50 %',
        " \u00e9t\u00e9",
        " ...",
        " and more" * 25,
        " \u00b0" * 2,
    )
    rows = entries(VBENCH2)
    for number, row in enumerate(rows):
        row["prompt_en"] = f"{number} {row['prompt_en']}{tails[number % len(tails)]}"
    assert len(rows) == 1230
    expected = []
    for row in rows:  # as vbench2/__init__.py puts a path together
        for dimension in row["dimension"]:
            for index in range(20 if dimension == "Diversity" else 3):
                expected.append(f"{dimension}/{row['prompt_en'][:180]}-{index}.mp4".encode())
    info = read_info(write_info(tmp_path, VBENCH2, rows), VBENCH2)
    found = [f"{video.folder}/{video.name}".encode() for video in everything(VBENCH2, info)]
    assert len(found) == 3860
    assert sorted(found) == sorted(expected)


def test_a_prompt_of_two_folders_lies_in_both_and_has_one_seed():
    rows = ("The bund, oil painting", ("appearance_style",)), ("The bund, oil painting", ("overall_consistency",))
    videos = everything(VBENCH, info_of(*rows))
    assert {(video.folder, video.index) for video in videos} == {
        (folder, index) for folder in ("appearance_style", "overall_consistency") for index in range(5)
    }
    assert len({video_seed(0, video.prompt, video.index) for video in videos}) == 5


def test_limits_are_prompts_of_a_folder():
    info = info_of(*((f"prompt {i}", ("scene", "background_consistency")) for i in range(4)), ("b", ("color",)))
    assert [video.name for video in wanted(VBENCH, info, {"scene": 2})] == [
        f"prompt {i}-{index}.mp4" for i in range(2) for index in range(5)
    ]
    assert folders_of(VBENCH, ("background_consistency", "scene")) == {"scene": None}


def test_two_prompts_with_one_name_are_refused():
    rows = ("a" * 180 + "b", ("Material",)), ("a" * 180 + "c", ("Material",))
    with pytest.raises(UserError, match=r"list.json: 'aaa.* begin alike"):
        everything(VBENCH2, info_of(*rows))


def test_seeds():
    seeds = {video_seed(run, prompt, index) for run in range(3) for prompt in ("a", "b", "a1") for index in range(25)}
    assert len(seeds) == 3 * 3 * 25
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert video_seed(0, "a", 0) == 3533806732  # what was exported can be exported again


def test_an_official_list_is_told_by_its_prompts_in_any_order(tmp_path):
    rows = entries(VBENCH2)
    digest = read_info(write_info(tmp_path, VBENCH2, rows), VBENCH2).digest
    official = replace(VBENCH2, digest=digest)
    assert read_info(write_info(tmp_path, VBENCH2, rows[::-1]), official).other_version is None
    info = read_info(write_info(tmp_path, VBENCH2, rows[1:]), official)
    assert info.other_version == "Human_Anatomy has 119 prompts, not 120"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"--info .*json: cannot be read \(is not JSON\); get VBench_full_info.json from VBench's repository"),
        ("{}", r"is no list of prompts"),
        ('["a"]', r"entry 1 has no text 'prompt_en' with a list 'dimension'"),
        ('[{"prompt_en": "a", "dimension": "scene"}]', r"entry 1 has no text"),
        ('[{"prompt_en": "a \\ud83d", "dimension": ["scene"]}]', r"the prompt of entry 1 is no UTF-8"),
        ('[{"prompt_en": "a", "dimension": ["Material"]}]', r"is the list of VBench-2.0; give --suite vbench2, or"),
        ('[{"prompt_en": "a", "dimension": ["scene", "taste"]}]', r"its dimension 'taste' is none of VBench"),
    ],
)
def test_a_list_that_is_none(tmp_path, content, message):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_info(path, VBENCH)


def test_a_missing_list(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_info(tmp_path / "none.json", VBENCH)


def test_dimensions_that_a_user_names():
    assert VBENCH.check_dimensions(["scene", "color"]) == ("color", "scene")
    with pytest.raises(
        UserError, match=r"--dimensions Material: VBench has none of this name: it is one of VBench-2.0"
    ):
        VBENCH.check_dimensions(["Material"])
    with pytest.raises(UserError, match=r"did you mean 'scene'"):
        VBENCH.check_dimensions(["scenes"])


def test_lists_are_json_with_a_mark(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + json.dumps(entries(VBENCH)[:1]), encoding="utf-8")
    assert read_info(path, VBENCH).rows[0].prompt == "subject_consistency of prompt 0."

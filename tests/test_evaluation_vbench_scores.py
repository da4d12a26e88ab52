"""Totals against the official scripts' arithmetic, written out; result files that are wrong; differences."""

import json
import math

import numpy as np
import pytest
from vbench_cases import BOTH, results

from avd_jax.errors import UserError
from avd_jax.evaluation.vbench.score_table import as_record, table
from avd_jax.evaluation.vbench.scores import differences, read_results, totals
from avd_jax.evaluation.vbench.suites import VBENCH, VBENCH2

SCORES = {suite.name: dict(zip(suite.dimensions, np.linspace(0.31, 0.97, 18), strict=False)) for suite in BOTH}
IDS = [suite.name for suite in BOTH]


def write(folder, entries, name="results_2026-11-25-10:00:00_eval_results.json"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


def write_all(folder, suite, *, shift=0.0, without=(), spread=0.2):
    """Write results of every dimension whose score is the mean of its videos."""
    rng = np.random.default_rng(len(suite.name))
    for name, score in SCORES[suite.name].items():
        values = rng.normal(0, spread, 40) + shift
        values += score + shift - values.mean()
        scale = 100 if name == "imaging_quality" else 1
        if name not in without:
            write(folder, results(suite, name, score + shift, list(values * scale)), f"{name}/m/x_eval_results.json")
    return folder


def test_vbench_as_the_official_script_adds_up():
    s = SCORES["vbench"]
    quality = [
        (s["subject_consistency"] - 0.1462) / (1.0 - 0.1462),
        (s["background_consistency"] - 0.2615) / (1.0 - 0.2615),
        (s["temporal_flickering"] - 0.6293) / (1.0 - 0.6293),
        (s["motion_smoothness"] - 0.706) / (0.9975 - 0.706),
        s["aesthetic_quality"],
        s["imaging_quality"],
        0.5 * s["dynamic_degree"],
    ]
    semantic = [
        *(s["object_class"], s["multiple_objects"], s["human_action"], s["color"], s["spatial_relationship"]),
        s["scene"] / 0.8222,
        (s["appearance_style"] - 0.0009) / (0.2855 - 0.0009),
        s["temporal_style"] / 0.364,
        s["overall_consistency"] / 0.364,
    ]
    found = totals(VBENCH, s)
    assert found.groups["Quality"] == pytest.approx(sum(quality) / 6.5, abs=1e-12)
    assert found.groups["Semantic"] == pytest.approx(sum(semantic) / 9, abs=1e-12)
    assert found.total == pytest.approx((sum(quality) / 6.5 * 4 + sum(semantic) / 9) / 5, abs=1e-12)
    assert found.missing == ()
    # The best and the worst that the normalisation knows.
    assert totals(VBENCH, {n: VBENCH.bounds.get(n, (0, 1))[1] for n in s}).total == pytest.approx(1, abs=1e-12)
    assert totals(VBENCH, {n: VBENCH.bounds.get(n, (0, 1))[0] for n in s}).total == pytest.approx(0, abs=1e-12)


def test_vbench2_as_the_official_script_adds_up():
    s = SCORES["vbench2"]
    groups = {
        "Creativity": (s["Composition"] + s["Diversity"]) / 2,
        "Commonsense": (s["Instance_Preservation"] + s["Motion_Rationality"]) / 2,
        "Controllability": (
            s["Camera_Motion"]
            + s["Complex_Landscape"]
            + s["Complex_Plot"]
            + s["Dynamic_Attribute"]
            + s["Dynamic_Spatial_Relationship"]
            + s["Human_Interaction"]
            + s["Motion_Order_Understanding"]
        )
        / 7,
        "Human Fidelity": (s["Human_Anatomy"] + s["Human_Clothes"] + s["Human_Identity"]) / 3,
        "Physics": (s["Material"] + s["Mechanics"] + s["Multi-View_Consistency"] + s["Thermotics"]) / 4,
    }
    found = totals(VBENCH2, s)
    assert found.groups == pytest.approx(groups, abs=1e-12)
    assert found.total == pytest.approx(sum(groups.values()) / 5, abs=1e-12)


@pytest.mark.parametrize("suite", BOTH, ids=IDS)
def test_a_missing_dimension_leaves_no_total_and_not_its_group(suite):
    name = suite.dimensions[0]
    found = totals(suite, {n: score for n, score in SCORES[suite.name].items() if n != name})
    assert found.total is None
    assert found.missing == (name,)
    assert set(found.groups) == {group for group, members in suite.groups.items() if name not in members}


def test_results_are_found_in_any_folder_beside_other_files(tmp_path):
    write_all(tmp_path, VBENCH2)
    write(tmp_path / "Material", [{"prompt_en": "a", "dimension": ["Material"]}], "results_1_full_info.json")
    write(tmp_path, {"a prompt": {"static_count": 0, "static_path": []}}, "filtered_static_video.json")
    write(tmp_path, {}, "empty.json")
    found = read_results(tmp_path, VBENCH2)
    assert list(found) == list(VBENCH2.dimensions)
    assert found["Material"].count == len(found["Material"].videos) == 40
    assert found["Material"].score == SCORES["vbench2"]["Material"]
    one = read_results(write(tmp_path / "one", results(VBENCH2, "Diversity", 0.5, [0.5])), VBENCH2)
    assert list(one["Diversity"].videos) == ["Diversity of prompt 0.-0.mp4"]


def test_what_could_not_be_judged_does_not_count(tmp_path):
    path = write(tmp_path, results(VBENCH2, "Human_Identity", 0.75, [1.0, -1, 0.5, None, True, {"a": 1}]))
    found = read_results(path, VBENCH2)["Human_Identity"]
    assert (found.count, list(found.videos.values())) == (6, [1.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"Material": [0.5, []]}, "'Material' is no dimension of VBench, but of VBench-2.0; give --suite vbench2"),
        ({"camera_motion": [0.5, []]}, "'camera_motion' is no dimension of VBench, but of another suite or version"),
        ({"scene": [math.nan, []]}, "scene has no score with a list of videos"),
        ({"scene": 0.5}, "scene has no score with a list of videos"),
        ({"scene": [0.4, []]}, r"scores scene at 0.4, .* at 0.5; keep one"),
    ],
)
def test_results_that_are_wrong(tmp_path, entries, message):
    write(tmp_path, {"scene": [0.5, []]}, "a_eval_results.json")
    write(tmp_path, entries, "b_eval_results.json")
    with pytest.raises(UserError, match=message):
        read_results(tmp_path, VBENCH)


def test_no_results(tmp_path):
    with pytest.raises(UserError, match=r"holds no results of VBench-2.0 \(\*_eval_results.json\)"):
        read_results(tmp_path, VBENCH2)
    (tmp_path / "torn_eval_results.json").write_text('{"Material": [0.5,')
    with pytest.raises(UserError, match=r"torn_eval_results.json: cannot be read as JSON"):
        read_results(tmp_path, VBENCH2)


@pytest.mark.parametrize("suite", BOTH, ids=IDS)
def test_differences_have_the_scores_between_their_bounds(tmp_path, suite):
    ours = read_results(write_all(tmp_path / "ours", suite, shift=0.02), suite)
    others = read_results(write_all(tmp_path / "others", suite), suite)
    found = differences(suite, ours, others)
    assert set(found) == {*suite.dimensions, *suite.groups, "Total"}
    for name in suite.dimensions:  # every video is better by as much, so nothing is left to chance
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((0.02,) * 3, abs=1e-6)
    both = [totals(suite, {name: result.score for name, result in r.items()}) for r in (ours, others)]
    assert found["Total"].value == pytest.approx(both[0].total - both[1].total, abs=1e-12)
    assert found["Total"].pairs == 40 * len(suite.dimensions)


def test_the_interval_is_that_of_a_mean(tmp_path):
    """Of n pairs whose differences scatter by s, the bounds are 1.96 s / sqrt(n) to both sides."""
    a, b = np.random.default_rng(0).normal(0.5, 0.1, (2, 400))
    values = dict(ours=a, others=b)
    read = [
        read_results(write(tmp_path, results(VBENCH, "color", v.mean(), list(v)), f"{k}/x_eval_results.json"), VBENCH)
        for k, v in values.items()
    ]
    found = differences(VBENCH, *read)["color"]
    half = 1.96 * (a - b).std() / 20
    assert found.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found.pairs == 400
    np.testing.assert_allclose([found.low, found.high], [found.value - half, found.value + half], atol=0.1 * half)


def test_videos_of_two_dimensions_are_drawn_together(tmp_path):
    """Scores that always fall together leave a group uncertain; drawn apart, they would seem to even out."""
    names = ("Human_Anatomy", "Human_Identity", "Human_Clothes")
    values = np.random.default_rng(0).normal(0.5, 0.1, 300)
    sets = []
    for k, sign in (("ours", 1), ("others", -1)):
        for name in names:
            entry = results(VBENCH2, name, float((sign * values).mean()), list(sign * values))
            for row in entry[name][1]:
                row["video_path"] = row["video_path"].replace(name, "same")
            write(tmp_path / k / name, entry)
        sets.append(read_results(tmp_path / k, VBENCH2))
    found = differences(VBENCH2, *sets)
    one, group = found["Human_Anatomy"], found["Human Fidelity"]
    assert (group.low, group.high) == pytest.approx((one.low, one.high))
    assert group.pairs == 300


def test_table_and_record(tmp_path):
    ours = read_results(write_all(tmp_path / "ours", VBENCH), VBENCH)
    others = read_results(write_all(tmp_path / "others", VBENCH, without=("scene",)), VBENCH)
    lines = table(VBENCH, ours, others).splitlines()
    assert len(lines) == 1 + 16 + 2 + 1 + 1
    assert lines[1].split()[:3] == ["subject_consistency", "40/360", "0.3100"]
    assert lines[-2].startswith("Total")
    assert lines[-1].startswith("fewer results than videos that VBench asks for: subject_consistency, ")
    record = json.loads(json.dumps(as_record(VBENCH, ours, others), allow_nan=False))
    assert record["total"] == totals(VBENCH, SCORES["vbench"]).total
    assert record["videos"]["temporal_flickering"] == {"found": 40, "expected": 375}
    assert (record["beside"]["total"], record["beside"]["missing"]) == (None, ["scene"])
    assert "scene" not in record["beside"]["differences"]
    assert "Total" not in record["beside"]["differences"]


def test_other_videos_have_no_interval(tmp_path):
    write(tmp_path / "a", results(VBENCH, "scene", 0.5, [0.4, 0.6]))
    write(tmp_path / "b", results(VBENCH, "scene", 0.4, []))
    read = [read_results(tmp_path / name, VBENCH) for name in "ab"]
    assert "+0.1000   (no video in common)" in table(VBENCH, *read)
    change = as_record(VBENCH, *read)["beside"]["differences"]["scene"]
    assert change == {"value": pytest.approx(0.1), "low": None, "high": None, "pairs": 0}
